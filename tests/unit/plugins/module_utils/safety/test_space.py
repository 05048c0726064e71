# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import NoSpace
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import space


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_sizes_for_people(size, text):
    assert space.human(size) == text


def test_a_file_takes_what_it_holds_and_one_that_is_gone_nothing(tmp_path):
    holey, gone = tmp_path / "holey", tmp_path / "gone"
    with holey.open("wb") as stream:
        stream.write(b"x" * 8192)
        stream.truncate(1 << 30)
    taken = space.allocated(str(holey))
    assert 8192 <= taken < 1 << 20
    assert space.allocated_in_all([str(holey), str(gone), str(holey)]) == 2 * taken
    with pytest.raises(OSError, match="gone"):
        space.allocated(str(gone))


def test_a_block_device_takes_all_that_it_has(tmp_path, monkeypatch):
    node = tmp_path / "node"
    node.touch()
    os.truncate(node, 500 << 20)
    monkeypatch.setattr(
        space.stat, "S_ISBLK", lambda _mode: True
    )  # what the kernel says of a device: no blocks, and a size
    assert os.stat(node).st_blocks == 0
    assert space.allocated(str(node)) == space.allocated_in_all([str(node)]) == 500 << 20


def test_a_qcow2_file_takes_a_little_more_than_its_disk_at_most():
    tebibyte = 1 << 40
    # 16 bytes of tables for each cluster of 64 KiB at most (an L2 entry, refcounts), and a header.
    assert space.room_for(tebibyte, tebibyte) > tebibyte + tebibyte // (64 << 10) * 16
    assert space.room_for(2 * tebibyte, tebibyte) == space.room_for(tebibyte, tebibyte) < tebibyte + (300 << 20)
    assert space.SLACK_LEAST <= space.room_for(0, 1 << 30) < 10 << 20


def test_needs_of_one_filesystem_add_up(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    needs = [(str(tmp_path / "a"), 60), (str(tmp_path / "b"), 60)]
    assert list(space.total_by_filesystem(needs).values()) == [120]
    monkeypatch.setattr(space, "free_bytes", lambda _directory: 100)
    with pytest.raises(NoSpace) as error:
        space.require(needs, "Taking it")
    assert (error.value.facts["needed"], error.value.facts["free"]) == (120, 100)
    space.require(needs[:1], "Taking it")


def test_memory_is_asked_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8 kB\nMemAvailable:     1024 kB\n")
    assert space.free_memory(meminfo=str(meminfo)) == 1 << 20
    assert space.free_memory(meminfo=str(tmp_path / "none")) is None
    monkeypatch.setattr(space, "free_memory", lambda: 1 << 20)
    space.require_memory(1 << 20, "Booting")
    with pytest.raises(NoSpace, match="of memory free and"):
        space.require_memory(2 << 20, "Booting")
