# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The chain of images below a disk, followed by our own header parser.

An inactive domain's definition names only its top layer, and a running one's XML may be older than the files; here
the files speak.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from .._errors import Refused, Unsupported, VmkeeperError
from . import image_header
from .domain_model import Disk, Layer
from .image_header import BadHeader, Qcow2Header, is_qcow2, read_qcow2

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
        lower = _backing(path, _read(path, read_qcow2))
        if lower is None:
            break
        real = os.path.realpath(str(lower.path))
        if real in seen or len(layers) >= MAXIMUM_DEPTH:
            raise Refused(
                f"The chain of {top.path} comes back to {lower.path}",
                advice="Repair the backing files with qemu-img rebase",
            )
        seen.add(real)
        layers.append(lower)
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
    return _backing(layer.path or "", read_qcow2(layer.path or ""))


def mentioned(layer: Layer) -> tuple[Layer, ...]:
    """The local files in an image's backing name, where that is none of those that :func:`follow` understands.

    Whatever driver it asks for, QEMU opens no local file whose name is not in it.  So these are all that the image can stand
    on here, and perhaps more: good enough to leave a file alone, not to write one.
    """
    if layer.path is None or layer.format != "qcow2":
        return ()
    try:
        name = read_qcow2(layer.path).backing_file
    except (OSError, BadHeader):
        return ()
    if name is None or _file_of(name) is not None:
        return ()
    words = _strings(_from_json(name)) if name.startswith("json:") else iter([name])
    # ``blkdebug:rules:/images/base``: drivers that are named by a prefix put the file behind a colon.
    names = dict.fromkeys(
        ":".join(parts[n:]) for parts in (word.split(":") for word in words) for n in range(len(parts))
    )
    paths = [_beside(layer.path, one) for one in names if one and "\0" not in one]
    return tuple(Layer(path, _probe(path)) for path in paths if os.path.exists(path) and not os.path.isdir(path))


def data_file(header: Qcow2Header) -> str | None:
    """The local file that holds an image's data, where its header says that another one does.

    A relative name is looked for in the working directory of whoever opens the image (seen with qemu-io 7.2): nobody can tell which.
    """
    found = _file_of(header.data_file) if header.data_file is not None else None
    return found[0] if found is not None and os.path.isabs(found[0]) else None


def _backing(overlay: str, header: Qcow2Header) -> Layer | None:
    if header.backing_file is None:
        return None
    found = _file_of(header.backing_file)
    if found is None:
        raise Unsupported(
            f"The image {overlay} stands on {header.backing_file!r}, which is not a local file, or not by its path alone",
            advice="Only local chains are handled. If it is a local file, name it by its path (qemu-img rebase -u)",
        )
    name, driver = found
    path = _beside(overlay, name)
    # QEMU takes the header's word before that of the name.
    return Layer(path=path, format=header.backing_format or driver or _probe(path))


def _file_of(name: str) -> tuple[str, str | None] | None:
    """The file that a backing name means to QEMU, and the format if it says one; None if it is not just one local file.

    Checked with qemu-io 7.2.  ``file:`` and ``json:`` with a relative path mean one in the working directory of whoever opens
    the image, so that nobody can tell which.
    """
    driver = None
    if name.startswith("json:"):
        options = _from_json(name)
        if not isinstance(options, dict):
            return None
        inner = options.pop("file", None)
        if isinstance(inner, dict):
            options.update({f"file.{key}": value for key, value in inner.items()})
        name, driver = options.pop("file.filename", None), options.pop("driver", None)
        protocol = options.pop("file.driver", "file")
        # Whatever else it says (an offset, a key, another backing file) may make it something else than that file.
        if options or protocol not in ("file", "host_device") or driver not in (None, "qcow2", "raw"):
            return None
        if not isinstance(name, str) or "\0" in name:
            return None
    elif name.startswith("file:"):
        name = name[len("file:") :]
    else:
        return None if ":" in name.split("/", 1)[0] else (name, None)
    return (name, driver) if name.startswith("/") else None


def _from_json(name: str) -> Any:
    try:
        return json.loads(name[len("json:") :])
    except (ValueError, RecursionError):
        return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _beside(overlay: str, name: str) -> str:
    """Where QEMU looks for a relative name: beside the image *as it was named*, which may be a link to one elsewhere."""
    path = os.path.join(os.path.dirname(overlay), name)
    if ".." in path.split("/"):
        # The kernel goes up from where a link to a directory leads, not from where it lies.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    path = os.path.normpath(path)
    return path[1:] if path.startswith("//") else path


def _probe(path: str) -> str:
    # An overlay of old qemu-img without a backing format: QEMU would probe, so this is what the guest would see.
    try:
        return "qcow2" if is_qcow2(path) else "raw"
    except OSError:
        return "raw"


def chain_of(disk: Disk) -> tuple[Layer, ...]:
    """The chain of a disk: as libvirt states it for a live disk, else by following the files."""
    if disk.active is None or disk.active.path is None or disk.alone:
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
    found = tuple(replace(layer, kind="block" if is_device(layer.path) else "file") for layer in below)
    return found if any(layer.kind == "block" for layer in found) else ()


def is_device(path: str | None) -> bool:
    """Whether a path names a block device here, whatever a definition calls it (``type='volume'`` says nothing of it)."""
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
