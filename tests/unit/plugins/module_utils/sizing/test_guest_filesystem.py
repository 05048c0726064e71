# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of a guest's disk can grow, by what its sysfs says."""

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import Executed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import guest_filesystem
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.guest_filesystem import Filesystem

MIB = 1 << 20
SYSFS = {
    "vda/device/uevent": "DRIVER=virtio_blk",
    "vda/uevent": "DEVNAME=vda\nDEVTYPE=disk",
    "vda/size": "204800",
    "vda1/uevent": "DEVNAME=vda1\nDEVTYPE=partition\nPARTN=1",
    "vda1/size": "100000",
    "vda1/start": "2048",
    "vda2/uevent": "DEVNAME=vda2\nDEVTYPE=partition\nPARTN=2",
    "vda2/size": "10000",
    "vda2/start": "110000",
    "md0/uevent": "DEVNAME=md0\nDEVTYPE=disk",
    "md0/size": "204800",
    "nvme0n1/device/uevent": "NVME_TRTYPE=pcie",
    "nvme0n1/uevent": "DEVNAME=nvme0n1\nDEVTYPE=disk",
    "nvme0n1/size": "204800",
    "nvme0n1p1/uevent": "DEVNAME=nvme0n1p1\nDEVTYPE=partition\nPARTN=1",
    "nvme0n1p1/size": "100000",
    "nvme0n1p1/start": "2048",
}
DISK_OF = {"vda1": "vda", "vda2": "vda", "nvme0n1p1": "nvme0n1"}


def cat(_handle, argv, **_options) -> Executed:
    """The files of the guest's /sys/class/block that exist."""
    said = []
    for path in argv[1:]:
        device, _slash, name = path.removeprefix("/sys/class/block/").partition("/")
        if name.startswith("../"):
            device, name = DISK_OF[device], name[3:]
        if name.endswith("/start"):
            device, name = name.split("/")
        if f"{device}/{name}" in SYSFS:
            said.append(SYSFS[f"{device}/{name}"] + "\n")
    return Executed(0, "".join(said), "")


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(guest_filesystem, "_run", cat)
    monkeypatch.setattr(guest_filesystem, "_filesystem_size", lambda _handle, one: one.device_size)
    return lambda device, kind="ext4": guest_filesystem._measure(None, "vda", device, "/", kind)


def test_a_partition_with_another_one_behind_it_is_not_grown(measured):
    assert "another partition lies behind" in measured("vda1").problem
    assert measured("vda1").covered
    last = measured("vda2")
    assert (last.problem, last.partition, last.disk_size) == (None, 2, 100 * MIB)
    assert not last.covered


def test_what_no_hardware_stands_behind_is_no_disk(measured):
    assert "md0 is not a disk" in measured("md0").problem
    assert measured("md0").covered
    assert measured("VolGroup-root").covered


def test_partitions_of_disks_whose_names_end_with_a_number_are_found(measured):
    assert measured("nvme0n1p1").problem is None


FOUND = Filesystem("vda", "vda1", "/", "ext4", "vda", 100 * MIB, 1, MIB, 90 * MIB, 90 * MIB)


def test_a_filesystem_that_does_not_grow_is_said_and_does_not_fail(monkeypatch):
    def refused(handle, filesystem):
        raise VmkeeperError("sfdisk is missing")

    monkeypatch.setattr(guest_filesystem, "grow", refused)
    monkeypatch.setattr(guest_filesystem, "_device_size", lambda handle, device: 90 * MIB)
    outcome = guest_filesystem.take_room(None, FOUND, 200 * MIB)
    assert (outcome.taken, outcome.altered) == (False, False)
    assert "sfdisk is missing" in outcome.note


def test_a_filesystem_fills_the_disk_that_was_asked_and_not_the_one_that_the_guest_still_sees(monkeypatch):
    monkeypatch.setattr(
        guest_filesystem,
        "grow",
        lambda handle, one: Filesystem(**{**one.__dict__, "device_size": 99 * MIB, "size": 99 * MIB}),
    )
    assert guest_filesystem.take_room(None, FOUND, 100 * MIB).taken
    unnoticed = guest_filesystem.take_room(None, FOUND, 200 * MIB)
    assert not unnoticed.taken
    assert "not noticed" in unnoticed.note


@pytest.mark.parametrize(
    ("said", "least"),
    [
        ("resize2fs 1.47.0 (5-Feb-2023)\nEstimated minimum size of the filesystem: 2048\n", 8 * MIB),
        ("resize2fs: Bad magic number\n", None),
    ],
)
def test_a_filesystem_says_how_small_it_can_be(monkeypatch, said, least):
    said = {"dumpe2fs": "Block count:              23040\nBlock size:               4096\n", "resize2fs": said}
    monkeypatch.setattr(guest_filesystem, "_run", lambda _handle, argv, **_options: Executed(0, said[argv[0]], ""))
    assert guest_filesystem.least_size(None, FOUND) == least
