# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""One nested hypervisor for all tests here, gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nested import machine
from nested.machine import Machine


@pytest.fixture(scope="session")
def hypervisor() -> Iterator[Machine]:
    """A machine with systemd, libvirt and enforcing AppArmor profiles."""
    started = machine.start("integration")
    yield started
    machine.destroy(started.name)
    assert not started.directory.exists()
