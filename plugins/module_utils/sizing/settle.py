# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo a resize that was interrupted.

Live changes need nothing: what is half done shows in the facts, and the same task completes it.  A restart is finished when
the domain turns out to be well with its new size, else the old definition comes back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import appliance, health
from ..hypervisor.connection import explaining, find_by_uuid, open_connection
from ..hypervisor.domain_model import read_domain
from ..safety import processes, settlement
from ..safety.journal import Journal
from . import restart, shrinking
from .outcome import wait_for

OPERATION = "resize"

#: A guest that was told to shut down just before the kill is still doing so.
_SHUTDOWN_SECONDS = 60.0


def settle(uri: str, pending: Journal) -> dict[str, str]:
    """Finish or undo one interrupted resize; returns ``{what, action}``."""
    operation = pending.operation
    what = f"an interrupted resize of {operation.domains[0]['name']!r}"
    connection = open_connection(uri)
    try:
        handle = find_by_uuid(connection, operation.domains[0]["uuid"])
        if handle is None:
            kept = [shrink["kept"] for shrink in operation.plan.get("shrinks", ()) if os.path.lexists(shrink["kept"])]
            also = f" and its disks as they were before ({', '.join(kept)})" if kept else ""
            return settlement.given_up(pending, what, where=f"its files{also}")
        action = _settle(connection, handle, pending)
    finally:
        connection.close()
    pending.finish()
    return {"what": what, "action": action}


def _settle(connection: Any, handle: Any, pending: Journal) -> str:
    operation = pending.operation
    if not operation.reached("shutdown"):
        return "left as far as it had got"
    shrinks = operation.plan.get("shrinks", ())
    if shrinks:
        _end_of_shrinking(handle, shrinks)
    if operation.reached("drop"):
        restart.keep(handle, pending)
        return "finished: it was well with its new size"
    if shrinks and not operation.reached("start"):
        if handle.isActive() and any(shrinking.swapped(shrink) for shrink in shrinks):
            return _started_by_somebody(handle, pending)
        shrinking.put_back(shrinks)  # also of a guest that still shuts down: nothing has taken its image's name
        if not operation.plan["was_running"] and not operation.reached("define"):
            return "taken back: it is off, with its disks as they were"
    if not operation.reached("define"):
        wait_for(lambda: not handle.isActive(), min(_SHUTDOWN_SECONDS, operation.plan["shutdown_timeout"]))
        if handle.isActive():
            return "left running: it had not shut down"
        if read_domain(handle).managed_save:
            return "left saved"
        with explaining(f"Starting domain {handle.name()!r} again", state="It is shut off."):
            handle.create()
        return f"started again with its old size{_but(restart.wait_for_old_size(handle, operation.plan))}"
    if operation.reached("start") and not operation.reached("rollback") and handle.isActive():
        plan = operation.plan
        if not plan["judge"] or health.wait_until_well(handle, plan["health_command"], plan["health_timeout"]) is None:
            restart.keep(handle, pending)
            return "found well with its new size"
    problem = restart.roll_back(connection, pending)
    where = "runs" if operation.plan.get("was_running", True) else "is off"
    return f"taken back: it {where} with its old definition{_but(problem)}"


def _but(problem: str | None) -> str:
    return "" if problem is None else f", but {problem}"


def _end_of_shrinking(handle: Any, shrinks: Sequence[Mapping[str, Any]]) -> None:
    """libguestfs' QEMU ends a moment after its process, and holds the images' locks until then."""
    if not handle.isActive() and not processes.wait_released(shrink["path"] for shrink in shrinks):
        raise VmkeeperError(
            f"An image of domain {handle.name()!r} is still in use by a program of this host",
            state="The domain is off, and its disks are whole.",
            advice="See which one (fuser), end it, then run this again",
            paths=[shrink["path"] for shrink in shrinks],
        )
    appliance.sweep()


def _started_by_somebody(handle: Any, pending: Journal) -> str:
    """It runs on smaller copies that no run has started it on; what it has written is on them."""
    plan = pending.operation.plan
    problem = health.wait_until_well(handle, plan["health_command"], plan["health_timeout"])
    if problem is None:
        shrinking.drop_originals(plan["shrinks"])
        return "found well with its smaller disks"
    kept = ", ".join(shrink["kept"] for shrink in plan["shrinks"])
    raise VmkeeperError(
        f"Domain {handle.name()!r} was started on its smaller disks and is not well: {problem}",
        state=f"Its disks as they were before are kept as {kept}.",
        advice="See that it becomes well, or shut it down, and run this again",
    )


#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS = {OPERATION: settle}
