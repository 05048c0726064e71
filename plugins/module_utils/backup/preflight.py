# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is seen to before a backup begins, and what is said of the points it will make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import NoSpace
from ..safety import places, reservation, space, targets
from . import manifest, stored
from .manifest import Point, StoredDisk
from .plan import REASONS, Facts, PointPlan, Request, must_stage
from .repository import Repository


@dataclass
class Made:
    """The result for one domain."""

    point: dict[str, Any]
    changed: bool
    warnings: list[str] = field(default_factory=list)


def scratch_directory(
    request: Request, repository: Repository, plans: Sequence[PointPlan], owner: tuple[int, int], *, check: bool
) -> str | None:
    """Where QEMU writes to, when that is not the repository."""
    if not must_stage(request, plans, local=targets.is_local(repository.path)):
        if any(plan.live for plan in plans):
            targets.check(repository.path, owner, "repository")
        return None
    if request.scratch is None and not check:
        places.passable_directory(places.SCRATCH)
    directory = request.scratch or places.SCRATCH
    while request.scratch is None and check and not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    if request.scratch is not None or not check:
        targets.check(directory, owner, "scratch directory")
    return directory


def require_opening(repository: Repository, facts: Sequence[Facts], plans: Sequence[PointPlan]) -> None:
    """An increment is written with the passphrase of what it stands on, or not at all."""
    for one, plan in zip(facts, plans):
        for disk in plan.disks:
            parent = one.history.point(disk.parent) if disk.parent else None
            if parent is not None:
                stored.require_opening(
                    repository,
                    parent,
                    [disk.target],
                    disk.passphrase,
                    advice="Give the passphrase of that point, or type: full to begin a new chain with this one",
                )


def require_space(repository: Repository, plans: Sequence[PointPlan], kept_free: int, scratch: str | None) -> None:
    """Refuse before anything is written what would not fit."""
    pushing = scratch or repository.path
    needs = [(repository.path, sum(plan.estimate for plan in plans))]
    if scratch is not None:
        needs.insert(0, (scratch, sum(plan.estimate for plan in plans if plan.live)))
    pushed = sum(len(plan.disks) for plan in plans if plan.live)
    least = kept_free
    for directory, needed in space.total_by_filesystem(needs).items():
        free = space.free_bytes(directory)
        on_it = pushed if os.stat(directory).st_dev == os.stat(pushing).st_dev else 0
        kept_free = least * reservation.share_of(on_it, directory)
        if free < needed + kept_free:
            what = "repository" if directory == repository.path else "scratch directory"
            raise NoSpace(
                f"The {what} {directory} has {space.human(free)} free; this backup may need {space.human(needed)} there,"
                f" and {space.human(kept_free)} stay free so that no write of a guest can fail",
                advice="Make room there, or remove old points",
                path=directory,
                needed=needed + kept_free,
                free=free,
            )


def predict(plan: PointPlan, request: Request) -> Made:
    """What check mode answers."""
    point = Point(
        id="",
        sequence=plan.sequence,
        domain=plan.domain.name,
        domain_uuid=plan.domain.uuid,
        created="",
        type=plan.type,
        reason=REASONS[plan.reason],
        parent=plan.parent,
        consistency=plan.expected_level,
        disks=tuple(
            StoredDisk(
                disk.target,
                disk.type,
                REASONS[disk.reason],
                disk.parent,
                disk.facts.size,
                disk.estimate,
                0,
                compression=disk.compression,
                encryption=manifest.LUKS if disk.passphrase is not None else None,
            )
            for disk in plan.disks
        ),
        description=request.description or "",
        tags=request.tags or {},
        protected=request.protected,
        not_captured=tuple(part.as_result() for part in plan.capture.left_out),
        stored_bytes=plan.estimate,
    )
    result = {**point.as_result(), "id": None, "created": None, "verified": None}
    return Made(result, changed=True, warnings=warnings_of(plan, request, plan.expected_level, plan.why_not_frozen))


def warnings_of(plan: PointPlan, request: Request, level: str, why_not_frozen: str | None) -> list[str]:
    """What the operator should know of a point."""
    warnings = []
    left_out = plan.capture.warning(plan.domain.name)
    if left_out:
        warnings.append(left_out)
    if level == "crash":
        warnings.append(f"{plan.domain.name}: the point is only crash-consistent: {_why_crash(plan, why_not_frozen)}")
    asked = request.compression is not None
    uncompressed = [disk.target for disk in plan.disks if asked and disk.facts.disk.encrypted]
    if uncompressed:
        warnings.append(
            f"{plan.domain.name}: {', '.join(uncompressed)} is encrypted in the guest's own image, and stays so uncompressed"
        )
    opened = [disk.target for disk in plan.disks if disk.reason == "encryption changed" and disk.passphrase is None]
    if opened:
        warnings.append(
            f"{plan.domain.name}: {', '.join(opened)} is stored in the clear, while the points before are encrypted"
        )
    full = [
        disk for disk in plan.disks if disk.parent is None and disk.reason in ("raw", "old qcow2", "transient domain")
    ]
    if full:
        warnings.append(
            f"{plan.domain.name}: always full: " + ", ".join(f"{disk.target} ({REASONS[disk.reason]})" for disk in full)
        )
    return warnings


def _why_crash(plan: PointPlan, why_not_frozen: str | None) -> str:
    if plan.domain.managed_save:
        return "it has a saved state, whose memory is not part of the point"
    if not plan.domain.state.running:
        return f"it was {plan.domain.state.name} ({plan.domain.state.reason})"
    return why_not_frozen or "it was not frozen"
