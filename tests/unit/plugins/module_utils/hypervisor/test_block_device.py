# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import stat
from types import SimpleNamespace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import block_device
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.block_device import storage_below, storage_of


@pytest.fixture
def devices(tmp_path):
    """Makes directories as ``/sys/devices`` has them: a name, the device-mapper UUID, what is below."""

    def make(name, uuid=None, below=()):
        entry = tmp_path / name
        (entry / "slaves").mkdir(parents=True)
        if uuid is not None:
            (entry / "dm").mkdir()
            (entry / "dm" / "uuid").write_text(uuid + "\n")
        for lower in below:
            (entry / "slaves" / lower.name).symlink_to(lower)
        return entry

    return make


def test_a_volume_on_a_thin_pool_is_thin_lvm(devices):
    disk = devices("sda")
    data = devices("dm-0", "LVM-vgpool-tdata", [disk])
    pool = devices("dm-1", "LVM-vgpool-tpool", [data])
    assert storage_below(str(devices("dm-2", "LVM-vgvolume", [pool]))) == "thin-lvm"


def test_a_mapped_thin_volume_is_thin_too(devices):
    pool = devices("dm-1", "LVM-vgpool-tpool")
    volume = devices("dm-2", "LVM-vgvolume", [pool])
    assert storage_below(str(devices("dm-3", "CRYPT-LUKS2-x-guest", [volume]))) == "thin-lvm"


def test_plain_lvm_and_disks_and_encrypted_disks_are_block_devices_like_others(devices):
    disk = devices("sda")
    assert storage_below(str(disk)) is None
    assert storage_below(str(devices("dm-0", "LVM-vgvolume", [disk]))) is None
    assert storage_below(str(devices("dm-1", "CRYPT-LUKS2-x-guest", [disk]))) is None
    assert storage_below("/nowhere") is None


def test_a_zfs_volume_and_its_partitions_are_zfs(devices, tmp_path):
    assert storage_below(str(devices("zd16"))) == "zfs"
    (tmp_path / "zd16" / "zd16p1").mkdir()
    assert storage_below(str(tmp_path / "zd16" / "zd16p1")) == "zfs"
    assert storage_below(str(devices("zdisk"))) is None


def test_a_device_is_looked_up_by_its_number(tmp_path, devices, monkeypatch):
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / "230:16").symlink_to(devices("zd16"))
    status = SimpleNamespace(st_mode=stat.S_IFBLK | 0o660, st_rdev=os.makedev(230, 16))
    monkeypatch.setattr(block_device.os, "stat", lambda _path: status)
    assert storage_of("/dev/zvol/tank/web", str(tmp_path)) == "zfs"


def test_files_and_what_is_not_there_have_no_such_storage(tmp_path):
    assert storage_of(str(tmp_path)) is None
    assert storage_of(str(tmp_path / "missing")) is None
