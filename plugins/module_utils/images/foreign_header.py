# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Look at a disk image from outside before any other program opens it.

``qemu-img`` follows backing files, data files and VMDK extents as soon as it opens an image, also for ``info``
(the class of CVE-2024-32498).  So each format has its own reader here, which reads bounded ranges of the one file
that it was given and refuses every image that needs another one.
"""

from __future__ import annotations

import os
import re
import struct
import uuid
from collections.abc import Callable

from ..hypervisor.image_header import BadHeader, read_qcow2
from ..hypervisor.luks_header import check_luks
from .manifest import refuse

#: https://github.com/libyal/libvmdk documentation, and VMware's "Virtual Disk Format 5.0"
_VMDK_MAGIC = b"KDMV"
_VMDK_DESCRIPTOR_LIMIT = 1 << 16
_VMDK_TYPES = ("monolithicSparse", "streamOptimized")
_VMDK_EXTENT = re.compile(r"(RW|RDONLY|NOACCESS)\s+(\d{1,18})\s+(\w+)(\s+\"[^\"]*\")?(\s+\d+)?")
_VMDK_KEY = re.compile(r"([A-Za-z][\w. ]*?)\s*=\s*(.*)")

#: QEMU reads a parent from 20 sectors behind the first, and takes the footer for the header where the grain directory is at all ones
#: (block/vmdk.c: s->desc_offset, DESC_SIZE, VMDK4_GD_AT_END). What ``qemu-img`` writes has its descriptor there, and no footer.
_VMDK_DESCRIPTOR_SECTOR = 1
_VMDK_SEARCHED = 20 * 512
_VMDK_FOOTER = (1 << 64) - 1

#: MS-VHDX, sections 2.2.3 (region table) and 2.6 (metadata region)
_VHDX_MAGIC = b"vhdxfile"
_VHDX_REGION_TABLES = (192 << 10, 256 << 10)
_VHDX_METADATA_REGION = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_VHDX_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VHDX_VIRTUAL_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_VHDX_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_VHDX_HAS_PARENT = 1 << 1


def check(path: str, image_format: str, virtual_size: int, name: str, encryption: str = "none") -> None:
    """Raise :class:`Refused` unless ``path`` is a self-contained image of that format and virtual size (bytes).

    ``name`` is what people call the file; ``encryption`` what the manifest says of it.
    """
    try:
        if image_format == "qcow2":
            header = read_qcow2(path)
            said = {0: "none", 2: "luks"}.get(header.crypt_method, "of an unknown kind")
            if said != encryption:
                raise BadHeader(f"its encryption is {said}, and the manifest says {encryption}")
            if said == "luks":
                check_luks(path, header)
        found = _READERS[image_format](path)
    except (BadHeader, struct.error, UnicodeDecodeError) as error:
        raise refuse(f"{name} is not a self-contained {image_format} image: {error}") from error
    if found != virtual_size:
        raise refuse(f"{name} is a disk of {found} bytes, and the manifest says {virtual_size}")


def _qcow2(path: str) -> int:
    header = read_qcow2(path)
    if header.backing_file is not None:
        raise BadHeader(f"it stands on another file ({header.backing_file[:200]!r})")
    if header.has_data_file:
        raise BadHeader("its data lies in another file")
    if header.internal_snapshots:
        raise BadHeader("it holds internal snapshots, which an export never does")
    if header.incompatible_features & ~0b11011:
        raise BadHeader("it needs features that this version does not know")
    if header.corrupt:
        raise BadHeader("QEMU marked it corrupt")
    return header.virtual_size


def _raw(path: str) -> int:
    # Whatever its bytes look like, it is handed to qemu-img as raw and to the guest as qcow2 made of it.
    return os.stat(path).st_size


def _vmdk(path: str) -> int:
    with open(path, "rb") as image:
        header = image.read(79)
        if header[:4] != _VMDK_MAGIC:
            # A plain-text descriptor names its extents: any file of the host.
            raise BadHeader("it is not one sparse extent with its descriptor inside")
        _magic, version, _flags, capacity, grain, offset, sectors = struct.unpack_from("<4sIIQQQQ", header)
        if version not in (1, 2, 3) or not capacity or not 1 <= grain <= 1 << 16:
            # Capacity 0 makes QEMU read the descriptor as a list of extents.
            raise BadHeader("its header is out of range")
        if not 0 < sectors * 512 <= _VMDK_DESCRIPTOR_LIMIT or offset != _VMDK_DESCRIPTOR_SECTOR:
            raise BadHeader("its descriptor is not where QEMU looks for it")
        if struct.unpack_from("<Q", header, 56)[0] == _VMDK_FOOTER:
            raise BadHeader("its header is in its footer")
        image.seek(offset * 512)
        descriptor = image.read(sectors * 512)
        # QEMU searches as much for a parent, whatever the header says of the descriptor's place and length.
        image.seek(_VMDK_DESCRIPTOR_SECTOR * 512)
        if b"parentfile" in image.read(max(sectors * 512, _VMDK_SEARCHED)).lower():
            raise BadHeader("it stands on another file")
    _check_vmdk_descriptor(descriptor.partition(b"\0")[0].decode("utf-8"), capacity)
    return int(capacity) * 512


def _check_vmdk_descriptor(text: str, capacity: int) -> None:
    """Exactly one extent, in this file, and no parent."""
    extents, values = [], {}
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        extent, key = _VMDK_EXTENT.fullmatch(line), _VMDK_KEY.fullmatch(line)
        if extent:
            extents.append(extent)
        elif key:
            name = key.group(1).strip().lower()
            if name in values:
                raise BadHeader(f"its descriptor says {name} twice")
            values[name] = key.group(2).strip().strip('"')
        else:
            raise BadHeader("its descriptor has a line that is not understood")
    if values.get("parentcid", "").lower() != "ffffffff" or any(name.startswith("parentfile") for name in values):
        raise BadHeader("it stands on another file")
    if values.get("createtype") not in _VMDK_TYPES:
        raise BadHeader(f"its type {values.get('createtype', '')[:40]!r} is made of other files")
    if len(extents) != 1 or extents[0].group(3) != "SPARSE" or int(extents[0].group(2)) != capacity:
        raise BadHeader("it does not have exactly one sparse extent of its own size")


def _vhdx(path: str) -> int:
    with open(path, "rb") as image:
        if image.read(8) != _VHDX_MAGIC:
            raise BadHeader("it has no VHDX signature")
        sizes = {_vhdx_size(image.fileno(), start) for start in _VHDX_REGION_TABLES}
    if len(sizes) != 1:
        raise BadHeader("its two region tables contradict each other")
    return sizes.pop()


def _vhdx_size(descriptor: int, start: int) -> int:
    """Virtual size by the region table at ``start``."""
    signature, _checksum, count = struct.unpack("<4sII", os.pread(descriptor, 12, start))
    if signature != b"regi" or count > 2047:
        raise BadHeader("a region table is not as it should be")
    regions = {}
    for index in range(count):
        guid, offset, length = struct.unpack_from("<16sQI", os.pread(descriptor, 32, start + 16 + 32 * index))
        if guid in regions:
            raise BadHeader("a region is there twice")
        regions[guid] = (offset, length)
    offset, length = regions.get(_VHDX_METADATA_REGION.bytes_le, (0, 0))
    if not 1 << 16 <= length <= 1 << 26 or offset > 1 << 46:
        raise BadHeader("its metadata region is out of range")
    signature, _reserved, entries = struct.unpack("<8sHH", os.pread(descriptor, 12, offset))
    if signature != b"metadata" or entries > 2047:
        raise BadHeader("its metadata is not as it should be")
    items: dict[bytes, bytes] = {}
    for index in range(entries):
        guid, item, size = struct.unpack_from("<16sII", os.pread(descriptor, 32, offset + 32 + 32 * index))
        if guid in items or item > length or size > length - item:
            raise BadHeader("a metadata item is out of range")
        items[guid] = os.pread(descriptor, min(size, 64), offset + item)
    parameters = items.get(_VHDX_FILE_PARAMETERS.bytes_le, b"")
    if struct.unpack("<II", parameters[:8])[1] & _VHDX_HAS_PARENT or _VHDX_PARENT_LOCATOR.bytes_le in items:
        raise BadHeader("it stands on another file")
    return int(struct.unpack("<Q", items.get(_VHDX_VIRTUAL_SIZE.bytes_le, b"")[:8])[0])


_READERS: dict[str, Callable[[str], int]] = {"qcow2": _qcow2, "raw": _raw, "vmdk": _vmdk, "vhdx": _vhdx}
