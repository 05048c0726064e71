# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which points of a domain stay, and why. Pure.

The rules are those of Proxmox Backup Server (https://pbs.proxmox.com/docs/maintenance.html and its prune simulator):

- The options are worked through in the order last, hourly, daily, weekly, monthly, yearly, each from the newest point to
  the oldest. Of each period the newest point is kept, until the option has kept as many as it may. Periods without a
  point do not count.
- A period that already has a point kept by an option before is passed over; it does not count either.
- A point that an option passed in favour of a newer one of the same period is not looked at by later options.
- Weeks are those of ISO 8601. Periods are of the local time zone of the host that prunes.
- Protected points stay and count nowhere.

One thing is our own: what cannot be restored stays, too, and counts nowhere, so that it never takes the place of a point
that can.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .manifest import Point, newest_first

Clock = Callable[[datetime.datetime], datetime.datetime]

#: Option -> how its periods are called (strftime), in the order in which the options are worked through.
PERIODS = {"hourly": "%Y-%m-%d %H h", "daily": "%Y-%m-%d", "weekly": "%G-W%V", "monthly": "%Y-%m", "yearly": "%Y"}


@dataclass(frozen=True)
class Keep:
    """How many points each option keeps; 0 when it is not given."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def __bool__(self) -> bool:
        return any((self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly))


@dataclass(frozen=True)
class Kept:
    """A point that stays. ``why`` is for people."""

    point: Point
    why: str

    def as_result(self) -> dict[str, str]:
        """``{id, domain, why}``."""
        return {"id": self.point.id, "domain": self.point.domain, "why": self.why}


@dataclass(frozen=True)
class Plan:
    """Both newest first."""

    kept: tuple[Kept, ...]
    removed: tuple[Point, ...]


def host_time(moment: datetime.datetime) -> datetime.datetime:
    """A time in the host's own zone, with the daylight saving that held then."""
    return moment.astimezone()


def select(points: Sequence[Point], keep: Keep, clock: Clock = host_time) -> dict[str, str]:
    """Id -> why, of those points that the options keep. ``points`` are newest first."""
    kept: dict[str, str] = {}
    passed: set[str] = set()
    for point in points[: keep.last]:
        kept[point.id] = f"keep_last: {len(kept) + 1} of {keep.last}"
    for option, name in PERIODS.items():
        most: int = getattr(keep, option)
        periods = {point.id: clock(point.created_at).strftime(name) for point in points}
        covered = {periods[identifier] for identifier in kept}
        own: set[str] = set()
        for point in points:
            period = periods[point.id]
            if point.id in kept or point.id in passed or period in covered:
                continue
            if period in own:
                passed.add(point.id)
            elif len(own) < most:
                own.add(period)
                kept[point.id] = f"keep_{option}: the newest of {period}, {len(own)} of {most}"
            else:
                break
    return kept


def plan_retention(
    points: Sequence[Point],
    keep: Keep,
    *,
    damaged: Mapping[str, str],
    grounds: Mapping[str, Sequence[str]],
    fold: bool,
    clock: Clock = host_time,
) -> Plan:
    """What stays and what goes of one domain's points.

    ``damaged``: id -> what is wrong, of points that cannot be restored; what they stand on stays, too, since nothing can
    be merged into them. ``grounds``: id -> what cannot even be read as a point and stands on it. Without ``fold`` nothing
    is merged at all: a point goes only when none stands on it. Order is by ``sequence``, periods are by the recorded
    time: clocks lie, and the latest point is the one that was made last.
    """
    ordered = newest_first(points)
    why = {point.id: f"damaged, and not counted: {damaged[point.id]}" for point in ordered if point.id in damaged}
    why.update({point.id: "protected, and not counted" for point in ordered if point.protected and point.id not in why})
    why.update(select([point for point in ordered if point.id not in why], keep, clock))
    # From the top down, so that each says which kept ones stand on it.
    above = {identifier: list(broken) for identifier, broken in grounds.items()}
    for point in ordered:
        stays = point.id in why
        if not stays and point.id in above:
            why[point.id] = f"{', '.join(above[point.id])} {_stands(above[point.id])} on it" + (
                " and cannot be merged" if fold else " (fold: never)"
            )
            stays = True
        if stays and (not fold or point.id in damaged):
            for parent in point.parents:
                above.setdefault(parent, []).append(point.id)
    return Plan(
        tuple(Kept(point, why[point.id]) for point in ordered if point.id in why),
        tuple(point for point in ordered if point.id not in why),
    )


def _stands(ids: Sequence[str]) -> str:
    return "stands" if len(ids) == 1 else "stand"
