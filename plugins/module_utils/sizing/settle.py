# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo a resize that was interrupted.

Live changes need nothing: what is half done shows in the facts, and the same task completes it.  Before the start, a restart
is taken back.  After it, it is finished when the domain turns out to be well with its new size.  If it is not, the old definition
comes back only while the interrupted run could itself be judging it; a guest that may have served since is never stopped, nor its disks
exchanged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import appliance, health, power
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import explaining, find_by_uuid, message_of, open_connection
from ..hypervisor.domain_model import read_domain
from ..safety import processes, settlement
from ..safety.journal import Journal, Operation
from . import restart, shrinking
from .outcome import wait_for

OPERATION = "resize"

#: A guest that was told to shut down before the kill may still be doing so: it has this long at least, if the task gave it as much.
_SHUTDOWN_SECONDS = 60.0

#: Times of files and of the journal come from one clock, but not at one instant.
_CLOCK_SECONDS = 1.0

#: How much longer than ``health_timeout`` an interrupted run is stood in for as if it were still at work.
_MARGIN_SECONDS = 600.0


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
        shrinks = operation.plan.get("shrinks", ())
        used = shrinking.return_used(shrinks) if handle.isActive() else []
        action = _settle(connection, handle, pending)
        if used:
            action += f"; it was started on {', '.join(used)} of the old size, whose smaller copy was removed"
    finally:
        connection.close()
    pending.finish()
    return {"what": what, "action": action}


def _settle(connection: Any, handle: Any, pending: Journal) -> str:
    operation = pending.operation
    if not operation.reached("define") and not operation.reached("shutdown"):
        return "left as far as it had got"
    shrinks = operation.plan.get("shrinks", ())
    if shrinks:
        _end_of_shrinking(handle, shrinks)
    if operation.reached("drop"):
        restart.keep(handle, pending, leave_running=not is_recent(operation, time.time()))
        return "finished: it was well with its new size"
    if operation.reached("rollback"):
        return _way_back(connection, handle, pending)
    if operation.reached("start"):
        return _started(connection, handle, pending)
    return _not_started(connection, handle, pending)


def _not_started(connection: Any, handle: Any, pending: Journal) -> str:
    """The run ended before it started the domain with its new size: all of it is taken back."""
    operation, plan = pending.operation, pending.operation.plan
    shrinks = plan.get("shrinks", ())
    swap = operation.last("swap")
    if swap is not None and (
        (handle.isActive() and any(shrinking.swapped(shrink) for shrink in shrinks))
        or shrinking.written_since(shrinks, swap["at"] + _CLOCK_SECONDS)
    ):
        return _started_by_somebody(handle, pending)
    shrinking.put_back(shrinks)  # also of a guest that still shuts down: nothing has taken its image's name
    if operation.reached("shutdown"):
        wait_for(lambda: not handle.isActive(), patience(operation, time.time()))
    restart.take_definition_back(connection, handle, plan)
    if not plan.get("was_running", True):
        return "taken back: it is off, with its disks as they were"
    if handle.isActive():
        return "left running: it had not shut down"
    domain = read_domain(handle)
    if domain.managed_save:
        return "left saved"
    if not operation.reached("shutdown") or domain.state.reason not in power.ENDED_BY_ITSELF:
        return f"left off, with its old size: somebody has switched it off ({domain.state.reason})"
    with explaining(f"Starting domain {handle.name()!r} again", state="It is shut off, with its old size."):
        handle.create()
    return f"started again with its old size{_but(restart.wait_for_old_size(handle, plan))}"


def _started(connection: Any, handle: Any, pending: Journal) -> str:
    """The domain may have served with its new size for long: what it has written since is never thrown away."""
    operation, plan = pending.operation, pending.operation.plan
    shrinks = plan.get("shrinks", ())
    problem, never_ran = None, False
    # A domain that was off, and has run ever since, is somebody's by now.
    in_use = handle.isActive() and not is_recent(operation, time.time())
    if not handle.isActive():
        domain = read_domain(handle)
        if not starts_again(operation, domain.state.reason, saved=domain.managed_save):
            return (
                f"left off, with its new size: it was switched off since ({domain.state.reason}){_kept_beside(shrinks)}"
            )
        ran = has_run(operation)
        try:
            handle.create()
        except libvirt.libvirtError as error:
            if not handle.isActive():
                problem = message_of(error)
                never_ran = not ran
    if problem is None and plan["judge"] and plan.get("rollback", True):
        problem = health.wait_until_well(handle, plan["health_command"], plan["health_timeout"])
    if problem is None:
        restart.keep(handle, pending, leave_running=in_use)
        return "found well with its new size" if plan.get("rollback", True) else "left running with its new size"
    if shrinks and not never_ran:
        raise _not_well(handle, "on its smaller disks", problem, shrinks)
    if not plan.get("rollback", True) and operation.reached("health"):
        return f"left with its new size, but {problem}"
    if not restart.is_as_written(handle, plan):
        return f"left as it is, since its definition was changed, but {problem}{_kept_beside(shrinks)}"
    if in_use:
        raise _not_well(handle, "with its new size", problem)
    return _taken_back(plan, restart.roll_back(connection, pending))


def _way_back(connection: Any, handle: Any, pending: Journal) -> str:
    """The run had found the domain not well, and was on its way back to the old size."""
    operation, plan = pending.operation, pending.operation.plan
    shrinks = plan.get("shrinks", ())
    if not operation.reached("start-old"):
        began = operation.last("rollback") or {"at": 0}
        if handle.isActive() and (operation.reached("put-back") or not is_recent(operation, time.time())):
            # It was stopped, and somebody has started it since; or has made it well.
            if any(shrinking.swapped(shrink) for shrink in shrinks):
                return _started_by_somebody(handle, pending)
            restart.take_definition_back(connection, handle, plan)
            return "left running: it was started since; the next start has the old size"
        if not handle.isActive() and shrinking.written_since(shrinks, began["at"] + _SHUTDOWN_SECONDS):
            return _started_by_somebody(handle, pending)
    if not handle.isActive() and not restart.is_as_written(handle, plan):
        return f"left off: its definition was changed since{_kept_beside(shrinks)}"
    if not handle.isActive() and was_switched_off(operation, read_domain(handle).state.reason):
        return "left off, with its old size: it was switched off since"
    return _taken_back(plan, restart.roll_back(connection, pending))


def _taken_back(plan: Mapping[str, Any], problem: str | None) -> str:
    where = "runs" if plan.get("was_running", True) else "is off"
    return f"taken back: it {where} with its old definition{_but(problem)}"


def has_run(operation: Operation) -> bool:
    """Whether a domain that is off may have run with its new size since the run was about to start it."""
    start = operation.last("start") or {"at": 0}
    shrinks = operation.plan.get("shrinks", ())
    return operation.reached("health") or shrinking.written_since(shrinks, start["at"] + _CLOCK_SECONDS)


def starts_again(operation: Operation, reason: str, *, saved: bool = False) -> bool:
    """Whether a domain that is off, ``reason`` by libvirt, goes on with the size that it was, or was about to be, started with.

    Not one that ran and was shut down since; but one that was off is started to prove itself, however it ended.
    """
    if saved:
        return False
    if not operation.plan.get("was_running", True):
        return True
    return reason in power.ENDED_BY_ITSELF and not (operation.reached("health") and reason == "shutdown")


def was_switched_off(operation: Operation, reason: str) -> bool:
    """Whether a domain that is off, ``reason`` by libvirt, has run with its old size again and was shut down since.

    One that had shut down by itself before the way back, and does it again, cannot be told from one that was not started.
    """
    again = operation.last("start-old")
    return again is not None and reason == "shutdown" and again.get("ended") != "shutdown"


def patience(operation: Operation, now: float) -> float:
    """Seconds for which a guest that the run told to shut down is waited for: as long as the run itself would have waited."""
    timeout = float(operation.plan["shutdown_timeout"])
    told = float((operation.last("shutdown") or {"at": now})["at"])
    return min(timeout, max(told + timeout - now, _SHUTDOWN_SECONDS))


def is_recent(operation: Operation, now: float) -> bool:
    """Whether the interrupted run could itself be judging the domain still: nobody relies on it yet."""
    return bool(now - operation.steps[-1]["at"] <= operation.plan["health_timeout"] + _MARGIN_SECONDS)


def _kept_beside(shrinks: Sequence[Mapping[str, Any]]) -> str:
    kept = ", ".join(shrink["kept"] for shrink in shrinks if shrinking.swapped(shrink))
    return f"; its disks as they were before are kept as {kept}" if kept else ""


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
    """Somebody, and no run, has started it on the smaller copies; what it has written is on them."""
    plan = pending.operation.plan
    if not handle.isActive():
        return f"left off: it was started on its smaller disks since{_kept_beside(plan['shrinks'])}"
    problem = health.wait_until_well(handle, plan["health_command"], plan["health_timeout"])
    if problem is not None:
        raise _not_well(handle, "on its smaller disks", problem, plan["shrinks"])
    shrinking.drop_originals(plan["shrinks"])
    return "found well with its smaller disks"


def _not_well(handle: Any, how: str, problem: str, shrinks: Sequence[Mapping[str, Any]] = ()) -> VmkeeperError:
    state = "It runs" if handle.isActive() else "It is off"
    return VmkeeperError(
        f"Domain {handle.name()!r} was started {how} and is not well: {problem}",
        state=f"{state}{_kept_beside(shrinks)}; nothing was taken back, since it may have written since.",
        advice="See that it becomes well, or shut it down, and run this again",
    )


#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS = {OPERATION: settle}
