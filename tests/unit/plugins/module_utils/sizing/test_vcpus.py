# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which vCPUs go online or offline, and what becomes of what libvirt refuses."""

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import memory, vcpus
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change import MemoryAction, VcpuAction
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import (
    GuestCpus,
    GuestMemory,
    offline_blocks,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.vcpus import moves
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing import a_domain


@pytest.mark.parametrize(
    ("online", "offline", "wanted", "expected"),
    [
        ({0}, {1, 2}, 2, [(1, True)]),
        ({0}, {1, 2}, 3, [(1, True), (2, True)]),
        ({0}, set(), 3, []),
        ({0, 1, 2}, set(), 1, [(2, False), (1, False)]),
        ({0, 1}, set(), 2, []),
    ],
)
def test_the_lowest_come_first_and_the_highest_go_first(online, offline, wanted, expected):
    cpus = GuestCpus(frozenset(online), frozenset(offline), frozenset(online | offline) - {0})
    assert moves(cpus, wanted) == expected


@pytest.mark.parametrize("reply", [None, "x", [1], [{"online": False}], [{"phys-index": "1", "online": False}]])
def test_a_reply_that_makes_no_sense_names_no_block(reply):
    assert offline_blocks(reply) == ()


class Running:
    def __init__(self, active):
        self.active = active

    def isActive(self):
        return self.active


@pytest.fixture
def refusing(monkeypatch):
    """libvirt plugs nothing; returns what is to be applied."""

    def refuse(handle, size):
        raise LibvirtFailed(f"Plugging {size}: no")

    monkeypatch.setattr(memory, "_plug", refuse)
    monkeypatch.setattr(memory, "live", lambda handle: 1 << 30)
    monkeypatch.setattr(memory, "guest_memory", lambda handle, info: GuestMemory())
    monkeypatch.setattr(vcpus, "_plug", refuse)
    monkeypatch.setattr(vcpus, "_count", lambda handle, info: (2, 2))
    monkeypatch.setattr(vcpus, "read_domain", lambda handle: a_domain.domain())
    return (
        lambda handle: memory.apply(handle, MemoryAction(dimm=1 << 30), None, 2 << 30),
        lambda handle: vcpus.apply(handle, VcpuAction(3, 3), None),
    )


def test_what_libvirt_refuses_is_not_taken_and_ends_nothing_but_with_the_domain(refusing):
    for apply in refusing:
        outcome = apply(Running(active=True))
        assert (outcome.taken, outcome.altered) == (False, False)
        assert outcome.note.startswith("Plugging")
        with pytest.raises(LibvirtFailed):
            apply(Running(active=False))
