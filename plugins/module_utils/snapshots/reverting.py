# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Go back to a snapshot: what ``state: reverted`` does, from the task's options to its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .._errors import Busy, Conflict, LibvirtFailed
from ..hypervisor.domain_model import read_domain
from ..safety import journal, settlement, space
from ..safety.journal import Operation
from ..safety.turns import in_turn
from . import taking, way_back
from .ground import Ground, read_ground
from .model import Snapshot, by_name, read_snapshots
from .plan import Request as TakeRequest
from .remains import Merged
from .removing import Request as Removal
from .removing import remove
from .resumption import with_resumed
from .revert_plan import Request, RevertPlan, plan_revert
from .settlers import SETTLERS
from .way_back import PENDING


@dataclass
class Reverted:
    """The result for one domain."""

    domain: str
    snapshot: dict[str, Any]
    before: str | None
    warnings: list[str] = field(default_factory=list)


def revert(
    connection: Any, uri: str, handles: Sequence[Any], request: Request, *, check: bool = False
) -> list[Reverted]:
    """Go back on every domain; all of them are checked before the first is touched."""
    named = [(handle.UUIDString(), handle.name()) for handle in handles]
    if check:
        settlement.settle_before_change(uri, handles, SETTLERS, check=True)
        grounds = [_read(handle, request) for handle in handles]
        _check_keeping(request, grounds)
        return [_result(ground, plan_revert(request, ground), None) for ground in grounds]
    over = _over_already(uri, handles, named, request)
    going = [handle for handle in handles if handle.UUIDString() not in over]
    if request.keep_present_as:
        _keep_present(connection, uri, going, request)
    alone = len(handles) == 1

    def go_back(handle: Any, ground: Ground) -> Reverted:
        plan = replace(plan_revert(request, ground), alone=alone)
        return _result(ground, plan, way_back.run(handle, ground, plan))

    with settlement.hold(named, f"revert to snapshot {request.name!r}"):
        settlement.settle_before_change(uri, handles, SETTLERS)
        grounds = [_read(handle, request) for handle in going]
        plans = [plan_revert(request, ground) for ground in grounds]
        _check_kept(request, grounds)
        space.require([need for plan in plans for need in plan.needs()], f"Going back to snapshot {request.name!r}")
        results = in_turn(going, grounds, go_back, read=lambda handle: _read(handle, request))
        for handle in handles:
            if request.keep_present_as:
                way_back.unmark(handle, request.keep_present_as)
    done = {handle.UUIDString(): result for handle, result in zip(going, results)}
    return [done.get(handle.UUIDString()) or _result_of_earlier(handle, request) for handle in handles]


def _read(handle: Any, request: Request) -> Ground:
    return with_resumed(handle, read_ground(handle), request.name)


def _over_already(uri: str, handles: Sequence[Any], named: Sequence[tuple[str, str]], request: Request) -> set[str]:
    """Settle what was interrupted; the domains (UUIDs) that an earlier try of this very task has brought back, or has now.

    To go back once more would keep the snapshot's state under the name that keeps what was before it.  Without
    ``keep_present_as`` a guest that ran on meanwhile goes back again: that is what was asked.
    """
    over = set()
    with settlement.hold(named, f"revert to snapshot {request.name!r}"):
        same = {
            uuid
            for handle, (uuid, _name) in zip(handles, named)
            if (operation := journal.peek(uuid)) is not None
            and _is_same_task(operation, request)
            and (request.keep_present_as or not operation.reached("start") or not handle.isActive())
        }
        findings = settlement.settle_before_change(uri, handles, SETTLERS)
        finished = {one["domain"] for one in findings if one["action"] == way_back.FINISHED}
        over = {uuid for uuid, name in named if uuid in same and name in finished}
        for handle, (uuid, _name) in zip(handles, named):
            if request.keep_present_as and _kept_and_gone_back(request, read_snapshots(handle)):
                over.add(uuid)
    return over


def _is_same_task(operation: Operation, request: Request) -> bool:
    return (
        operation.kind == way_back.OPERATION
        and operation.plan["snapshot"] == request.name
        and operation.plan["kept_as"] == request.keep_present_as
    )


def _kept_and_gone_back(request: Request, snapshots: Sequence[Snapshot]) -> bool:
    """Whether an earlier try of a group's task brought this one of its domains back before it was interrupted."""
    name = str(request.keep_present_as)
    return _is_pending(by_name(snapshots, name), request) and way_back.has_gone_back(snapshots, name)


def _is_pending(kept: Snapshot | None, request: Request) -> bool:
    return kept is not None and kept.labels is not None and kept.labels.tags.get(PENDING) == request.name


# --- keeping the present ---------------------------------------------------------------------------------------------


def _check_keeping(request: Request, grounds: Sequence[Ground]) -> None:
    """The name for the present must be free, or be that of an earlier try which was interrupted."""
    name = request.keep_present_as
    for ground in grounds:
        found = by_name(ground.snapshots, name) if name else None
        if found is not None and not _is_pending(found, request):
            raise Conflict(
                f"Domain {ground.domain.name!r} has a snapshot {name!r} already, so the present cannot be kept under that name",
                advice="Choose another keep_present_as",
            )


def _keep_present(connection: Any, uri: str, handles: Sequence[Any], request: Request) -> None:
    """Take a snapshot of the present, by which it can be gone back to like any other."""
    grounds = [_read(handle, request) for handle in handles]
    _check_keeping(request, grounds)
    name = str(request.keep_present_as)
    for handle, ground in zip(handles, grounds):
        plan = plan_revert(request, ground)  # what would be refused after the snapshot is refused before it
        if by_name(ground.snapshots, name) is not None:
            # An earlier try took it and went no further; the guest has moved on since.
            remove(uri, [handle], Removal(name))
        wanted = TakeRequest(
            name=name,
            mode="internal" if plan.internal else "external",
            memory=plan.internal,
            description=f"kept before reverting to {request.name}",
            tags={PENDING: request.name},
        )
        taking.take(connection, uri, [handle], wanted)


def _check_kept(request: Request, grounds: Sequence[Ground]) -> None:
    for ground in grounds:
        current = next((one.name for one in ground.snapshots if one.current), None)
        if request.keep_present_as and current != request.keep_present_as:
            raise Busy(
                f"Domain {ground.domain.name!r} was changed by somebody else between the snapshot {request.keep_present_as!r}"
                " of its present and the revert",
                state="The snapshot was taken; nothing else was done.",
                advice="Look at snapshot_info, then run this again",
            )


# --- the result ------------------------------------------------------------------------------------------------------


def _result_of_earlier(handle: Any, request: Request) -> Reverted:
    """Of a domain that was back already when this task began: what was thrown away then is no longer known."""
    domain, snapshots = read_domain(handle), read_snapshots(handle)
    snapshot = by_name(snapshots, request.name)
    if snapshot is None:
        raise LibvirtFailed(f"Snapshot {request.name!r} has gone", state="Somebody removed it.")
    held = snapshot.memory_mode != "no"
    guest = (
        (
            "paused"
            if domain.state.name == "paused"
            else "resumed"
            if held and domain.state.reason != "booted"
            else "booted"
        )
        if domain.state.active
        else "shut off"
    )
    return Reverted(
        domain=domain.name,
        before=request.keep_present_as,
        snapshot={
            **snapshot.as_result(domain.name),
            "current": True,
            "discarded": [],
            "removed": [],
            "nvram_restored": snapshot.nvram is not None,
            "kept_present_as": request.keep_present_as,
            "checkpoints_ended": [],
            "guest": guest,
        },
        warnings=[
            f"{domain.name}: an interrupted revert to snapshot {request.name!r} was finished; nothing else was done"
        ],
    )


def _result(ground: Ground, plan: RevertPlan, done: Merged | None) -> Reverted:
    snapshot = by_name(ground.snapshots, plan.snapshot)
    if snapshot is None:
        raise LibvirtFailed(f"Snapshot {plan.snapshot!r} has gone", state="Somebody removed it.")
    current = next((one.name for one in ground.snapshots if one.current), None)
    before = {overlay.target: ground.in_use(overlay.target)[:1] for overlay in plan.overlays}
    warnings = []
    if done is not None:
        warnings += [f"{path} was kept: it is needed by {reason}" for path, reason in done.kept.items()]
    warnings += [f"{path} is no longer used by domain {ground.domain.name!r} and was left" for path in plan.left]
    if plan.checkpoints_ended:
        warnings.append(
            f"{ground.domain.name}: checkpoints made after the snapshot have ended ({', '.join(plan.checkpoints_ended)});"
            " the next incremental backup is a full one"
        )
    held = {disk.target for disk in snapshot.captured}
    others = [
        disk.target
        for disk in ground.domain.disks
        if disk.target not in held and disk.device == "disk" and not disk.readonly
    ]
    if others:
        warnings.append(
            f"{ground.domain.name}: the snapshot does not hold {', '.join(others)}, which stays as it is today"
            + (", while the guest's memory is of the snapshot" if plan.start.startswith("resume") else "")
        )
    if ground.domain.nvram is not None and plan.nvram is None and not plan.internal:
        warnings.append(f"{ground.domain.name}: the UEFI variables stay as they are today")
    return Reverted(
        domain=ground.domain.name,
        before=current,
        snapshot={
            **snapshot.as_result(ground.domain.name),
            "current": True,
            "discarded": []
            if plan.kept_as
            else [
                {"disk": target, "path": path, "since": current} for target, paths in before.items() for path in paths
            ],
            "removed": list(plan.discarded) if done is None else list(done.removed),
            "nvram_restored": plan.nvram is not None,
            "kept_present_as": plan.kept_as,
            "checkpoints_ended": list(plan.checkpoints_ended),
            "guest": {"resume": "resumed", "resume-paused": "paused", "boot": "booted", "off": "shut off"}[plan.start],
        },
        warnings=warnings,
    )
