# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A disk grows under an overlay while it is backed up: the next point is exact, and so is the increment after it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.guest import Guest, GuestSpec

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory
from ansible_collections.vmkeeper.libvirt.tests.integration.sizing.resizing import MIB, resize


@pytest.fixture
def repository() -> Iterator[Path]:
    """An empty directory that QEMU's user can reach."""
    directory = Path("/var/lib/libvirt/sizing-repository")
    directory.mkdir(mode=0o755)
    yield directory
    shutil.rmtree(directory)


def test_the_next_backup_after_growth_under_an_overlay_is_exact(guest_factory: GuestFactory, repository: Path) -> None:
    guest = guest_factory(GuestSpec("grown"))
    assert points.point(guest, repository, disks=["vda"])["type"] == "full"
    points.ok("snapshot", domain=guest.name, name="below", disks=["vda"])
    size = 192 * MIB
    made = resize(guest, disks=[{"target": "vda", "size": str(size)}])
    assert any("the next backup is a full one" in warning for warning in made["warnings"]), made

    # Without a mount nothing but this test writes to it: the guest's own reading is what the points must hold.
    guest.stop_writers()
    guest.exec("umount /disk/vda")
    held = [_reading(guest)]
    full = points.point(guest, repository, disks=["vda"], quiesce="never")
    assert (full["type"], full["disks"][0]["virtual_size"]) == ("full", size), full
    points.fill(guest, "vda", "beyond", (size >> 16) - 40, 32)  # where there was no disk before
    held.append(_reading(guest))
    increment = points.point(guest, repository, disks=["vda"], quiesce="never")
    assert increment["type"] == "incremental", increment["reason"]
    for made_point, content in zip((full, increment), held):
        assert points.content(points.directory_of(repository, made_point) / "vda.qcow2") == content


def _reading(guest: Guest) -> str:
    return points.device_hash(guest, "vda")
