# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be made smaller, how far, and how the original gets its name back."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import shrinking
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.shrinking import Layout, Partition

MIB = 1 << 20
PRINTED = """[0] = {
  part_num: 1
  part_start: 1048576
  part_end: 9437183
  part_size: 8388608
}
[1] = {
  part_num: 2
  part_start: 9437184
  part_end: 133169151
  part_size: 123731968
}
""".splitlines()


def test_partitions_are_read() -> None:
    assert shrinking.parse_partitions(PRINTED) == (
        Partition(1, MIB, 9 * MIB - 1),
        Partition(2, 9 * MIB, 127 * MIB - 1),
    )


def test_the_last_partition_by_place_is_shortened_and_keeps_its_number() -> None:
    esp, boot, root = Partition(15, MIB, 8 * MIB), Partition(14, 8 * MIB, 9 * MIB), Partition(1, 9 * MIB, 99 * MIB)
    assert shrinking.choose_layout("gpt", (esp, boot, root)).partition == root
    assert shrinking.choose_layout(None, ()).device == "/dev/sda"
    assert shrinking.choose_layout("gpt", (Partition(3, MIB, 9 * MIB),)).device == "/dev/sda3"
    with pytest.raises(Unsupported, match="number 5, is a logical one of a DOS table"):
        shrinking.choose_layout("msdos", (boot, Partition(2, 9 * MIB, 99 * MIB), Partition(5, 10 * MIB, 99 * MIB)))
    with pytest.raises(Unsupported, match="mac"):
        shrinking.choose_layout("mac", (root,))


def test_the_filesystem_ends_before_the_copy_of_the_gpt() -> None:
    part = Partition(1, MIB, 99 * MIB - 1)
    assert Layout("gpt", part).room(64 * MIB) == 62 * MIB
    assert Layout("msdos", part).room(64 * MIB) == 63 * MIB
    assert Layout(None, None).room(64 * MIB + 512) == 64 * MIB
    assert Layout("gpt", part).on(64 * MIB) == Layout("gpt", Partition(1, MIB, 63 * MIB - 1))


def test_a_partition_with_free_space_behind_it_stays_as_it_is() -> None:
    layout = Layout("msdos", Partition(1, MIB, 40 * MIB - 1))
    assert layout.room(64 * MIB) == 39 * MIB
    assert layout.on(64 * MIB) == layout


@pytest.fixture
def shrink(tmp_path: Path) -> dict[str, str]:
    names = {name: str(tmp_path / name) for name in ("path", "copy", "work", "kept")}
    Path(names["path"]).write_text("original")
    Path(names["copy"]).write_text("smaller")
    return names


def content(shrink: dict[str, str]) -> dict[str, str]:
    return {name: Path(path).read_text() for name, path in shrink.items() if Path(path).exists()}


def test_a_swap_keeps_the_original_and_can_be_taken_back(shrink: dict[str, str]) -> None:
    assert not shrinking.swapped(shrink)
    shrinking.swap(shrink)
    assert content(shrink) == {"path": "smaller", "kept": "original"}
    assert shrinking.swapped(shrink)
    for _again in range(2):
        shrinking.put_back([shrink])
        assert content(shrink) == {"path": "original"}


def test_a_swap_that_died_between_its_two_steps_is_taken_back(shrink: dict[str, str]) -> None:
    Path(shrink["kept"]).hardlink_to(shrink["path"])
    assert not shrinking.swapped(shrink)
    shrinking.put_back([shrink])
    assert content(shrink) == {"path": "original"}


def test_a_shrink_that_was_well_leaves_the_copy_only(shrink: dict[str, str]) -> None:
    shrinking.swap(shrink)
    for _again in range(2):
        shrinking.drop_originals([shrink])
        assert content(shrink) == {"path": "smaller"}


def test_an_original_that_a_running_guest_has_open_gets_its_name_back(tmp_path: Path) -> None:
    shrink = {key: str(tmp_path / key) for key in ("path", "copy", "work", "kept")} | {"target": "vda"}
    Path(shrink["path"]).write_text("original")
    Path(shrink["copy"]).write_text("copy")
    shrinking.swap(shrink)
    assert not shrinking.return_used([shrink]), "nobody has it open"
    with open(shrink["kept"], encoding="ascii"):
        with open(shrink["path"], encoding="ascii"):
            assert not shrinking.return_used([shrink]), "the guest runs on the copy, and somebody reads the original"
        assert shrinking.return_used([shrink]) == ["vda"]
    assert [one.name for one in tmp_path.iterdir()] == ["path"]
    assert Path(shrink["path"]).read_text() == "original"
