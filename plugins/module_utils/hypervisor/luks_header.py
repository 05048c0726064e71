# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read the LUKS header inside a qcow2 image, before anybody tries a passphrase on it.

Its numbers say how much work and memory that takes, so whoever made the header decides how long this host calculates.
Layout: LUKS On-Disk Format Specification 1.2.3 (https://gitlab.com/cryptsetup/cryptsetup); QEMU knows no other version.
"""

from __future__ import annotations

import os
import struct

from .image_header import BadHeader, Qcow2Header

_MAGIC = b"LUKS\xba\xbe"
_FIXED = ">6sH32s32s32sII20s32sI40s"
_SLOT = ">II32sII"
_SLOTS = 8
_SECTOR = 512

_SLOT_ON, _SLOT_OFF = 0x00AC71F3, 0x0000DEAD
_STRIPES = 4000  # the only number that any program uses

#: What QEMU makes. ``cipher_null`` and ECB would be no encryption.
_MODES = ("xts-plain64", "cbc-essiv:sha256")
_HASHES = ("sha1", "sha256", "sha512")
_KEY_BYTES = (16, 32, 64)

#: A header of 8 slots takes 2 MiB.
_LARGEST = 16 << 20

#: Rounds of PBKDF2 that trying one passphrase may take: over 50 times what an export of ours asks for, and about half a
#: minute. The fields' own limit, 2**32 for each of 8 slots and as many keys, would be most of a day.
MOST_ROUNDS = 1 << 26


def check_luks(path: str, header: Qcow2Header) -> None:
    """Raise :class:`BadHeader` unless the qcow2 image ``path`` has a LUKS header that is whole and costs little to open."""
    if header.crypto_header is None:
        raise BadHeader("it has no LUKS header")
    offset, length = header.crypto_header
    smallest = struct.calcsize(_FIXED) + _SLOTS * struct.calcsize(_SLOT)
    if not smallest <= length <= _LARGEST or offset % header.cluster_size or not offset:
        raise BadHeader("its LUKS header is out of range")
    if offset + length > os.stat(path).st_size:
        raise BadHeader("its LUKS header lies outside of the file")
    with open(path, "rb") as image:
        image.seek(offset)
        content = image.read(smallest)
    magic, version, cipher, mode, hash_name, payload, key_bytes, _digest, _salt, rounds, _uuid = struct.unpack_from(
        _FIXED, content
    )
    if magic != _MAGIC or version != 1:
        raise BadHeader("its LUKS header is not one of version 1")
    if _text(cipher) != "aes" or _text(mode) not in _MODES or _text(hash_name) not in _HASHES:
        raise BadHeader(f"its cipher {_text(cipher)}-{_text(mode)}, {_text(hash_name)} is none that QEMU makes")
    if key_bytes not in _KEY_BYTES or payload * _SECTOR > length:
        raise BadHeader("its LUKS header is out of range")
    slots = [struct.unpack_from(_SLOT, content, struct.calcsize(_FIXED) + n * struct.calcsize(_SLOT)) for n in range(8)]
    used = [slot for slot in slots if slot[0] == _SLOT_ON]
    if not used or any(slot[0] not in (_SLOT_ON, _SLOT_OFF) for slot in slots):
        raise BadHeader("its LUKS key slots are neither in use nor free")
    for _active, _rounds, _salt, key_offset, stripes in slots:
        if stripes != _STRIPES or key_offset * _SECTOR + key_bytes * stripes > length:
            raise BadHeader("a LUKS key slot is out of range")
    work = sum(slot[1] + rounds for slot in used)
    if not all(slot[1] for slot in used) or not rounds or work > MOST_ROUNDS:
        raise BadHeader(f"trying a passphrase on it would take {work} rounds of key derivation")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", errors="replace")
