# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The chain of images below a disk, followed by our own header parser.

An inactive domain's definition names only its top layer, and a running one's XML may be older than the files; here
the files speak.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from .._errors import Refused, Unsupported, VmkeeperError
from . import image_header
from .domain_model import Disk, Layer
from .image_header import BadHeader, is_qcow2, read_qcow2

#: libvirt's own limit (virstoragefile); a longer chain is a loop or an attack.
MAXIMUM_DEPTH = 200


#: libvirt reads QEMU's answers, in which the images of a chain lie inside each other, with json-c and its limit of 32 levels
#: from 10.8 on, and with no such limit from 12.0 on (NEWS).  Seen on 11.3: 25 layers start, 26 do not.
_NESTED_ANSWERS = ((10, 8, 0), (12, 0, 0))
_MOST_NESTED_LAYERS = 25


def longest_startable(libvirt_version: tuple[int, int, int]) -> int:
    """The number of layers of the longest chain that this libvirt starts a guest on. A running one may have more."""
    first_affected, first_sound = _NESTED_ANSWERS
    return _MOST_NESTED_LAYERS if first_affected <= libvirt_version < first_sound else MAXIMUM_DEPTH


def follow(top: Layer) -> tuple[Layer, ...]:
    """All layers from ``top`` down to the base.

    Only qcow2 layers are followed.  A layer that is declared raw ends the chain even if its bytes look like a qcow2
    header: a guest that owns a raw disk can write one (CVE-2008-2004 and its descendants).
    """
    layers = [top]
    seen = {os.path.realpath(top.path)} if top.path else set()
    while layers[-1].path is not None and layers[-1].format == "qcow2":
        path = layers[-1].path
        header = _read(path, read_qcow2)
        if header.backing_file is None:
            break
        below = _resolve(path, header.backing_file)
        real = os.path.realpath(below)
        if real in seen or len(layers) >= MAXIMUM_DEPTH:
            raise Refused(
                f"The chain of {top.path} comes back to {below}",
                advice="Repair the backing files with qemu-img rebase",
            )
        seen.add(real)
        layers.append(Layer(path=below, format=header.backing_format or _probe(below)))
    return tuple(layers)


def holds_data(path: str) -> bool:
    """:func:`.image_header.holds_data`; raises :class:`Refused` where the image cannot be read."""
    return _read(path, image_header.holds_data)


_Found = TypeVar("_Found")


def _read(path: str, reader: Callable[[str], _Found]) -> _Found:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise Refused(f"The image {path} is missing", advice="Restore it from a backup before anything else") from error
    except (BadHeader, OSError) as error:
        raise Refused(f"The image {path} cannot be read: {error}", advice="Check it with qemu-img check") from error


def below(layer: Layer) -> Layer | None:
    """The layer that a local qcow2 image stands on, whether it is there or not. Raises OSError or BadHeader."""
    header = read_qcow2(layer.path or "")
    if header.backing_file is None:
        return None
    path = _resolve(layer.path or "", header.backing_file)
    return Layer(path=path, format=header.backing_format or _probe(path))


def _resolve(overlay: str, name: str) -> str:
    if name.startswith("json:") or (":" in name.split("/", 1)[0]):
        raise Unsupported(
            f"The image {overlay} stands on {name!r}, which is not a local file",
            advice="Only local chains are handled",
        )
    return os.path.normpath(os.path.join(os.path.dirname(os.path.realpath(overlay)), name))


def _probe(path: str) -> str:
    # An overlay of old qemu-img without a backing format: QEMU would probe, so this is what the guest would see.
    try:
        return "qcow2" if is_qcow2(path) else "raw"
    except OSError:
        return "raw"


def chain_of(disk: Disk) -> tuple[Layer, ...]:
    """The chain of a disk: as libvirt states it for a live disk, else by following the files."""
    if disk.active is None or disk.active.path is None:
        return disk.chain
    if len(disk.chain) > 1:
        last = disk.chain[-1]
        return (*disk.chain[:-1], *follow(last)) if disk.open_ended and last.path is not None else disk.chain
    return follow(disk.active)


def on_devices(top: Layer) -> tuple[Layer, ...]:
    """The layers below an image if one of them is a block device, else none.

    libvirt finds them by itself when it starts a guest.  virt-aa-helper, which then writes the AppArmor profile, may not read
    devices (its own profile denies ``/dev/dm-*`` and the like), so that the guest would not be allowed to, either: these
    chains have to be named in the definition.
    """
    if top.path is None or not os.path.exists(top.path):
        return ()
    try:
        below = follow(top)[1:]
    except VmkeeperError:
        return ()
    found = tuple(replace(layer, kind="block" if _is_device(layer.path) else "file") for layer in below)
    return found if any(layer.kind == "block" for layer in found) else ()


def _is_device(path: str | None) -> bool:
    try:
        return path is not None and stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def depth(disk: Disk) -> int:
    """How many layers the disk has, as far as its images can be read."""
    try:
        return len(chain_of(disk))
    except VmkeeperError:
        return len(disk.chain)


def virtual_size(layer: Layer) -> int | None:
    """Virtual size in bytes of a local image, read from the header or the file's length; None if unknown."""
    if layer.path is None:
        return None
    try:
        if layer.format == "qcow2":
            return read_qcow2(layer.path).virtual_size
        descriptor = os.open(layer.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
    except (OSError, BadHeader):
        return None
