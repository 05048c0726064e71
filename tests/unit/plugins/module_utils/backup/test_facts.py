# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What is read of a stopped domain's images."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import plan as planning
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import stillness, taking
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.facts import read_disk, whole_sectors
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Disk,
    Domain,
    DomainState,
    Layer,
)

MIB = 1 << 20


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 512), (512, 512), (1000001, 1000448), (1 << 30, 1 << 30)])
def test_a_raw_image_is_as_large_as_qemu_says(length: int, size: int) -> None:
    assert whole_sectors(length) == size


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_an_external_data_file_is_watched_and_counted(tmp_path: Path) -> None:
    image, data = tmp_path / "vda.qcow2", tmp_path / "data.raw"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", str(image), str(16 * MIB)]
    subprocess.run(create, check=True)
    data.write_bytes(b"x" * (4 * MIB))
    disk = Disk("vda", "disk", "file", "virtio", (Layer(str(image), "qcow2"),))
    domain = Domain("web", "u", DomainState("shutoff", "shutdown"), True, (disk,))
    facts = read_disk(None, domain, disk)
    assert facts is not None
    assert 4 * MIB <= facts.allocated < 8 * MIB
    plan = planning.plan_point(planning.Request(), planning.Facts(domain=domain, disks={"vda": facts}))
    marks = stillness.marks_of(taking.files_read(plan))
    data.write_bytes(b"y" * (5 * MIB))
    assert stillness.written_since(marks) == [str(data)]
