# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How points leave a chain so that those that stay keep their content at every instant. Pure.

Disks are looked at one by one, since those of one point may have different pasts.  Where an image that stays stands on
images that go, one of three things is done to it:

- *rebase*: it takes over what differs from the nearest image below that stays. Cost: what the images that go hold.
- *fold*: there is none below; what it holds, and what lies between, is written into the oldest image that goes, which then
  takes its place. Cost: what it holds, however large the full and long the chain is.
- *copy*: a second one with the same full below (a fork) takes over everything. Rare, and as large as the full.
- *pour*: where any of them is compressed or encrypted, which the tools behind the others would undo or cannot open. Layer
  by layer, what each holds is copied into the lowest image that goes, as it is stored, and that takes its place. Cost: as
  of a fold, also in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._errors import Refused
from .manifest import Point, StoredDisk

REBASE = "rebase"
FOLD = "fold"
COPY = "copy"
POUR = "pour"

#: How the lowest image that goes becomes the one that stays.
REPLACING = (FOLD, POUR)

#: qcow2's own tables, for each image that is written.
_TABLES = 1 << 20


@dataclass(frozen=True)
class Merge:
    """What is done to the image of disk ``target`` in the point ``point``.

    ``through``: the points that go and that it stands on, from the top down. ``onto``: the point that it stands on
    afterwards, None for a full. ``needed``: most bytes that it takes on the filesystem while the old files are there.
    """

    how: str
    point: str
    target: str
    through: tuple[str, ...]
    onto: str | None
    needed: int

    @property
    def ground(self) -> str:
        """The lowest of the points that go."""
        return self.through[-1]


@dataclass(frozen=True)
class RemovalPlan:
    """``points`` go, oldest first; ``merges`` come before, in this order.

    ``most_freed``: most bytes that the images can take less afterwards. What lies beside them is not counted.
    """

    points: tuple[Point, ...]
    merges: tuple[Merge, ...]
    most_freed: int

    @property
    def needed(self) -> int:
        """Most bytes that are needed at any time before anything is freed."""
        folds = [merge.needed for merge in self.merges if merge.how in REPLACING]
        return sum(merge.needed for merge in self.merges if merge.how not in REPLACING) + max(folds, default=0)


def plan_removal(staying: Sequence[Point], leaving: Sequence[Point]) -> RemovalPlan:
    """Plan the removal of ``leaving``.

    Raises :class:`Refused` where an image that stays stands on a chain that is not whole: nothing can be merged into it.
    """
    points = {point.id: point for point in (*staying, *leaving)}
    going = {point.id for point in leaving}
    rebased: list[Merge] = []
    copies: list[Merge] = []
    replaced: list[Merge] = []
    heads: dict[tuple[str, str], list[Merge]] = {}
    for point in staying:
        for disk in point.disks:
            if disk.parent not in going:
                continue
            through, onto = _way_down(points, going, point, disk)
            layers = [_stored(points, identifier, disk) for identifier in through]
            held = sum(layer.stored_bytes for layer in layers)
            written = disk.stored_bytes + held - layers[-1].stored_bytes
            how = REBASE if onto is not None else FOLD
            if any(layer.coded for layer in (disk, *layers)):
                how = POUR
            needed = min(held if how == REBASE else written, disk.virtual_size) + _TABLES
            heads.setdefault((disk.target, through[-1]), []).append(
                Merge(how, point.id, disk.target, through, onto, needed)
            )
    kept_files = 0
    for (target, ground), found in sorted(heads.items()):
        if len(found) > 1 and any(merge.how == POUR for merge in found):
            raise _forked(ground, target, [merge.point for merge in found])
        if found[0].how == REBASE:
            rebased += found
            continue
        # All but the cheapest get copies first: what is written into the full is right for one of them only.
        *copied, last = sorted(found, key=lambda merge: (-merge.needed, merge.point))
        for merge in copied:
            disk = _stored(points, merge.point, target)
            copies.append(Merge(COPY, merge.point, target, merge.through, None, disk.virtual_size + _TABLES))
        replaced.append(last)
        merged = [_stored(points, identifier, target) for identifier in (last.point, *last.through[:-1])]
        full = _stored(points, ground, target).stored_bytes
        kept_files += full - min(full, sum(_cleared(disk) for disk in merged))
        kept_files -= _stored(points, last.point, target).stored_bytes
    return RemovalPlan(
        tuple(sorted(leaving, key=lambda point: point.sequence)),
        (*rebased, *copies, *replaced),
        max(0, sum(point.stored_bytes for point in leaving) - kept_files),
    )


def _cleared(disk: StoredDisk) -> int:
    """Most bytes that a full takes less, its own image apart, when this one is written into it.

    Zeros, and what compresses better, give back what the full held there.
    """
    return max(0, disk.changed_bytes - max(0, disk.stored_bytes - _TABLES))


def _stored(points: dict[str, Point], identifier: str, disk: StoredDisk | str) -> StoredDisk:
    target = disk if isinstance(disk, str) else disk.target
    found = points[identifier].disk(target) if identifier in points else None
    if found is None:
        raise Refused(f"Point {identifier} does not hold disk {target!r}")
    return found


def _way_down(
    points: dict[str, Point], going: set[str], point: Point, disk: StoredDisk
) -> tuple[tuple[str, ...], str | None]:
    """The points that go below an image, from the top down, and the first below them that stays."""
    through: list[str] = []
    below = disk.parent
    while below in going:
        holder = points[below].disk(disk.target)
        if holder is None or below in through:
            raise _broken(point, disk, below, "which does not hold it")
        through.append(below)
        below = holder.parent
    line = [point.id]
    ground = below
    while ground is not None:
        holder = points[ground].disk(disk.target) if ground in points else None
        if holder is None or ground in line:
            raise _broken(point, disk, ground, "which is missing or damaged")
        line.append(ground)
        ground = holder.parent
    return tuple(through), below


def _forked(ground: str, target: str, heads: Sequence[str]) -> Refused:
    return Refused(
        f"Points {', '.join(heads)} all stand on point {ground} with disk {target!r}, which is compressed or encrypted; only one"
        " point could take its place",
        advice=f"Remove all of them but one first, or keep point {ground}",
        points=list(heads),
    )


def _broken(point: Point, disk: StoredDisk, where: str, why: str) -> Refused:
    return Refused(
        f"Disk {disk.target!r} of point {point.id} stands on point {where}, {why}; so nothing can be merged into it",
        advice=f"Remove point {point.id} first: it cannot be restored",
        point=point.id,
        missing=where,
    )
