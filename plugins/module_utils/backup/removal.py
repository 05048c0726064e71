# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove a restore point that nothing stands on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .._errors import Refused
from ..safety import places
from . import checkpoints, settle
from .manifest import Point
from .repository import GONE, Repository, discard


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
