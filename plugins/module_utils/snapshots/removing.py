# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove snapshots and merge the layers that they kept apart: what ``state: absent`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..hypervisor.connection import open_connection
from ..safety import long_operation, settlement
from ..safety.journal import Journal
from ..safety.long_operation import Answer, Operation, Waiting
from ..safety.turns import in_turn
from . import merging
from .ground import Ground, read_ground
from .merging import REMOVAL
from .remains import Merged
from .removal_plan import RemovalPlan, plan_removal
from .settlers import SETTLERS, within


@dataclass
class Removed:
    """The result for one domain; ``snapshot`` is what it was, None where there was none of that name."""

    domain: str
    changed: bool
    snapshot: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """The task's options, checked. ``bandwidth`` in bytes per second, 0 for no limit."""

    name: str
    allow_restart: bool = False
    bandwidth: int = 0


def remove(
    uri: str, handles: Sequence[Any], request: Request, *, check: bool = False, seconds: float | None = None
) -> list[Removed]:
    """See that no domain has the snapshot; every domain is checked before the first is changed.

    ``seconds`` limits the wait for each live job, which goes on all the same.
    """
    named = [(handle.UUIDString(), handle.name()) for handle in handles]
    if check:
        settlement.settle_before_change(uri, handles, SETTLERS, check=True)
        return [_result(ground, _plan(request, ground), None) for ground in map(read_ground, handles)]
    with settlement.hold(named, f"removal of snapshot {request.name!r}"):
        settled = {one["domain"] for one in settlement.settle_before_change(uri, handles, within(seconds))}
        grounds = [read_ground(handle) for handle in handles]
        for ground in grounds:
            _plan(request, ground)
        removed = in_turn(
            handles,
            grounds,
            lambda handle, ground: _run(handle, uri, ground, _plan(request, ground), seconds),
            read=read_ground,
        )
    for one in removed:
        one.changed = one.changed or one.domain in settled
    return removed


def _plan(request: Request, ground: Ground) -> RemovalPlan | None:
    return plan_removal(request.name, ground, allow_restart=request.allow_restart, bandwidth=request.bandwidth)


def _run(handle: Any, uri: str, ground: Ground, plan: RemovalPlan | None, seconds: float | None) -> Removed:
    if plan is None:
        return _result(ground, None, None)
    domain = ground.domain
    journal = Journal.begin(REMOVAL, [(domain.uuid, domain.name)], {"work": plan.work.to_json()})
    return _result(ground, plan, merging.run(handle, uri, plan.work, journal, seconds=seconds))


def start(uri: str, handles: Sequence[Any], request: Request) -> Answer:
    """Let a worker do it; what can be refused is refused now. The answer has a ``job`` unless there is nothing to do."""

    def here(check: bool) -> Answer:
        return as_result(remove(uri, handles, request, check=check))

    domains = [(handle.UUIDString(), handle.name()) for handle in handles]
    operation = Operation(REMOVAL, "snapshots.removing", {"domains": domains, "request": asdict(request)})
    return long_operation.run(operation, uri, lambda: domains, here, Waiting(wait=False))


def work(uri: str, request: Mapping[str, Any]) -> Answer:
    """What the worker does."""
    connection = open_connection(uri)
    handles = [connection.lookupByUUIDString(uuid) for uuid, _name in request["domains"]]
    return as_result(remove(uri, handles, Request(**request["request"])))


def as_result(removed: Sequence[Removed]) -> Answer:
    """What the task answers."""
    return {
        "changed": any(one.changed for one in removed),
        "snapshots": [one.snapshot for one in removed if one.snapshot is not None],
        "warnings": [warning for one in removed for warning in one.warnings],
    }


def _result(ground: Ground, plan: RemovalPlan | None, merged: Merged | None) -> Removed:
    if plan is None:
        return Removed(ground.domain.name, changed=False)
    warnings = [
        f"{ground.domain.name}, disk {layer['disk']}: {layer['path']} stays for "
        + ", ".join(f"{reader['kind']} {reader['name']}" for reader in layer["for"])
        for layer in plan.kept
    ]
    warnings += plan.notes
    if merged is not None:
        warnings += [f"{path} was kept: it is needed by {reason}" for path, reason in merged.kept.items()]
    files = list(plan.work.files)
    return Removed(
        ground.domain.name,
        changed=True,
        snapshot={
            **plan.snapshot.as_result(ground.domain.name),
            "layer_kept_for": list(plan.kept),
            "merged": [
                {"disk": merge.target, "method": plan.methods[merge.target], "why": merge.why}
                for merge in plan.work.merges
            ],
            "removed": files if merged is None else list(merged.removed),
        },
        warnings=warnings,
    )
