# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""One nested hypervisor for all tests here, gone afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from nested import machine
from nested.image import BuildError
from nested.machine import Machine, MachineError


@pytest.fixture(scope="session")
def hypervisor() -> Iterator[Machine]:
    """A machine with systemd, libvirt and enforcing AppArmor profiles.

    With ``VMK_NESTED_OPTIONAL`` set its tests are skipped where none can be built or does not boot.
    """
    try:
        started = machine.start("integration")
    except (BuildError, MachineError) as error:
        if os.environ.get("VMK_NESTED_OPTIONAL"):
            pytest.skip(f"no nested hypervisor runs here: {error}")
        raise
    yield started
    machine.destroy(started.name)
    assert not started.directory.exists()
