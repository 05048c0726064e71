# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How each change is applied, and why, from facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    InvalidInput,
    Refused,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import scaling
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import Host
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import Request
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing.a_domain import (
    GIB,
    domain,
    facts,
    ways,
)


def test_nothing_is_due_when_all_three_values_agree():
    assert not compute(Request(vcpus=2, memory=GIB), facts()).changes


@pytest.mark.parametrize(
    ("request_", "how", "pending"),
    [
        (Request(vcpus=8), "next_boot", True),
        (Request(vcpus=8, allow_restart=True), "restart", False),
        (Request(vcpus=4, apply="next_boot"), "next_boot", True),
    ],
)
def test_what_cannot_be_live_is_done_at_a_restart_or_at_the_next_boot(request_, how, pending):
    planned = compute(request_, facts())
    assert planned.changes[0].how == how
    assert bool(planned.pending) is pending


def test_a_change_that_waits_for_the_next_boot_is_made_once():
    known = facts(conf=domain(vcpus_current=8, vcpus_max=8))
    planned = compute(Request(vcpus=8), known)
    assert not planned.due
    assert planned.pending


def test_apply_live_refuses_what_is_not_live():
    with pytest.raises(Refused, match="room for 4 vCPUs"):
        compute(Request(vcpus=8, apply="live"), facts())


def test_a_restart_carries_what_would_have_been_plugged():
    assert ways(Request(vcpus=4, memory=2 * GIB, allow_restart=True), facts()) == {
        "vcpus": "restart",
        "memory": "restart",
    }


def test_room_is_made_at_the_next_boot_and_never_below_what_is_used():
    assert ways(Request(max_vcpus=8), facts()) == {"max_vcpus": "next_boot"}
    assert ways(Request(max_vcpus=8, allow_restart=True), facts()) == {"max_vcpus": "restart"}
    assert ways(Request(max_vcpus=8, allow_restart=True, apply="next_boot"), facts()) == {"max_vcpus": "next_boot"}
    prepared = facts(conf=domain(vcpus_max=8))
    assert not compute(Request(max_vcpus=8), prepared).due
    assert compute(Request(max_vcpus=8), prepared).pending
    assert ways(Request(max_vcpus=8, allow_restart=True), prepared) == {"max_vcpus": "restart"}
    with pytest.raises(Refused, match="cannot be changed live"):
        compute(Request(max_vcpus=8, apply="live"), facts())
    with pytest.raises(InvalidInput):
        compute(Request(max_vcpus=1), facts())


def definition(vcpus: int = 4, memory: str = "<memory unit='GiB'>8</memory>", limit: str = "") -> str:
    return (
        f"<domain><name>d</name><uuid>1</uuid>{limit}{memory}<currentMemory unit='GiB'>4</currentMemory>"
        f"<vcpu current='2'>{vcpus}</vcpu><os><type arch='x86_64'>hvm</type></os></domain>"
    )


def test_room_for_less_memory_than_the_balloon_could_give_back_is_refused():
    conf = domain(memory_max=8 * GIB, memory_current=4 * GIB)
    known = facts(live=conf, definition=definition())
    with pytest.raises(InvalidInput, match="max_memory"):
        compute(Request(max_memory=6 * GIB), known)
    assert compute(Request(max_memory=8 * GIB), known).due
    with pytest.raises(InvalidInput, match=r"5\.0 GiB|8\.0 GiB"):
        compute(Request(memory=5 * GIB, max_memory=6 * GIB), known)


def test_more_vcpus_than_the_machine_type_takes_are_refused_before_anything_is_stopped():
    known = facts(definition=definition(), host=Host(cpus=16, free_memory=GIB, most_vcpus=255))
    with pytest.raises(InvalidInput, match="takes 255"):
        compute(Request(max_vcpus=300, allow_restart=True), known)
    assert compute(Request(max_vcpus=255), known).definition != definition()


def foreseen(request: Request, known):
    change_set = compute(request, known)
    return scaling._Run(None, "", None, request, known, change_set).predict().after


def test_check_mode_foresees_live_vcpus_and_room_as_they_will_be():
    # Without KVM the vCPU stays QEMU's, offline in the guest, until the next start.
    emulated = facts(live=domain(domain_type="qemu"), definition=definition(memory="<memory unit='GiB'>4</memory>"))
    assert foreseen(Request(vcpus=1), emulated)["vcpus"] == {"configured": 1, "live": 2, "maximum": 4}
    plugged = replace(emulated, definition=definition())
    assert foreseen(Request(vcpus=4), plugged)["vcpus"] == {"configured": 4, "live": 4, "maximum": 4}


def test_check_mode_foresees_room_that_more_memory_makes():
    limit = "<maxMemory unit='GiB' slots='4'>9</maxMemory>"
    known = facts(definition=definition(limit=limit))
    assert foreseen(Request(memory=10 * GIB), known)["memory"]["maximum"] == 10 * GIB
