# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shorten a raw disk with its last partition: that partition's end in the table, and the disk's, and nothing else.

libguestfs deletes a partition and adds another instead, which then has parted's name and, on some disks, another number.
Numbers of sectors are all that is read here; every sum is checked first, and what is not understood is refused.

UEFI specification 2.10, chapter 5 (GPT and its protective MBR); the DOS table's entries are at 446 in the first sector.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from .._errors import Unsupported

SECTOR = 512

_DOS_ENTRIES = 446
_DOS_SIGNATURE = b"\x55\xaa"
_PROTECTIVE = 0xEE
_LARGEST_DOS = 0xFFFFFFFF

_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_SIGNATURE = b"EFI PART"
_LARGEST_TABLE = 1 << 20


class Header(NamedTuple):
    """A GPT's header, field by field; places are sectors."""

    signature: bytes
    revision: int
    size: int
    crc: int
    reserved: int
    own: int
    other: int
    first_usable: int
    last_usable: int
    disk_guid: bytes
    entries: int
    entry_count: int
    entry_size: int
    entries_crc: int


@dataclass(frozen=True)
class Partition:
    """One entry of a partition table; ``start`` and ``end`` (inclusive) in bytes."""

    number: int
    start: int
    end: int


def shorten(path: str, table: str, partition: Partition, size: int) -> None:
    """Let ``partition`` of the raw disk at ``path`` end at its ``end``, and the disk at ``size`` bytes.

    ``table`` is ``gpt`` or ``msdos``.  Nobody may write to the disk meanwhile; what lay behind ``size`` is gone.
    Raises :class:`Unsupported`, before anything was changed, for a table that is not exactly as expected.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        first = os.pread(descriptor, SECTOR, 0)
        if table == "msdos":
            pieces = {0: shortened_dos(first, partition)}
        else:
            header = os.pread(descriptor, SECTOR, SECTOR)
            where, length = entries_at(header)
            pieces = shortened_gpt(first, header, os.pread(descriptor, length, where), partition, size // SECTOR)
        os.ftruncate(descriptor, size)
        for offset, content in pieces.items():
            os.pwrite(descriptor, content, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- DOS ---------------------------------------------------------------------------------------------


def shortened_dos(first: bytes, partition: Partition) -> bytes:
    """The first sector of the disk, with the primary ``partition`` ending at its ``end``. Pure."""
    if first[510:512] != _DOS_SIGNATURE or not 1 <= partition.number <= 4:
        raise Unsupported(f"its DOS partition table has no primary partition {partition.number}")
    at = _DOS_ENTRIES + 16 * (partition.number - 1)
    start, _sectors = struct.unpack_from("<II", first, at + 8)
    if start * SECTOR != partition.start:
        raise Unsupported(f"its DOS partition table has partition {partition.number} at another place than libguestfs")
    changed = bytearray(first)
    last = partition.end // SECTOR
    changed[at + 5 : at + 8] = _chs(last)
    struct.pack_into("<I", changed, at + 12, last - start + 1)
    return bytes(changed)


def _chs(sector: int) -> bytes:
    """Cylinder, head and sector of the usual geometry (255 heads, 63 sectors), which nothing of today reads."""
    cylinder, rest = divmod(sector, 255 * 63)
    if cylinder > 1023:
        return b"\xfe\xff\xff"
    head, number = divmod(rest, 63)
    return bytes((head, (number + 1) | (cylinder >> 2 & 0xC0), cylinder & 0xFF))


# --- GPT ---------------------------------------------------------------------------------------------


def entries_at(header: bytes) -> tuple[int, int]:
    """Offset and length, in bytes, of the entries that a primary header names. Pure."""
    read = _read_header(header)
    length = read.entry_count * read.entry_size
    offset = read.entries * SECTOR
    if read.own != 1 or read.entry_size < 128 or not 0 < length <= _LARGEST_TABLE or offset > _LARGEST_TABLE:
        raise Unsupported("its GPT is of an unusual form")
    return offset, length


def shortened_gpt(first: bytes, header: bytes, entries: bytes, partition: Partition, sectors: int) -> dict[int, bytes]:
    """What to write where (offset in bytes) on a disk that has ``sectors`` sectors then. Pure.

    ``first`` and ``header`` are its first two sectors, ``entries`` what :func:`entries_at` names.
    """
    read = _read_header(header)
    if zlib.crc32(entries) != read.entries_crc:
        raise Unsupported("the sum of its GPT's entries is wrong; repair it in the guest (sgdisk --verify)")
    at = read.entry_size * (partition.number - 1)
    if not 0 <= at <= len(entries) - 128 or struct.unpack_from("<Q", entries, at + 32)[0] * SECTOR != partition.start:
        raise Unsupported(f"its GPT has partition {partition.number} at another place than libguestfs")
    changed = bytearray(entries)
    struct.pack_into("<Q", changed, at + 40, partition.end // SECTOR)
    table = -(-len(entries) // SECTOR)
    copy = sectors - 1
    last_usable = copy - table - 1
    for other in range(0, len(changed), read.entry_size):
        if any(changed[other : other + 16]) and struct.unpack_from("<Q", changed, other + 40)[0] > last_usable:
            raise Unsupported(f"partition {other // read.entry_size + 1} of its GPT would end behind the disk")
    primary = read._replace(other=copy, last_usable=last_usable, entries_crc=zlib.crc32(bytes(changed)))
    return {
        0: _protective(first, sectors),
        SECTOR: _sealed(header, primary),
        read.entries * SECTOR: bytes(changed),
        (copy - table) * SECTOR: bytes(changed),
        copy * SECTOR: _sealed(header, primary._replace(own=copy, other=1, entries=copy - table)),
    }


def _read_header(header: bytes) -> Header:
    read = Header(*_GPT_HEADER.unpack_from(header))
    if read.signature != _GPT_SIGNATURE or not _GPT_HEADER.size <= read.size <= len(header):
        raise Unsupported("its GPT has no header")
    if zlib.crc32(header[:16] + bytes(4) + header[20 : read.size]) != read.crc:
        raise Unsupported("the sum of its GPT's header is wrong; repair it in the guest (sgdisk --verify)")
    return read


def _sealed(header: bytes, fields: Header) -> bytes:
    """A header with these fields and its own sum."""
    changed = bytearray(header)
    _GPT_HEADER.pack_into(changed, 0, *fields._replace(crc=0))
    struct.pack_into("<I", changed, 16, zlib.crc32(bytes(changed[: fields.size])))
    return bytes(changed)


def _protective(first: bytes, sectors: int) -> bytes:
    """The protective MBR, as large as the disk. A hybrid one names partitions that would have to be moved along."""
    kinds = [first[_DOS_ENTRIES + 16 * number + 4] for number in range(4)]
    if first[510:512] != _DOS_SIGNATURE or sorted(kinds) != [0, 0, 0, _PROTECTIVE]:
        raise Unsupported("its GPT has no plain protective MBR")
    changed = bytearray(first)
    at = _DOS_ENTRIES + 16 * kinds.index(_PROTECTIVE)
    struct.pack_into("<I", changed, at + 12, min(sectors - 1, _LARGEST_DOS))
    return bytes(changed)
