# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo a snapshot that was interrupted.

A cut that is proved to be what was wanted is kept and labelled; anything else is taken back, so that the same task makes
a good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..hypervisor import block_jobs
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, explaining, open_connection
from ..hypervisor.domain_model import read_state
from ..safety import consistency, release
from ..safety import ticket as tickets
from ..safety.journal import Journal
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
    """What an interrupted run left of one domain's snapshot."""

    exists: bool
    wanted_frozen: bool
    held: bool


def worth_keeping(found: Sequence[Found]) -> bool:
    """Keep a cut only if every domain of the group has it, as consistent as it was meant to be. Pure."""
    return all(one.exists and (one.held or not one.wanted_frozen) for one in found)


def settle(uri: str, pending: Journal) -> dict[str, str]:
    """Finish or undo one interrupted snapshot; returns ``{what, action}``."""
    operation = pending.operation
    name = operation.plan["name"]
    armed = operation.last("armed")
    phases = tickets.phases_of(armed["ticket"]) if armed else {}
    connection = open_connection(uri)
    judged = operation.reached("label")  # the run had all the evidence, and found every cut good, before it died
    found = {}
    for uuid, plan in operation.plan["domains"].items():
        release.release_orphans(uuid)
        handle = _lookup(connection, uuid)
        if handle is None:
            found[uuid] = Found(False, plan["freeze"], False)
            continue
        block_jobs.wait_idle(handle)
        held = f"held:{uuid}" in phases and phases[f"held:{uuid}"] <= phases.get("fired", float("inf"))
        found[uuid] = Found(by_name(read_snapshots(handle), name) is not None, plan["freeze"], held or judged)
    keep = worth_keeping(list(found.values()))
    if keep:
        for uuid, plan in operation.plan["domains"].items():
            _finish(
                connection.lookupByUUIDString(uuid),
                name,
                plan,
                operation.last("label"),
                uuid,
                phases,
                found[uuid].held,
            )
        _start_again(connection, operation.plan["domains"])
        pending.finish()
    else:
        undo(uri, pending)
    if armed:
        tickets.forget(armed["ticket"])
    return {"what": f"an interrupted snapshot {name!r}", "action": "finished" if keep else "taken back"}


def _finish(
    handle: Any,
    name: str,
    plan: Mapping[str, Any],
    labelled: Mapping[str, Any] | None,
    uuid: str,
    phases: Mapping[str, float],
    held: bool,
) -> None:
    labels = Labels.from_text(plan["labels"])
    snapshot = by_name(read_snapshots(handle), name)
    if labels is None or snapshot is None or snapshot.labels is not None:
        return
    level = labels.consistency
    if labelled is not None:
        level = labelled["levels"][uuid]
    elif level in consistency.QUIESCED:
        level = "filesystem" if held else "crash"
    frozen_ms = None
    if plan["freeze"] and "thawed" in phases and "freeze" in phases:
        frozen_ms = round((phases["thawed"] - phases["freeze"]) * 1000)
    kept = Labels(level, frozen_ms, None, labels.mode_reason, labels.tags, labels.not_captured)
    write_labels(handle, name, kept, state="The snapshot exists, without its labels; run this again.")


def undo(uri: str, pending: Journal) -> None:
    """Take back whatever of the operation exists, on every domain of the group."""
    operation = pending.operation
    pending.step("undo")
    connection = open_connection(uri)  # the one that failed may be dead
    for uuid, plan in operation.plan["domains"].items():
        handle = _lookup(connection, uuid)
        if handle is None:
            continue
        block_jobs.wait_idle(handle)
        retract.take_back(handle, operation.plan["name"], plan["overlays"], plan["memory_file"])
    _start_again(connection, operation.plan["domains"])
    pending.finish()


def _lookup(connection: Any, uuid: str) -> Any:
    """The domain, or None when it is gone: undefined meanwhile, or transient and stopped. Its files are then left alone."""
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _start_again(connection: Any, plans: Mapping[str, Mapping[str, Any]]) -> None:
    for uuid, plan in plans.items():
        handle = _lookup(connection, uuid)
        if handle is not None and plan["shutdown"] and not read_state(handle).active:
            with explaining(f"Starting domain {handle.name()!r} again", state="It is shut off."):
                handle.create()


#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS = {OPERATION: settle}
