# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How memory comes and goes, from facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    MemoryDevice,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import facts as reading
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change import (
    MemoryAction,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import (
    GuestMemory,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import Request
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing.a_domain import (
    AGENT,
    GIB,
    MIB,
    domain,
    facts,
    only,
)


def test_the_balloon_gives_back_before_anything_is_plugged():
    known = facts(live=domain(memory_current=GIB // 2))
    assert only(Request(memory=GIB), known).action == MemoryAction(balloon=GIB)


PLUGGABLE = domain(memory_limit=4 * GIB, memory_slots=4)


def test_the_rest_is_a_dimm():
    known = facts(live=replace(PLUGGABLE, memory_current=GIB // 2))
    action = only(Request(memory=GIB + 256 * MIB), known).action
    assert action == MemoryAction(balloon=GIB, dimm=256 * MIB, online=True)


@pytest.mark.parametrize(
    ("live", "wanted", "says"),
    [
        (domain(), 2 * GIB, "without maxMemory"),
        (PLUGGABLE, 8 * GIB, "room for 4.0 GiB"),
        (replace(PLUGGABLE, memory_slots=0), 2 * GIB, "slots"),
        (PLUGGABLE, GIB + 64 * MIB, "blocks of 128 MiB"),
        (replace(PLUGGABLE, hugepages=GIB), GIB + 512 * MIB, "hugepages of 1.0 GiB"),
    ],
)
def test_why_no_dimm_can_be_plugged_is_said(live, wanted, says):
    change = only(Request(memory=wanted, overcommit=True), facts(live=live))
    assert change.how == "next_boot"
    assert says in change.why


VIRTIO = MemoryDevice("virtio-mem", GIB, 0, 256 * MIB, 256 * MIB, 2 * MIB, "virtiomem0")
WITH_VIRTIO = domain(memory_max=2 * GIB, memory_devices=(VIRTIO,), memory_limit=4 * GIB, memory_slots=4)


def test_virtio_mem_comes_before_a_dimm_and_gives_back_before_the_balloon():
    known = facts(live=WITH_VIRTIO, balloon=GIB)
    assert only(Request(memory=GIB + 512 * MIB), known).action.virtio_mem == (("virtiomem0", 512 * MIB),)
    less = only(Request(memory=GIB - 128 * MIB), known).action
    assert less == MemoryAction(balloon=GIB - 128 * MIB, virtio_mem=(("virtiomem0", 0),))


def test_a_dimm_that_fits_is_unplugged_and_the_balloon_stands_in_for_it():
    dimm = MemoryDevice("dimm", 256 * MIB, 0, 256 * MIB, 256 * MIB, 0, "dimm0")
    known = facts(live=replace(PLUGGABLE, memory_devices=(dimm,)))
    action = only(Request(memory=GIB - 256 * MIB), known).action
    assert action == MemoryAction(balloon=GIB - 256 * MIB, unplug=("dimm0",))


def test_memory_that_the_guest_uses_is_not_taken_from_it():
    known = facts(memory=GuestMemory(total=GIB, available=64 * MIB))
    change = only(Request(memory=GIB // 2), known)
    assert (change.how, "to spare" in change.why) == ("next_boot", True)


def test_memory_that_the_guest_left_offline_is_brought_online():
    known = facts(memory=GuestMemory(total=GIB, available=GIB, offline_blocks=(32,)))
    assert only(Request(memory=GIB), known).action == MemoryAction(online=True)


def test_memory_is_not_taken_live_from_a_guest_that_does_not_tell_what_it_can_spare():
    known = facts(memory=GuestMemory())
    change = only(Request(memory=GIB // 2), known)
    assert (change.how, "does not tell what it can spare" in change.why) == ("next_boot", True)
    assert only(Request(memory=GIB // 2, allow_restart=True), known).how == "restart"


class Ballooning:
    def __init__(self, **told):
        self.told = told

    def XMLDesc(self, flags):
        period = "" if self.told.pop("never", False) else "<stats period='10'/>"
        return f"<domain><devices><memballoon model='virtio'>{period}</memballoon></devices></domain>"

    def memoryStats(self):
        return self.told


@pytest.mark.parametrize(
    ("told", "available"),
    [
        ({"usable": 2048, "unused": 1024, "last_update": 1000}, 2048 * 1024),
        ({"unused": 1024, "last_update": 1000}, 1024 * 1024),
        ({"usable": 2048, "last_update": 0}, None),
        ({"usable": 2048, "last_update": 1009, "never": True}, None),
        ({"usable": 2048, "last_update": 100}, None),
        ({"actual": 4096}, None),
    ],
)
def test_the_balloon_driver_tells_where_the_agent_does_not(monkeypatch, told, available):
    monkeypatch.setattr(reading.time, "time", lambda: 1010.0)
    assert reading._with_balloon_statistics(Ballooning(**told), GuestMemory()).available == available


def test_memory_that_the_guest_leaves_offline_is_no_reason_for_a_start_that_brings_the_same():
    closed = replace(AGENT, commands=AGENT.commands - {"guest-set-memory-blocks"})
    known = facts(agent=closed, memory=GuestMemory(total=GIB, available=GIB, offline_blocks=(32,)))
    planned = compute(Request(memory=GIB, allow_restart=True), known)
    assert not planned.due
    assert planned.changes[0].warn
    # As a DIMM it is offline; the definition makes it ordinary memory at the next start.
    dimm = MemoryDevice("dimm", 256 * MIB, 0, 256 * MIB, 256 * MIB, 0, "dimm0")
    plugged = replace(known, live=domain(memory_devices=(dimm,)))
    assert only(Request(memory=GIB, allow_restart=True), plugged).how == "restart"
