# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""One long-lived guest with room to grow, shared by the tests of a file."""

from __future__ import annotations

import pytest
from lab.guest import DiskSpec, Guest, GuestSpec

from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest(module_guest_factory: GuestFactory) -> Guest:
    """One vCPU of four, 224 MiB of 1 GiB. It boots from the ext4 disk vda (DOS table); an ext4 in a GPT and an XFS."""
    return module_guest_factory(
        GuestSpec(
            "sizes",
            vcpus=1,
            max_vcpus=4,
            memory=224,
            max_memory=1024,
            disks=(
                DiskSpec("vda", size=192 * MIB, boot=True),
                DiskSpec("vdb", partitioned=True),
                DiskSpec("vdc", format="raw", size=320 * MIB, fs="xfs"),
            ),
        )
    )
