# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove snapshots and merge the layers that they kept apart: what ``state: absent`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..safety import locks, settlement
from ..safety.journal import Journal
from . import merging
from .ground import Ground, read_ground
from .merging import REMOVAL, Merged
from .removal_plan import RemovalPlan, plan_removal
from .settlers import SETTLERS


@dataclass
class Removed:
    """The result for one domain; ``snapshot`` is what it was, None where there was none of that name."""

    domain: str
    changed: bool
    snapshot: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


def remove(
    uri: str,
    handles: Sequence[Any],
    name: str,
    *,
    check: bool = False,
    allow_restart: bool = False,
) -> list[Removed]:
    """See that no domain has the snapshot; every domain is checked before the first is changed."""
    named = [(handle.UUIDString(), handle.name()) for handle in handles]
    if check:
        settlement.settle_before_change(uri, handles, SETTLERS, check=True)
        grounds = [read_ground(handle) for handle in handles]
        return [_result(ground, plan_removal(name, ground, allow_restart=allow_restart), None) for ground in grounds]
    with locks.hold(named, f"removal of snapshot {name!r}"):
        settled = {one["domain"] for one in settlement.settle_before_change(uri, handles, SETTLERS)}
        removed = remove_locked(handles, name, allow_restart=allow_restart)
    for one in removed:
        one.changed = one.changed or one.domain in settled
    return removed


def remove_locked(handles: Sequence[Any], name: str, *, allow_restart: bool = False) -> list[Removed]:
    """:func:`remove` by a caller that holds the locks and has settled what was unfinished."""
    grounds = [read_ground(handle) for handle in handles]
    plans = [plan_removal(name, ground, allow_restart=allow_restart) for ground in grounds]
    return [_run(handle, ground, plan) for handle, ground, plan in zip(handles, grounds, plans)]


def _run(handle: Any, ground: Ground, plan: RemovalPlan | None) -> Removed:
    if plan is None:
        return _result(ground, None, None)
    domain = ground.domain
    journal = Journal.begin(REMOVAL, [(domain.uuid, domain.name)], {"work": plan.work.to_json()})
    return _result(ground, plan, merging.run(handle, plan.work, journal))


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
