# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Points and repositories as data for people: what can be restored, what it costs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import InvalidInput, NotFound, Refused
from ..safety import places
from ..safety.space import free_bytes
from . import manifest
from .manifest import Point
from .repository import History, Repository

_GIB = float(1 << 30)
_MONTH_SECONDS = 30 * 86400.0


@dataclass(frozen=True)
class Filters:
    """Which points are wanted; None and empty mean all. ``domains`` are names or UUIDs as backed up."""

    domains: tuple[str, ...] = ()
    tags: Mapping[str, str] | None = None
    before: datetime.datetime | None = None
    after: datetime.datetime | None = None

    def want(self, point: Point) -> bool:
        """Whether the point passes."""
        return (
            (not self.domains or point.domain in self.domains or point.domain_uuid in self.domains)
            and all(point.tags.get(key) == value for key, value in (self.tags or {}).items())
            and (self.before is None or point.created_at < self.before)
            and (self.after is None or point.created_at > self.after)
        )

    def may_want(self, domain_uuid: str, history: History) -> bool:
        """Whether a point of the domain that cannot be read may be one of those that are wanted."""
        names = {point.domain for point in history.points}
        return not self.domains or not names or domain_uuid in self.domains or not names.isdisjoint(self.domains)


def time_option(value: str | None, what: str) -> datetime.datetime | None:
    """An option that is an ISO 8601 time with zone."""
    if value is None:
        return None
    try:
        return manifest.parse_time(value)
    except ValueError as error:
        raise InvalidInput(
            f"{what} {value!r} is not a time: {error}", advice="Use ISO 8601 with a zone, such as 2026-11-20T20:15:00Z"
        ) from error


def trouble(repository: Repository, history: History, point: Point) -> str | None:
    """Why a point cannot be restored, as far as a look at the directory tells; None when all files are there."""
    for disk in point.disks:
        try:
            for holder in history.lineage(point, disk.target):
                path = os.path.join(repository.point_directory(point.domain_uuid, holder.id), disk.file)
                if not os.path.isfile(path):
                    return f"{path} is missing"
        except Refused as error:
            return error.problem
    return None


def restorable(repository: Repository, history: History) -> list[Point]:
    """The points whose files are all there, oldest first."""
    return [point for point in history.points if trouble(repository, history, point) is None]


def gib_months(stored: int, created: datetime.datetime, now: datetime.datetime) -> float:
    """What keeping a point has cost so far: its GiB times its age in months of 30 days."""
    age = max(0.0, (now - created).total_seconds())
    return round(stored / _GIB * age / _MONTH_SECONDS, 4)


def list_points(
    repository: Repository, filters: Filters, now: datetime.datetime
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """``restore_points`` and ``broken`` of the module.

    What cannot be read has no name, tags or time: it is left out only where its domain's other points show that it was not asked for.
    """
    found: list[dict[str, Any]] = []
    broken: list[dict[str, str]] = []
    for uuid in repository.domain_uuids():
        history = repository.history(uuid)
        if filters.may_want(uuid, history):
            broken += [{"id": one.id, "domain_uuid": uuid, "problem": one.problem} for one in history.broken]
        found += [describe(repository, history, point, now) for point in history.points if filters.want(point)]
    return found, broken


def describe(repository: Repository, history: History, point: Point, now: datetime.datetime) -> dict[str, Any]:
    """One point, with what the directory and the clock add to its manifest."""
    directory = repository.point_directory(point.domain_uuid, point.id)
    problem = trouble(repository, history, point)
    return {
        **point.as_result(),
        "path": directory,
        "chain": [holder.id for holder in _longest(history, point)],
        "children": history.children(point.id),
        "restorable": problem is None,
        "problem": problem,
        "age_seconds": round((now - point.created_at).total_seconds()),
        "gib_months": gib_months(point.stored_bytes, point.created_at, now),
        "verified": recorded_proof(directory),
    }


def _longest(history: History, point: Point) -> Sequence[Point]:
    longest: Sequence[Point] = [point]
    for disk in point.disks:
        try:
            lineage = history.lineage(point, disk.target)
        except Refused:
            continue
        longest = max(longest, lineage, key=len)
    return longest


def recorded_proof(directory: str) -> dict[str, Any] | None:
    """What the last proof of the point in ``directory`` has found; None when there was none."""
    try:
        content = places.read_json(os.path.join(directory, "verify.json"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def describe_repository(repository: Repository, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``repository`` of the module; sums are over the points listed."""
    return {
        "path": repository.path,
        "uuid": repository.uuid,
        "points": len(points),
        "stored_bytes": sum(point["stored_bytes"] for point in points),
        "gib_months": round(sum(point["gib_months"] for point in points), 4),
        "free_bytes": free_bytes(repository.path),
    }


@dataclass(frozen=True)
class Found:
    """A point that was asked for, with all the others of its domain."""

    history: History
    point: Point


def find_point(
    repository: Repository,
    *,
    identifier: str | None = None,
    source: str | None = None,
    before: datetime.datetime | None = None,
) -> Found:
    """The point with an id, or the latest (before a time) of the domain that was called ``source`` or has that UUID.

    ``latest`` is by sequence, since clocks lie; ``before`` can only go by the recorded time.
    """
    histories = {uuid: repository.history(uuid) for uuid in repository.domain_uuids()}
    if identifier is not None:
        for history in histories.values():
            point = history.point(identifier)
            if point is not None and (source is None or source in (point.domain, point.domain_uuid)):
                return Found(history, point)
            for broken in history.broken:
                if broken.id == identifier:
                    raise Refused(
                        f"Point {identifier} is damaged: {broken.problem}",
                        advice=_alternatives(repository, history),
                    )
        raise NotFound(
            f"There is no point {identifier!r} in {repository.path}" + (f" of domain {source!r}" if source else ""),
            advice="backup_info lists them",
            existing=sorted(point.id for history in histories.values() for point in history.points)[-20:],
        )
    matching = {
        uuid: history
        for uuid, history in histories.items()
        if uuid == source or any(point.domain == source for point in history.points)
    }
    if not matching:
        raise NotFound(
            f"There is no point of domain {source!r} in {repository.path}",
            advice="backup_info lists what there is",
            existing=sorted({point.domain for history in histories.values() for point in history.points}),
        )
    if len(matching) > 1:
        raise InvalidInput(
            f"Several domains were called {source!r}: {', '.join(sorted(matching))}",
            advice="Give the UUID of the one that you mean",
        )
    history = next(iter(matching.values()))
    points = [point for point in history.points if before is None or point.created_at < before]
    if not points:
        raise NotFound(
            f"There is no point of domain {source!r} before {before.isoformat() if before else 'now'}",
            advice="backup_info lists what there is",
            existing=[point.id for point in history.points],
        )
    return Found(history, points[-1])


def find_again(repository: Repository, found: Found) -> Found:
    """The same point as it is now. Call it under the lock of the domain's points: a removal may have folded some meanwhile."""
    return find_point(repository, identifier=found.point.id, source=found.point.domain_uuid)


def _alternatives(repository: Repository, history: History) -> str:
    whole = restorable(repository, history)
    if not whole:
        return "No other point of this domain can be restored"
    return "What can still be restored: " + ", ".join(point.id for point in whole)


def require_restorable(repository: Repository, found: Found) -> None:
    """Raise, naming the break and what can still be restored, when a point's chain is not whole."""
    problem = trouble(repository, found.history, found.point)
    if problem is not None:
        raise Refused(
            f"Point {found.point.id} cannot be restored: {problem}",
            advice=_alternatives(repository, found.history),
            restorable=[point.id for point in restorable(repository, found.history)],
        )
