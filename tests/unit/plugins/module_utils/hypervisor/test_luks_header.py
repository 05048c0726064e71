# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_header import BadHeader, Qcow2Header
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.luks_header import MOST_ROUNDS, check_luks

CLUSTER = 1 << 16
LENGTH = 2068480
ON, OFF = 0x00AC71F3, 0x0000DEAD


def slot(active: int = OFF, rounds: int = 0, offset: int = 8, stripes: int = 4000) -> bytes:
    return struct.pack(">II32sII", active, rounds, b"salt", offset, stripes)


def luks(**changes: Any) -> bytes:
    """A header as QEMU makes it, with some of its fields changed."""
    fields = {
        "magic": b"LUKS\xba\xbe", "version": 1, "cipher": b"aes", "mode": b"xts-plain64", "hash": b"sha256",
        "payload": LENGTH // 512, "key_bytes": 64, "rounds": 200_000, "slots": [slot(ON, 870_000)], **changes,
    }  # fmt: skip
    fixed = struct.pack(
        ">6sH32s32s32sII20s32sI40s",
        *(fields[name] for name in ("magic", "version", "cipher", "mode", "hash", "payload", "key_bytes")),
        b"digest", b"salt", fields["rounds"], b"uuid",
    )  # fmt: skip
    slots = [*fields["slots"], *[slot()] * (8 - len(fields["slots"]))]
    return fixed + b"".join(slots)


def check(tmp_path: Path, content: bytes, where: tuple[int, int] | None = (CLUSTER, LENGTH)) -> None:
    path = tmp_path / "image"
    with path.open("wb") as stream:
        stream.seek(CLUSTER)
        stream.write(content)
        stream.truncate(CLUSTER + LENGTH)
    header = Qcow2Header(3, 1 << 22, CLUSTER, None, None, None, True, 0, 0, (), crypt_method=2, crypto_header=where)
    check_luks(str(path), header)


@pytest.mark.parametrize(
    "content",
    [
        luks(),
        luks(key_bytes=32),
        luks(mode=b"cbc-essiv:sha256"),
        luks(slots=[slot(), slot(ON, 1)]),
        luks(hash=b"sha512"),
    ],
)
def test_what_qemu_makes_is_accepted(tmp_path: Path, content: bytes) -> None:
    check(tmp_path, content)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"magic": b"LUKS\xba\xbf"}, "version 1"),
        ({"version": 2}, "version 1"),
        ({"cipher": b"cipher_null"}, "none that QEMU makes"),
        ({"mode": b"ecb"}, "none that QEMU makes"),
        ({"hash": b"crc32"}, "none that QEMU makes"),
        ({"key_bytes": 1 << 30}, "out of range"),
        ({"key_bytes": 0}, "out of range"),
        ({"payload": 1 << 31}, "out of range"),
        ({"slots": []}, "neither in use nor free"),
        ({"slots": [slot(ON, 1), slot(7)]}, "neither in use nor free"),
        ({"slots": [slot(ON, 1, stripes=1 << 31)]}, "slot is out of range"),
        ({"slots": [slot(ON, 1), slot(offset=1 << 30)]}, "slot is out of range"),
        ({"slots": [slot(ON, 0)]}, "rounds"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 1 << 31}, "rounds"),
        ({"slots": [slot(ON, MOST_ROUNDS)]}, "rounds"),
        ({"slots": [slot(ON, MOST_ROUNDS // 8)] * 8}, "rounds"),
    ],
)
def test_a_header_that_lies_or_costs_too_much_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BadHeader, match=why):
        check(tmp_path, luks(**changes))


@pytest.mark.parametrize(
    "where",
    [None, (0, LENGTH), (512, LENGTH), (CLUSTER, 100), (CLUSTER, 1 << 40), (CLUSTER * 2, LENGTH), (1 << 62, LENGTH)],
)
def test_a_header_that_is_not_where_it_can_be_is_refused(tmp_path: Path, where: tuple[int, int] | None) -> None:
    with pytest.raises(BadHeader):
        check(tmp_path, luks(), where)
