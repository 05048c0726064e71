# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The images of stored disks, as QEMU's programs open them: which layers, and whether a passphrase opens them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from .._errors import InvalidInput
from ..hypervisor import qemu_img
from ..hypervisor.image_node import Image, Passphrase
from .manifest import Point
from .repository import History, Repository


def image_path(repository: Repository, point: Point, target: str) -> str:
    """The image of a disk in a point."""
    return os.path.join(repository.point_directory(point.domain_uuid, point.id), f"{target}.qcow2")


def image_of(repository: Repository, point: Point, target: str, passphrase: Passphrase | None) -> Image:
    """One layer; raises :class:`InvalidInput` when it is encrypted and there is no passphrase."""
    disk = point.disk(target)
    encrypted = disk is not None and disk.encryption is not None
    if encrypted and passphrase is None:
        raise InvalidInput(
            f"Disk {target!r} of point {point.id} is encrypted, and no passphrase is given", advice="Give passphrase"
        )
    return Image(image_path(repository, point, target), "qcow2", passphrase if encrypted else None)


def images_of(
    repository: Repository, lineage: Sequence[Point], target: str, passphrase: Passphrase | None
) -> list[Image]:
    """All layers of a disk, from ``lineage[0]`` down to its full."""
    return [image_of(repository, point, target, passphrase) for point in lineage]


def images_below(
    repository: Repository, history: History, parent: str | None, target: str, passphrase: Passphrase | None
) -> list[Image]:
    """All layers that an image of the disk stands on whose point's parent is ``parent``; none below a full."""
    point = history.point(parent) if parent is not None else None
    return [] if point is None else images_of(repository, history.lineage(point, target), target, passphrase)


def require_opening(
    repository: Repository, point: Point, targets: Iterable[str], passphrase: Passphrase | None, *, advice: str
) -> None:
    """Raise :class:`InvalidInput`, before anything is changed, unless the passphrase opens these disks of a point.

    All layers of a chain have one passphrase, so the topmost one speaks for them.
    """
    for target in targets:
        image = image_of(repository, point, target, passphrase)
        if image.passphrase is not None and not qemu_img.opens(image):
            # Right where a libvirt secret has one; else the mark of a variable that was written with one too many.
            ends = ", which ends with a line break," if image.passphrase.value.endswith((b"\r", b"\n")) else ""
            raise InvalidInput(f"The passphrase{ends} does not open disk {target!r} of point {point.id}", advice=advice)


def is_encrypted(lineage: Sequence[Point], target: str) -> bool:
    """Whether any layer of a disk needs a passphrase."""
    return any(disk.encryption is not None for point in lineage if (disk := point.disk(target)) is not None)
