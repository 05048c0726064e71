# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said of guests that libvirt does not shut down, or does not tell of."""

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import power
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.binding import libvirt

pytestmark = pytest.mark.skipif(libvirt is None, reason="python3-libvirt is not installed")

STATE = "It goes on running with larger disks."


class Guest:
    """``refuses`` to be told; tells ``looks`` times that it runs, then libvirtd is away."""

    def __init__(self, *, refuses: bool = False, looks: int = 1) -> None:
        self._refuses = refuses
        self._looks = looks

    def name(self) -> str:
        return "web"

    def isActive(self) -> int:
        self._looks -= 1
        if self._looks < 0:
            raise libvirt.libvirtError("client socket is closed")
        return 1

    def shutdown(self) -> None:
        if self._refuses:
            raise libvirt.libvirtError("cannot acquire state change lock")


@pytest.mark.parametrize("guest", [Guest(refuses=True), Guest(looks=0), Guest(looks=1), Guest(looks=2)])
def test_whatever_libvirt_fails_at_the_callers_state_is_told(guest: Guest) -> None:
    with pytest.raises(LibvirtFailed) as failed:
        power.shut_down([guest], state=STATE)
    assert failed.value.state == STATE
    assert "'web'" in failed.value.problem


def test_a_guest_that_is_off_before_libvirt_has_told_it_twice_has_shut_down() -> None:
    class Quick(Guest):
        def isActive(self) -> int:
            return int(super().isActive() and not self.told)

        told = False

        def shutdown(self) -> None:
            self.told = True
            raise libvirt.libvirtError("Requested operation is not valid: domain is not running")

    assert power.shut_down([Quick(looks=9)], state=STATE) == []


def test_who_waits_for_a_late_guest_hears_that_it_may_be_off() -> None:
    with pytest.raises(LibvirtFailed, match="may be off"):
        power.wait_for_late([Guest(looks=1)])
