# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read the header of a qcow2 image without running anything and without opening any other file.

``qemu-img info`` opens backing files, data files and VMDK extents (the class of CVE-2024-32498); this parser reads
bounded byte ranges of the one file that it was given.  Layout: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

QCOW2_MAGIC = b"QFI\xfb"

_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_BITMAPS = 0x23852875
_EXTENSION_CRYPTO = 0x0537BE77
_EXTENSION_DATA_FILE = 0x44415441
_EXTENSIONS_LIMIT = 1 << 20

#: QEMU's own bound of the first table (QCOW_MAX_L1_SIZE), in bytes.
_L1_LIMIT = 32 << 20

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4

BITMAP_IN_USE = 1 << 0
BITMAP_AUTO = 1 << 1


class BadHeader(ValueError):
    """The file does not hold what its header promises."""


@dataclass(frozen=True)
class Bitmap:
    """A persistent dirty bitmap as stored. ``in_use`` is the mark of an unclean stop: its content is not to be trusted."""

    name: str
    enabled: bool
    in_use: bool
    granularity: int


@dataclass(frozen=True)
class Qcow2Header:
    """What the first cluster says. Sizes in bytes; ``backing_file`` and ``data_file`` as written, unresolved."""

    version: int
    virtual_size: int
    cluster_size: int
    backing_file: str | None
    backing_format: str | None
    data_file: str | None
    encrypted: bool
    internal_snapshots: int
    incompatible_features: int
    bitmaps: tuple[Bitmap, ...]
    crypt_method: int = 0  #: 0 none, 1 AES (which QEMU gave up), 2 LUKS
    crypto_header: tuple[int, int] | None = None  #: offset and length of the LUKS header

    @property
    def has_data_file(self) -> bool:
        """Guest data lies in another file."""
        return bool(self.incompatible_features & INCOMPATIBLE_DATA_FILE) or self.data_file is not None

    @property
    def compression(self) -> str:
        """How clusters are compressed, if any are."""
        return "zstd" if self.incompatible_features & INCOMPATIBLE_COMPRESSION else "zlib"

    @property
    def corrupt(self) -> bool:
        """QEMU marked the image corrupt."""
        return bool(self.incompatible_features & INCOMPATIBLE_CORRUPT)


def is_qcow2(path: str) -> bool:
    """Whether the file begins with the qcow2 magic."""
    with open(path, "rb") as image:
        return image.read(4) == QCOW2_MAGIC


def read_qcow2(path: str) -> Qcow2Header:
    """Parse the header of a qcow2 image; raises :class:`BadHeader` on anything that contradicts itself."""
    return _reading(path, _parse)


def holds_data(path: str) -> bool:
    """Whether anything was ever written to this qcow2 layer itself, encrypted or not. Nobody may hold it.

    The first write to a part makes the table of that part, also one of zeros.  Raises :class:`BadHeader`.
    """
    return _reading(path, _has_tables)


_Read = TypeVar("_Read")


def _reading(path: str, read: Callable[[int], _Read]) -> _Read:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return read(descriptor)
    except struct.error as error:
        raise BadHeader("the header is cut short") from error
    except UnicodeDecodeError as error:
        raise BadHeader("a name in the header is not UTF-8") from error
    finally:
        os.close(descriptor)


def _has_tables(descriptor: int) -> bool:
    _parse(descriptor)
    entries, offset = struct.unpack(">IQ", os.pread(descriptor, 12, 36))
    if entries * 8 > _L1_LIMIT or offset >> 56:
        raise BadHeader("the first table is out of range")
    table = os.pread(descriptor, entries * 8, offset)
    if len(table) != entries * 8:
        raise BadHeader("the first table is cut short")
    return any(table)


def _parse(descriptor: int) -> Qcow2Header:
    fixed = os.pread(descriptor, 112, 0)
    if fixed[:4] != QCOW2_MAGIC:
        raise BadHeader("it is not a qcow2 image")
    version, backing_offset, backing_length, cluster_bits, size, crypt = struct.unpack_from(">IQIIQI", fixed, 4)
    if version not in (2, 3):
        raise BadHeader(f"qcow2 version {version} is unknown")
    if not 9 <= cluster_bits <= 21:
        raise BadHeader("the cluster size is out of range")
    (snapshots,) = struct.unpack_from(">I", fixed, 60)
    incompatible, header_length = 0, 72
    if version == 3:
        (incompatible,) = struct.unpack_from(">Q", fixed, 72)
        (header_length,) = struct.unpack_from(">I", fixed, 100)
    cluster_size = 1 << cluster_bits
    if not 72 <= header_length <= cluster_size:
        raise BadHeader("the header length is out of range")
    extensions = _extensions(descriptor, header_length, min(cluster_size, _EXTENSIONS_LIMIT))
    backing_file = None
    if backing_offset:
        if not 0 < backing_length <= 1023 or backing_offset + backing_length > cluster_size:
            raise BadHeader("the backing file name lies outside the header")
        backing_file = os.pread(descriptor, backing_length, backing_offset).decode()
    backing_format = extensions.get(_EXTENSION_BACKING_FORMAT)
    data_file = extensions.get(_EXTENSION_DATA_FILE)
    crypto = extensions.get(_EXTENSION_CRYPTO)
    return Qcow2Header(
        version=version,
        virtual_size=size,
        cluster_size=cluster_size,
        backing_file=backing_file,
        backing_format=backing_format.decode() if backing_format else None,
        data_file=data_file.decode() if data_file else None,
        encrypted=crypt != 0,
        crypt_method=crypt,
        crypto_header=struct.unpack(">QQ", crypto) if crypto is not None else None,
        internal_snapshots=snapshots,
        incompatible_features=incompatible,
        bitmaps=_bitmaps(descriptor, extensions.get(_EXTENSION_BITMAPS)),
    )


def _extensions(descriptor: int, start: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = start
    while offset + 8 <= end:
        kind, length = struct.unpack(">II", os.pread(descriptor, 8, offset))
        if kind == 0:
            break
        if offset + 8 + length > end:
            raise BadHeader("a header extension is longer than the header")
        found[kind] = os.pread(descriptor, length, offset + 8)
        offset += 8 + (length + 7) // 8 * 8
    return found


def _bitmaps(descriptor: int, extension: bytes | None) -> tuple[Bitmap, ...]:
    if extension is None:
        return ()
    count, _reserved, directory_size, directory_offset = struct.unpack(">IIQQ", extension[:24])
    # Bounds of the specification: at most 65535 bitmaps, a directory of at most 64 MiB; ours is far smaller.
    if count > 65535 or directory_size > 16 << 20:
        raise BadHeader("the bitmap directory is too large")
    directory = os.pread(descriptor, directory_size, directory_offset)
    bitmaps: list[Bitmap] = []
    offset = 0
    for _index in range(count):
        _table, _entries, flags, _kind, granularity, name_size, extra = struct.unpack_from(
            ">QIIBBHI", directory, offset
        )
        name_start = offset + 24 + extra
        name = directory[name_start : name_start + name_size].decode()
        if granularity > 31 or len(name.encode()) != name_size:
            raise BadHeader("the bitmap directory contradicts itself")
        bitmaps.append(
            Bitmap(
                name=name,
                enabled=bool(flags & BITMAP_AUTO),
                in_use=bool(flags & BITMAP_IN_USE),
                granularity=1 << granularity,
            )
        )
        offset += (24 + extra + name_size + 7) // 8 * 8
    return tuple(bitmaps)
