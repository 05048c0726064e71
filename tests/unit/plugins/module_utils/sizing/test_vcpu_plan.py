# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How vCPUs come and go, from facts alone."""

from __future__ import annotations

from dataclasses import replace

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Vcpu,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change import (
    VcpuAction,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import (
    GuestCpus,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import Request
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing.a_domain import (
    AGENT,
    domain,
    facts,
    only,
    ways,
)


def test_vcpus_within_the_maximum_are_plugged_live():
    assert only(Request(vcpus=4), facts()).action == VcpuAction(4, 4)


def test_vcpus_that_the_guest_left_offline_are_brought_online():
    known = facts(cpus=GuestCpus(frozenset({0}), frozenset({1}), frozenset()))
    assert only(Request(vcpus=2), known).action == VcpuAction(None, 2)


HOTPLUGGED = tuple(Vcpu(number, number < 4, number > 0) for number in range(4))


def test_hotpluggable_vcpus_are_unplugged_under_kvm_and_taken_offline_under_emulation():
    kvm = domain(vcpus_current=4, vcpus=HOTPLUGGED)
    assert only(Request(vcpus=1), facts(live=kvm)).action == VcpuAction(1, 1)
    emulated = replace(kvm, domain_type="qemu")
    change = only(Request(vcpus=1), facts(live=emulated))
    assert change.action == VcpuAction(None, 1)
    assert change.completes_at_restart


def test_vcpus_of_the_boot_need_a_restart_where_the_agent_cannot_help():
    assert ways(Request(vcpus=1, allow_restart=True), facts(cpus=None)) == {"vcpus": "restart"}


def test_vcpus_that_are_offline_in_the_guest_already_change_nothing_again():
    known = facts(
        conf=domain(vcpus_current=1),
        cpus=GuestCpus(frozenset({0}), frozenset({1}), frozenset()),
    )
    planned = compute(Request(vcpus=1), known)
    assert not planned.due
    assert "next start" in planned.pending[0]


def test_vcpus_that_the_guest_cannot_see_are_said_and_never_lead_to_a_restart():
    live = domain(vcpus_current=4)
    known = facts(live=live, cpus=GuestCpus(frozenset({0, 1}), frozenset(), frozenset({1})))
    planned = compute(Request(vcpus=4, allow_restart=True), known)
    assert not planned.due
    assert planned.changes[0].warn
    assert "it sees 2" in planned.changes[0].why
    # One start brings what the definition does not say yet.
    assert ways(Request(vcpus=4, allow_restart=True), replace(known, configured=domain(vcpus_current=2))) == {
        "vcpus": "restart"
    }


def test_vcpus_that_stay_offline_are_no_reason_for_a_start_that_brings_the_same():
    known = facts(cpus=GuestCpus(frozenset({0}), frozenset({1}), frozenset()))
    change = only(Request(vcpus=2, allow_restart=True), known)
    assert (change.how, change.restart_helps) == ("live", False)


def test_a_guest_that_does_not_tell_and_has_what_was_asked_is_no_matter_of_a_warning():
    assert not compute(Request(vcpus=2), facts(cpus=None)).changes


def test_vcpus_that_nobody_may_bring_online_are_said():
    closed = replace(AGENT, commands=AGENT.commands - {"guest-set-vcpus"})
    known = facts(agent=closed, cpus=GuestCpus(frozenset({0}), frozenset({1}), frozenset()))
    change = only(Request(vcpus=2, allow_restart=True), known)
    assert (change.how, change.warn) == ("none", True)
    assert "its agent may not" in change.why
