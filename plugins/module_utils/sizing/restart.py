# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restart a domain on another definition, and return to the old one if it is not well then."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from .._errors import Refused, VmkeeperError
from ..hypervisor import health, power
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import explaining, find_domain, message_of
from ..hypervisor.definition import define, persistent_xml
from ..hypervisor.domain_model import read_domain
from ..safety.journal import Journal
from . import shrinking
from .definition import is_resized

#: The old size is known to boot: it gets time whatever the task allowed the new one.
_OLD_SIZE_SECONDS = 300.0


#: What is true of a guest that does not shut down: for its restart, and when one that was off has proved its smaller disks.
_GOES_ON = "It goes on running, unless it is late and still shuts down; its next start has its old size."
_STAYS_ON = "It is well with its smaller disks and goes on running, unless it is late and still shuts down."


class RolledBack(VmkeeperError):
    """The new size did not work; the domain runs, or lies, as it was before."""

    kind = "rolled_back"


def restart(connection: Any, handle: Any, journal: Journal, new_xml: str) -> int:
    """Define ``new_xml``, shut down, start, check; returns the downtime in milliseconds.

    A definition that libvirt refuses is refused while the guest still runs, untouched.  The downtime runs from the request
    to shut down until the guest is well again.
    """
    plan = journal.operation.plan
    if new_xml != plan["old_xml"]:
        journal.step("define")
        define(
            connection,
            new_xml,
            doing=f"Defining domain {handle.name()!r} with its new size",
            state="Its definition is as it was.",
        )
    began = time.monotonic()
    journal.step("shutdown")
    try:
        shut_down(handle, plan["shutdown_timeout"], state=_GOES_ON)
        # Looked at again, under the lock: saved RAM would resume on other hardware.
        if read_domain(handle).managed_save:
            raise Refused(
                f"Domain {handle.name()!r} was saved meanwhile",
                advice="Start it, then run this again",
                state="Its definition is as it was; it is saved, not running.",
            )
    except VmkeeperError:
        if connection.isAlive():  # else the whole restart is settled over another one
            _define_old(connection, handle, plan)
        raise
    _shrink(connection, handle, journal)
    journal.step("start")
    in_use = False
    try:
        handle.create()
    except libvirt.libvirtError as error:
        in_use = handle.isActive()  # somebody was faster; it is judged like one that this run has started
        if not in_use:
            # It has never run with this size, so there is nothing that rollback: false could keep.
            raise _rolled_back(connection, handle, journal, message_of(error), began) from error
        _check_disks(handle, journal)
    journal.step("health")
    if not plan["judge"]:
        return _milliseconds_since(began)
    problem = health.wait_until_well(handle, plan["health_command"], plan["health_timeout"])
    if problem is None:
        downtime = _milliseconds_since(began)
        keep(handle, journal, leave_running=in_use)
        return downtime
    if not plan["rollback"]:
        raise VmkeeperError(
            f"Domain {handle.name()!r} is not well with its new size: {problem}",
            state="It has its new definition (rollback: false).",
            advice="Look at its console, or run this again with the old size",
            restarted=True,
            rolled_back=False,
        )
    raise _rolled_back(connection, handle, journal, problem, began)


def _define_old(connection: Any, handle: Any, plan: Mapping[str, Any]) -> None:
    define(
        connection,
        plan["old_xml"],
        doing=f"Defining domain {handle.name()!r} with its old size",
        state="It has its new definition.",
    )


def is_as_written(handle: Any, plan: Mapping[str, Any]) -> bool:
    """Whether the domain's definition is the one from before the interrupted run, or the one that it stored: nobody's since."""
    if not handle.isPersistent():
        return False
    now = persistent_xml(handle)
    return now == plan["old_xml"] or is_resized(plan["old_xml"], now, plan.get("new_xml") or now)


def take_definition_back(connection: Any, handle: Any, plan: Mapping[str, Any]) -> None:
    """The old definition in the place of the one that the interrupted run stored; what somebody has changed since stays."""
    if is_as_written(handle, plan) and persistent_xml(handle) != plan["old_xml"]:
        _define_old(connection, handle, plan)


def _milliseconds_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)


def _shrink(connection: Any, handle: Any, journal: Journal) -> None:
    """Smaller copies of disks in the originals' places; the domain is off. Where it cannot be, the domain runs as before."""
    plan = journal.operation.plan
    shrinks = plan.get("shrinks", ())
    copied = []
    try:
        for shrink in shrinks:
            journal.step("shrink", target=shrink["target"])
            copied.append((shrink, shrinking.make_copy(shrink, doing=shrink["doing"])))
        # Copying has taken minutes, in which nothing kept anybody from starting the domain.
        for shrink, written in copied:
            if handle.isActive() or os.stat(shrink["path"]).st_mtime_ns != written:
                raise Refused(
                    f"{shrink['doing']}: somebody has started the domain while it was copied",
                    advice="See that nothing else starts it (a cluster manager, a watchdog), then run this again",
                )
        for shrink in shrinks:
            journal.step("swap", target=shrink["target"])
            shrinking.swap(shrink)
    except (VmkeeperError, OSError) as error:
        shrinking.put_back(shrinks)
        _define_old(connection, handle, plan)
        state = "It is off, with its disks as they were."
        if handle.isActive():
            state = "It runs, with its disks as they were."
        elif plan["was_running"]:
            with explaining(
                f"Starting domain {handle.name()!r} again", state="It is off, with its disks as they were."
            ):
                handle.create()
            state = "It was started again, with its disks as they were."
        journal.finish()
        if isinstance(error, VmkeeperError):
            error.now(state)
        raise


def _check_disks(handle: Any, journal: Journal) -> None:
    """Raise where the domain runs on an original, which somebody started it on: it keeps its place then."""
    shrinks = journal.operation.plan.get("shrinks", ())
    used = shrinking.return_used(shrinks) if handle.isActive() else []
    if not used:
        return
    if not any(shrinking.swapped(shrink) for shrink in shrinks):
        journal.finish()  # nothing is left to be settled
    raise Refused(
        f"Domain {handle.name()!r} was started by somebody before its smaller disks had their place",
        state=f"It runs with its new definition; {', '.join(used)} {'has its' if len(used) == 1 else 'have their'} old size.",
        advice="See that nothing else starts it (a cluster manager, a watchdog), then run this again",
    )


def keep(handle: Any, journal: Journal, *, leave_running: bool = False) -> None:
    """The domain is well: what was kept for the way back goes, and one that was off is shut down again, unless somebody uses it."""
    plan = journal.operation.plan
    if not plan.get("shrinks"):
        return
    _check_disks(handle, journal)
    journal.step("drop")
    shrinking.drop_originals(plan["shrinks"])
    if not plan["was_running"] and not leave_running:
        journal.step("stop")
        shut_down(handle, plan["shutdown_timeout"], state=_STAYS_ON)


def shut_down(handle: Any, seconds: float, *, state: str) -> None:
    """Ask the guest to shut down and wait; it goes on running when it does not, which is what ``state`` says."""
    if power.shut_down([handle], seconds=seconds, state=state):
        raise VmkeeperError(
            f"Domain {handle.name()!r} did not shut down within {seconds:.0f} s",
            state=state,
            advice="See that the guest reacts to the ACPI power button or has its agent running, or give more shutdown_timeout",
        )


def _rolled_back(connection: Any, handle: Any, journal: Journal, problem: str, began: float) -> RolledBack:
    again = roll_back(connection, journal)
    name = handle.name()
    running = journal.operation.plan.get("was_running", True)
    started = "it was started again" if running else "it is off again"
    return RolledBack(
        f"Domain {name!r} is not well with its new size: {problem}",
        state=f"Its old definition is back{', its old disks are,' if journal.operation.plan.get('shrinks') else ''}"
        f" and {started}{'' if again is None else f', but {again}'}.",
        advice="Choose another size; its serial console may say what it lacked",
        restarted=True,
        rolled_back=True,
        downtime_ms=round((time.monotonic() - began) * 1000),
    )


def roll_back(connection: Any, journal: Journal) -> str | None:
    """The old definition, and the domain running on it; None when it is well then, else what is missing."""
    plan = journal.operation.plan
    domain = journal.operation.domains[0]
    handle = find_domain(connection, domain["uuid"])
    if not (journal.operation.reached("start-old") and handle.isActive()):
        _return(connection, handle, journal)
    return wait_for_old_size(handle, plan) if plan.get("was_running", True) else None


def wait_for_old_size(handle: Any, plan: Mapping[str, Any]) -> str | None:
    """None when the domain is well with its old size, or nobody can tell, else what is missing.

    The agent alone is asked: health_command may speak of what only the new size would have made true.
    """
    if not plan["judge"]:
        return None
    return health.wait_until_well(handle, None, max(plan["health_timeout"], _OLD_SIZE_SECONDS))


def _return(connection: Any, handle: Any, journal: Journal) -> None:
    journal.step("rollback")
    if handle.isActive():
        # It is not well, so it is not asked to shut down.
        with explaining(f"Stopping domain {handle.name()!r}", state="It has its new definition."):
            handle.destroy()
    journal.step("put-back")
    shrinking.put_back(journal.operation.plan.get("shrinks", ()))
    _define_old(connection, handle, journal.operation.plan)
    if not journal.operation.plan.get("was_running", True):
        return
    journal.step("start-old", ended=read_domain(handle).state.reason)
    with explaining(f"Starting domain {handle.name()!r} again", state="It is shut off, with its old definition."):
        handle.create()
