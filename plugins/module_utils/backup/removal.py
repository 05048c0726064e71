# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove a restore point that nothing stands on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from .._errors import NotFound, Refused
from ..hypervisor.connection import find_domain
from ..safety import locks, places, settlement
from . import checkpoints, settle, settlers
from .manifest import Point
from .repository import GONE, History, Repository, discard, open_repository, sweep


def refuse_removal(point: Point, children: Sequence[str]) -> None:
    """Raise where removing the point would hurt."""
    if point.protected:
        raise Refused(f"Point {point.id} of domain {point.domain!r} is protected", advice="It stays until it is not")
    if children:
        raise Refused(
            f"Point {point.id} of domain {point.domain!r} is what {', '.join(children)} stands on",
            advice="Remove the newer points first",
            children=list(children),
        )


def remove(connection: Any, repository: Repository, point: Point) -> None:
    """Remove a point. Call it with the lock of the domain's points held alone.

    One rename ends its existence; what an interruption leaves after that is swept by the next run.
    """
    handle = settle.find(connection, point.domain_uuid)
    if handle is not None and point.checkpoint:
        # First, so that no increment can begin at a point that is gone.
        checkpoints.remove(handle, [point.checkpoint])
    gone = os.path.join(repository.domain_directory(point.domain_uuid), GONE + point.id)
    os.rename(repository.point_directory(point.domain_uuid, point.id), gone)
    places.fsync_directory(repository.domain_directory(point.domain_uuid))
    discard(gone)


def remove_by_id(
    connection: Any, uri: str, path: str, domain: str, identifier: str, *, check: bool = False
) -> dict[str, Any] | None:
    """``state: absent``: remove the point, of a domain that may be gone; returns it, or None when it was not there."""
    repository = open_repository(path)
    handle = _find(connection, domain)
    uuid = handle.UUIDString() if handle is not None else _uuid_of(repository, domain)
    if uuid is None:
        return None
    name = handle.name() if handle is not None else domain
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(locks.hold([(uuid, name)], f"removing restore point {identifier}"))
            stack.enter_context(repository.locked(uuid, f"removing restore point {identifier}"))
            sweep(repository, uuid)
        if handle is not None:
            settlement.settle_before_change(uri, [handle], settlers.SETTLERS, check=check)
        history: History = repository.history(uuid)
        point = history.point(identifier)
        if point is None:
            return None
        refuse_removal(point, history.children(identifier))
        if not check:
            remove(connection, repository, point)
        return point.as_result()


def _find(connection: Any, domain: str) -> Any | None:
    try:
        return find_domain(connection, domain)
    except NotFound:
        return None


def _uuid_of(repository: Repository, domain: str) -> str | None:
    for uuid in repository.domain_uuids():
        if domain == uuid or any(point.domain == domain for point in repository.history(uuid).points):
            return uuid
    return None
