# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove restore points in whatever position: those that stay restore as before, at every instant."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import Conflict, NoSpace, NotFound, Refused, VmkeeperError
from ..hypervisor.connection import find_by_uuid, find_domain
from ..hypervisor.image_node import Passphrase
from ..safety import settlement
from ..safety.journal import Journal
from . import folding, settle, settlers
from .folding_plan import RemovalPlan, plan_removal
from .manifest import Point
from .repository import BrokenPoint, History, Repository, open_repository, put_away, sweep


@dataclass(frozen=True)
class Subject:
    """The domain whose points are removed; ``handle`` is None when it is not defined here any more."""

    uuid: str
    name: str
    handle: Any | None = None


def remove_by_id(
    connection: Any,
    uri: str,
    path: str,
    domain: str,
    identifier: str,
    *,
    passphrase: Passphrase | None = None,
    check: bool = False,
) -> dict[str, Any] | None:
    """``state: absent``: remove the point, of a domain that may be gone; returns it, or None when it was not there."""
    repository = open_repository(path)
    subject = find_subject(connection, repository, domain, identifier)
    if subject is None:
        return None
    with alone(uri, repository, subject, f"removing restore point {identifier}", check=check) as finished:
        for gone in finished:
            if gone.id == identifier:
                return gone.as_result()
        history = repository.history(subject.uuid)
        damaged = next((one for one in history.broken if one.id == identifier), None)
        if damaged is not None:
            return _remove_damaged(connection, repository, subject, damaged, check=check)
        point = history.holder(identifier)
        if point is None:
            return None
        if point.protected:
            raise Refused(
                f"Point {point.id} of domain {point.domain!r} is protected", advice="It stays until it is not"
            )
        remove_points(connection, repository, subject, history, [identifier], passphrase=passphrase, check=check)
        return point.as_result()


@contextlib.contextmanager
def alone(
    uri: str, repository: Repository, subject: Subject, operation: str, *, check: bool
) -> Iterator[tuple[Point, ...]]:
    """Settle what was interrupted, and hold the domain and its points here alone. Nothing is held with ``check``.

    Gives the points that went because an interrupted removal was finished.
    """
    with contextlib.ExitStack() as stack:
        if not check:
            _require_writable(repository)
            stack.enter_context(settlement.hold([(subject.uuid, subject.name)], operation))
        before = _all_points(repository.history(subject.uuid))
        settlement.settle_named(uri, [(subject.uuid, subject.name)], settlers.SETTLERS, check=check)
        if not check:
            stack.enter_context(repository.locked(subject.uuid, operation))
            sweep(repository, subject.uuid)
        after = repository.history(subject.uuid)
        yield tuple(point for point in before if after.holder(point.id) is None)


def remove_points(
    connection: Any,
    repository: Repository,
    subject: Subject,
    history: History,
    identifiers: Collection[str],
    *,
    passphrase: Passphrase | None = None,
    check: bool = False,
) -> RemovalPlan:
    """Remove points of one domain, inside :func:`alone`. What an earlier removal left half done goes with them.

    Raises :class:`Refused` before anything was changed where a reader, a damaged point or the room is in the way.
    """
    leaving = [point for point in history.points if point.id in identifiers] + list(history.going)
    plan = plan_removal([point for point in history.points if point not in leaving], leaving)
    if not plan.points:
        return plan
    ids = [point.id for point in plan.points]
    folding.require_unread(connection, repository, subject.uuid, ids)
    folding.require_whole(repository, history, plan)
    folding.require_opening(repository, history, plan, passphrase)
    folding.require_room(repository, plan)
    if check:
        return plan
    journal = Journal.begin(
        settle.REMOVAL,
        [(subject.uuid, subject.name)],
        {
            "repository": repository.path,
            "repository_uuid": repository.uuid,
            "points": ids,
            "checkpoints": [point.checkpoint for point in plan.points if point.checkpoint],
        },
    )
    try:
        settle.carry_out_removal(subject.handle, repository, subject.uuid, journal, passphrase)
    except VmkeeperError as error:
        error.now(_STATE)
        raise
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else VmkeeperError
        raise kind(
            f"Removing points in {repository.path} failed: {error}",
            state=_STATE,
            advice="See to the repository's filesystem, then run this again",
            path=repository.path,
        ) from error
    return plan


_STATE = "What was to be removed is offered no more; every other point restores as before. The next run goes on with the rest."


def _remove_damaged(
    connection: Any, repository: Repository, subject: Subject, damaged: BrokenPoint, *, check: bool
) -> dict[str, Any]:
    """A directory that cannot be read as a point goes when it is named, and when nothing stands on it."""
    folding.require_unread(connection, repository, subject.uuid, [damaged.id])
    history = repository.history(subject.uuid)
    above = history.children(damaged.id) + repository.grounds(subject.uuid, history.broken).get(damaged.id, [])
    if above:
        raise Refused(
            f"Point {damaged.id} is damaged ({damaged.problem}), so nothing can be merged with it, and {', '.join(above)}"
            " stands on it",
            advice="Look at it; remove the newer points first if they are lost with it",
            children=above,
        )
    if not check:
        put_away(repository, subject.uuid, damaged.id)
    return {"id": damaged.id, "domain_uuid": subject.uuid, "problem": damaged.problem}


def _require_writable(repository: Repository) -> None:
    if os.statvfs(repository.path).f_flag & os.ST_RDONLY:
        raise Refused(f"The repository {repository.path} is mounted read-only", advice="Mount it writable")


def find_subject(connection: Any, repository: Repository, domain: str, identifier: str | None = None) -> Subject | None:
    """The domain by name or UUID: as it is defined here, else as it was backed up; None when it has no points.

    With the ``identifier`` of a point it is the one that has it: a domain that was made again has a new UUID, and the points of
    the one that had its name before are still there.
    """

    def has_it(uuid: str) -> bool:
        return identifier is not None and os.path.isdir(repository.point_directory(uuid, identifier))

    here = None
    with contextlib.suppress(NotFound):
        handle = find_domain(connection, domain)
        here = Subject(handle.UUIDString(), handle.name(), handle)
        if identifier is None or has_it(here.uuid):
            return here
    found = [
        uuid
        for uuid in repository.domain_uuids()
        if domain == uuid or any(point.domain == domain for point in _all_points(repository.history(uuid)))
    ]
    found = [uuid for uuid in found if has_it(uuid)] or ([] if here is not None else found)
    if len(found) > 1:
        raise Conflict(
            f"Several domains called {domain!r} were backed up there: {', '.join(found)}",
            advice="Give the UUID of one of them",
            existing=found,
        )
    return subject_of(connection, repository, found[0]) if found else here


def subject_of(connection: Any, repository: Repository, domain_uuid: str) -> Subject:
    """The domain with that UUID, by the name that it has here or had last."""
    handle = find_by_uuid(connection, domain_uuid)
    if handle is not None:
        return Subject(domain_uuid, handle.name(), handle)
    points = _all_points(repository.history(domain_uuid))
    return Subject(domain_uuid, points[-1].domain if points else domain_uuid)


def _all_points(history: History) -> Sequence[Point]:
    return sorted((*history.points, *history.going), key=lambda point: point.sequence)
