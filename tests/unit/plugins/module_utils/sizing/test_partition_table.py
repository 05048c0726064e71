# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""sfdisk makes the tables and judges them afterwards."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import partition_table
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.partition_table import SECTOR, Partition

MIB = 1 << 20
SFDISK = shutil.which("sfdisk", path="/usr/sbin:/usr/bin:/sbin:/bin")
GPT = """label: gpt
label-id: 11111111-2222-3333-4444-555555555555
1: start=9MiB, size=118MiB, uuid=AAAAAAAA-2222-3333-4444-555555555555, type=linux, attrs="LegacyBIOSBootable GUID:59"
15: start=1MiB, size=8MiB, uuid=BBBBBBBB-2222-3333-4444-555555555555, type=uefi, name="EFI system"
"""
DOS = """label: dos
label-id: 0x1234abcd
1: start=1MiB, size=8MiB, type=c
3: start=9MiB, type=83, bootable
"""


def sfdisk(*arguments: str | Path, stdin: str = "") -> str:
    assert SFDISK
    return subprocess.run(
        [SFDISK, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if SFDISK is None:
        pytest.skip("sfdisk is not installed")
    path = tmp_path / "disk"
    with path.open("wb") as image:
        image.truncate(128 * MIB)
    return path


def as_before_but(disk: Path, before: str) -> tuple[str, str]:
    """The table's dump before and now, without what has to differ: sizes and the disk's end."""
    changing = re.compile(r"size= *\d+|last-lba: \d+")
    return changing.sub("", before), changing.sub("", sfdisk("-d", disk))


def test_a_gpt_keeps_everything_but_the_end(disk: Path) -> None:
    sfdisk("-q", disk, stdin=GPT)
    before = sfdisk("-d", disk)
    partition_table.shorten(str(disk), "gpt", Partition(1, 9 * MIB, 62 * MIB - 1), 64 * MIB)
    assert disk.stat().st_size == 64 * MIB
    assert "No errors detected" in sfdisk("--verify", disk)
    then, now = as_before_but(disk, before)
    assert now == then
    assert f"start= {9 * MIB // SECTOR:11}, size= {53 * MIB // SECTOR:11}," in sfdisk("-d", disk)
    # The copy at the end is as good: without the first header the same table is read.
    whole = sfdisk("-d", disk)
    with disk.open("r+b") as image:
        image.seek(SECTOR)
        image.write(bytes(SECTOR))
    assert sfdisk("-d", disk) == whole


def test_a_dos_table_keeps_everything_but_the_end(disk: Path) -> None:
    sfdisk("-q", disk, stdin=DOS)
    with disk.open("r+b") as image:
        image.write(b"boot record")
    before = sfdisk("-d", disk)
    partition_table.shorten(str(disk), "msdos", Partition(3, 9 * MIB, 64 * MIB - 1), 64 * MIB)
    assert "No errors detected" in sfdisk("--verify", disk)
    then, now = as_before_but(disk, before)
    assert now == then
    assert f"size= {55 * MIB // SECTOR:11}, type=83, bootable" in sfdisk("-d", disk)
    assert disk.read_bytes().startswith(b"boot record")
    # What sfdisk itself would have written for these sizes.
    fresh = disk.with_name("fresh")
    fresh.write_bytes(bytes(64 * MIB))
    sfdisk("-q", fresh, stdin=DOS)
    assert fresh.read_bytes()[440:SECTOR] == disk.read_bytes()[440:SECTOR]


def spoil(disk: Path, offset: int) -> None:
    with disk.open("r+b") as image:
        image.seek(offset)
        (byte,) = image.read(1)
        image.seek(offset)
        image.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (SECTOR, "no header"),
        (SECTOR + 57, "header is wrong"),
        (2 * SECTOR + 60, "entries is wrong"),
        (446 + 16 + 4, "protective MBR"),
    ],
)
def test_a_gpt_that_is_not_sound_is_refused_and_left(disk: Path, spoilt: int, says: str) -> None:
    sfdisk("-q", disk, stdin=GPT)
    spoil(disk, spoilt)
    before = disk.read_bytes()
    with pytest.raises(Unsupported, match=says):
        partition_table.shorten(str(disk), "gpt", Partition(1, 9 * MIB, 62 * MIB - 1), 64 * MIB)
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    ("table", "partition", "says"),
    [
        ("gpt", Partition(1, 8 * MIB, 62 * MIB - 1), "another place"),
        ("gpt", Partition(129, 9 * MIB, 62 * MIB - 1), "another place"),
        ("gpt", Partition(1, 9 * MIB, 64 * MIB - 1), "would end behind the disk"),
        ("msdos", Partition(3, 8 * MIB, 64 * MIB - 1), "another place"),
        ("msdos", Partition(5, 9 * MIB, 64 * MIB - 1), "no primary partition 5"),
    ],
)
def test_a_table_that_says_something_else_is_refused_and_left(
    disk: Path, table: str, partition: Partition, says: str
) -> None:
    sfdisk("-q", disk, stdin=GPT if table == "gpt" else DOS)
    before = disk.read_bytes()
    with pytest.raises(Unsupported, match=says):
        partition_table.shorten(str(disk), table, partition, 64 * MIB)
    assert disk.read_bytes() == before


def test_another_partition_that_ends_behind_the_disk_is_refused(disk: Path) -> None:
    sfdisk("-q", disk, stdin=GPT)
    with pytest.raises(Unsupported, match="partition 1 of its GPT would end behind"):
        partition_table.shorten(str(disk), "gpt", Partition(15, MIB, 8 * MIB - 1), 64 * MIB)
