# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shorten the chains of a domain: what ``blockcommit`` does."""

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
from .commit_plan import CommitPlan, Request, plan_commit
from .ground import Ground, read_ground
from .merging import COMMIT
from .remains import Merged
from .settlers import SETTLERS, within


@dataclass
class Committed:
    """The result for one domain."""

    domain: str
    disks: list[dict[str, Any]]
    snapshots_ended: list[str]
    changed: bool
    warnings: list[str] = field(default_factory=list)


def commit(
    uri: str, handles: list[Any], request: Request, *, check: bool = False, seconds: float | None = None
) -> list[Committed]:
    """Shorten every domain's chains; all of them are checked before the first is touched."""
    named = [(handle.UUIDString(), handle.name()) for handle in handles]
    if check:
        settlement.settle_before_change(uri, handles, SETTLERS, check=True)
        return [_result(plan_commit(request, ground), ground, None) for ground in map(read_ground, handles)]
    with settlement.hold(named, "blockcommit"):
        settled = settlement.settle_before_change(uri, handles, within(seconds))
        resumed = {finding["domain"] for finding in settled}
        grounds = [read_ground(handle) for handle in handles]
        for ground in grounds:
            plan_commit(request, ground)
        done = in_turn(
            handles,
            grounds,
            lambda handle, ground: _run(handle, uri, ground, plan_commit(request, ground), seconds),
            read=read_ground,
        )
    for one in done:
        if one.domain in resumed:
            one.changed = True
    return done


def _run(handle: Any, uri: str, ground: Ground, plan: CommitPlan, seconds: float | None) -> Committed:
    if not plan.work.merges:
        return _result(plan, ground, Merged())
    domain = ground.domain
    journal = Journal.begin(COMMIT, [(domain.uuid, domain.name)], {"work": plan.work.to_json()})
    merged = merging.run(handle, uri, plan.work, journal, seconds=seconds)
    return _result(plan, ground, merged)


def _result(plan: CommitPlan, ground: Ground, merged: Merged | None) -> Committed:
    disks = []
    for target, layers in plan.chains:
        merge = next((one for one in plan.work.merges if one.target == target), None)
        gone = [path for path in merge.gone if path in plan.work.files] if merge else []
        disks.append(
            {
                "disk": target,
                "chain_before": [layer.path for layer in layers],
                "chain_after": list(plan.after(target)),
                "method": plan.methods.get(target),
                "why": merge.why if merge else "",
                "committed_bytes": merged.committed_bytes.get(target, 0) if merged else None,
                "removed": [path for path in gone if merged is None or path in merged.removed],
            }
        )
    warnings = [*plan.notes]
    if merged:
        warnings += [f"{path} was kept: it is needed by {reason}" for path, reason in merged.kept.items()]
    return Committed(
        domain=ground.domain.name,
        disks=disks,
        snapshots_ended=list(plan.work.ended),
        changed=bool(plan.work.merges),
        warnings=warnings,
    )


def start(uri: str, handles: list[Any], request: Request) -> Answer:
    """Let a worker do it; what can be refused is refused now. The answer has a ``job`` unless there is nothing to do."""

    def here(check: bool) -> Answer:
        return as_result(commit(uri, handles, request, check=check))

    domains = [(handle.UUIDString(), handle.name()) for handle in handles]
    operation = Operation(COMMIT, "snapshots.committing", {"domains": domains, "request": asdict(request)})
    return long_operation.run(operation, uri, lambda: domains, here, Waiting(wait=False))


def work(uri: str, request: Mapping[str, Any]) -> Answer:
    """What the worker does."""
    connection = open_connection(uri)
    handles = [connection.lookupByUUIDString(uuid) for uuid, _name in request["domains"]]
    options = dict(request["request"])
    options["disks"] = tuple(options["disks"]) if options["disks"] is not None else None
    return as_result(commit(uri, handles, Request(**options)))


def as_result(done: Sequence[Committed]) -> Answer:
    """What the task answers."""
    return {
        "changed": any(one.changed for one in done),
        "disks": [{"domain": one.domain, **disk} for one in done for disk in one.disks],
        "snapshots_ended": [{"domain": one.domain, "name": name} for one in done for name in one.snapshots_ended],
        "warnings": [warning for one in done for warning in one.warnings],
    }
