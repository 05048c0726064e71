# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import DiskSpec

from .bootable import make_bootable
from .registries import Registry, serving

IMAGES = Path("/var/lib/libvirt/images")


@pytest.fixture
def library() -> Iterator[Path]:
    """A directory for images, gone after the test."""
    directory = IMAGES / "library"
    directory.mkdir(mode=0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="package")
def running(host: TestHost) -> Iterator[Guest]:
    """A guest that boots from its own first disk and writes on both. No test stops it or leaves it changed."""
    guest = Guest(host, GuestSpec("origin", disks=(DiskSpec("vda", partitioned=True), DiskSpec("vdb", format="raw"))))
    try:
        guest.define()
        make_bootable(guest)
        yield guest.start()
    finally:
        guest.cleanup()


@pytest.fixture(scope="package")
def still(host: TestHost) -> Iterator[Guest]:
    """A guest that was never started, and whose disks hold nothing yet that a test relies on."""
    disks = (DiskSpec("vda", size=24 << 20), DiskSpec("vdb", size=16 << 20, format="raw"))
    guest = Guest(host, GuestSpec("still", disks=disks))
    try:
        yield guest.define()
    finally:
        guest.cleanup()


@pytest.fixture(scope="package")
def registry(host: TestHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that knows one user."""
    with serving(tmp_path_factory.mktemp("registry")) as found:
        yield found
