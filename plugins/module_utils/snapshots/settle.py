# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo a snapshot that was interrupted.

A cut that is proved to be what was wanted is kept and labelled; anything else is taken back, so that the same task makes
a good one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..hypervisor import block_jobs, power
from ..hypervisor.connection import explaining, find_by_uuid, open_connection
from ..hypervisor.domain_model import read_state
from ..safety import consistency, processes, release
from ..safety import ticket as tickets
from ..safety.journal import Journal, Operation, peek
from . import retract
from .model import Labels, by_name, read_snapshots, write_labels
from .plan import TakePlan

OPERATION = "snapshot"


def intention(plans: Sequence[TakePlan], quiesce: str) -> dict[str, Any]:
    """What the journal must know to finish or undo these plans."""
    return {
        "name": plans[0].name,
        "quiesce": quiesce,
        "domains": {
            plan.domain.uuid: {
                "overlays": [asdict(overlay) for overlay in plan.overlays],
                "memory_file": plan.memory_file,
                "nvram": plan.nvram.path if plan.nvram else None,
                "memory": plan.memory,
                "freeze": plan.freeze or plan.standing,
                "shutdown": plan.shutdown,
                "running": plan.domain.state.active,
                "state": [plan.domain.state.name, plan.domain.state.reason],
                "labels": plan.labels(plan.expected_level, None, None).to_text(),
            }
            for plan in plans
        },
    }


@dataclass(frozen=True)
class Found:
    """What an interrupted run left of one domain's snapshot.

    ``held``: proved frozen after the cut, before any guard thawed.  ``in_time``: all cuts of the group were done before the
    guard let any guest run on.
    """

    exists: bool
    wanted_frozen: bool
    held: bool
    in_time: bool


def worth_keeping(found: Sequence[Found]) -> bool:
    """Keep a cut only if every domain has it, as consistent as it was meant to be, and a group's at one instant. Pure."""
    one_instant = len(found) == 1 or all(one.in_time for one in found)
    return one_instant and all(one.exists and (one.held or not one.wanted_frozen) for one in found)


def settle(uri: str, pending: Journal) -> dict[str, str]:
    """Finish or undo one interrupted snapshot; returns ``{what, action}``."""
    operation = pending.operation
    name = operation.plan["name"]
    connection = open_connection(uri)
    for uuid in operation.plan["domains"]:
        release.release_orphans(uuid)
        handle = find_by_uuid(connection, uuid)
        if handle is not None:
            block_jobs.wait_idle(handle)
    phases = _phases(operation)
    found = {uuid: _found(connection, operation, uuid, phases) for uuid in operation.plan["domains"]}
    action = "taken back"
    if _keeps(operation, found.values()):
        for uuid, plan in operation.plan["domains"].items():
            _finish(connection.lookupByUUIDString(uuid), operation, uuid, plan, phases, found[uuid].held)
        start_again(connection, operation)
        pending.finish()
        action = "finished"
    elif kept := undo(uri, pending):
        action = (
            f"kept as crash-consistent on {', '.join(kept)}, where the security profile of the running guest denies to"
            " merge its layers back"
        )
    return {"what": f"an interrupted snapshot {name!r}", "action": action}


def _keeps(operation: Operation, found: Iterable[Found]) -> bool:
    # An undo that was begun has written to the bases: what is left of the snapshot is no snapshot any more.
    return worth_keeping(list(found)) and not operation.reached("undo")


def doomed(connection: Any, uuid: str) -> str | None:
    """For check mode: the name of the domain's interrupted snapshot that the real run would first take back."""
    operation = peek(uuid)
    if operation is None or operation.kind != OPERATION:
        return None
    phases = _phases(operation)
    found = [_found(connection, operation, one, phases) for one in operation.plan["domains"]]
    return None if _keeps(operation, found) else str(operation.plan["name"])


def _phases(operation: Operation) -> dict[str, float]:
    armed = operation.last("armed")
    moments = tickets.phases_of(armed["ticket"]) if armed else {}
    return {name: moment.monotonic for name, moment in moments.items()}


def _found(connection: Any, operation: Operation, uuid: str, phases: Mapping[str, float]) -> Found:
    plan = operation.plan["domains"][uuid]
    handle = find_by_uuid(connection, uuid)
    exists = handle is not None and by_name(read_snapshots(handle), operation.plan["name"]) is not None
    judged = operation.reached("label")  # the run had all the evidence, and found every cut good, before it died
    fired = phases.get("fired", float("inf"))

    def before_fired(phase: str) -> bool:
        return phase in phases and phases[phase] <= fired

    return Found(exists, plan["freeze"], judged or before_fired(f"held:{uuid}"), judged or before_fired("cut-done"))


def _finish(
    handle: Any,
    operation: Operation,
    uuid: str,
    plan: Mapping[str, Any],
    phases: Mapping[str, float],
    held: bool,
) -> None:
    labels = Labels.from_text(plan["labels"])
    snapshot = by_name(read_snapshots(handle), operation.plan["name"])
    if labels is None or snapshot is None or snapshot.labels is not None:
        return
    level = labels.consistency
    labelled = operation.last("label")
    if labelled is not None:
        level = labelled["levels"][uuid]
    elif level in consistency.QUIESCED:
        level = "filesystem" if held else "crash"
    frozen_ms = None
    if plan["freeze"] and "thawed" in phases and "freeze" in phases:
        frozen_ms = round((phases["thawed"] - phases["freeze"]) * 1000)
    kept = replace(labels, consistency=level, frozen_ms=frozen_ms, paused_ms=None)
    write_labels(handle, snapshot.name, kept, state="The snapshot exists, without its labels; run this again.")


def undo(uri: str, pending: Journal) -> list[str]:
    """Take back whatever of the operation exists, on every domain of the group.

    Returns the names of the domains whose snapshot stays, because nothing may be written below its overlays: it is labelled
    as crash-consistent, whatever it was meant to be.
    """
    operation = pending.operation
    pending.step("undo")
    connection = open_connection(uri)  # the one that failed may be dead
    kept: list[str] = []
    for uuid, plan in operation.plan["domains"].items():
        handle = find_by_uuid(connection, uuid)
        if handle is None:
            continue
        block_jobs.wait_idle(handle)
        foreign = {step["path"] for step in operation.steps if step["name"] == "not-ours"}
        overlays = [overlay for overlay in plan["overlays"] if overlay["path"] not in foreign]
        beside = [path for path in (plan["memory_file"], plan.get("nvram")) if path]
        try:
            retract.take_back(handle, operation.plan["name"], overlays, beside)
        except retract.CannotTakeBack:
            if not _keep_as_crash(handle, operation.plan["name"], plan):
                raise
            kept.append(handle.name())
    start_again(connection, operation)
    pending.finish()
    return kept


def _keep_as_crash(handle: Any, name: str, plan: Mapping[str, Any]) -> bool:
    """Label a cut that cannot be taken back with the least that it is; False where libvirt has no record of it."""
    labels = Labels.from_text(plan["labels"])
    if labels is None or by_name(read_snapshots(handle), name) is None:
        return False
    labels = replace(labels, consistency="crash", frozen_ms=None, paused_ms=None)
    write_labels(handle, name, labels, state="The snapshot exists, without its labels; run this again.")
    return True


def start_again(connection: Any, operation: Operation) -> None:
    """Start what this operation itself has shut down, in this boot; anything else that is off is off for other reasons."""
    if not operation.reached("shutdown") or operation.boot_id != processes.boot_id():
        return
    for uuid, plan in operation.plan["domains"].items():
        handle = find_by_uuid(connection, uuid)
        if handle is None or not plan["shutdown"]:
            continue
        state = read_state(handle)
        if state.active and not operation.reached("shut-off"):
            power.wait_for_late([handle])
            state = read_state(handle)
        if not state.active and state.reason in power.ENDED_BY_ITSELF:
            with explaining(f"Starting domain {handle.name()!r} again", state="It is shut off."):
                handle.create()


#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS = {OPERATION: settle}
