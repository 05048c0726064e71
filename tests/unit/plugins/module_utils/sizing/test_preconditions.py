# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What must hold before a size is changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    AgentSilent,
    Busy,
    NoSpace,
    Refused,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import AgentInfo
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Disk,
    DomainState,
    Layer,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import space
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import (
    DiskFacts,
    Host,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.preconditions import check_host
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import DiskRequest, Request
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing.a_domain import (
    GIB,
    MIB,
    domain,
    facts,
)


def test_a_restart_needs_somebody_who_tells_whether_it_went_well():
    silent = facts(agent=None, agent_problem="no channel", cpus=None)
    with pytest.raises(AgentSilent):
        compute(Request(vcpus=8, allow_restart=True), silent)
    assert compute(Request(vcpus=8, allow_restart=True, rollback=False), silent).restart


def test_a_health_command_needs_guest_exec():
    closed = facts(agent=AgentInfo("7", frozenset({"guest-ping"})), cpus=None)
    with pytest.raises(AgentSilent, match="guest-exec"):
        compute(Request(vcpus=8, allow_restart=True, health_command=("true",)), closed)


@pytest.mark.parametrize("request_", [Request(vcpus=4), Request(memory=2 * GIB)])
def test_more_than_the_host_has_is_refused_unless_asked_for(request_):
    known = facts(host=Host(cpus=2, free_memory=MIB))
    with pytest.raises(Refused, match="overcommit"):
        compute(request_, known)
    assert compute(replace(request_, overcommit=True), known).due


def test_hugepages_are_counted_for_a_domain_that_uses_them():
    live = domain(hugepages=2 * MIB)
    poor = facts(live=live, host=Host(cpus=8, free_memory=64 * GIB, free_hugepages={2 * MIB: 3}))
    with pytest.raises(Refused, match="hugepages"):
        compute(Request(memory=2 * GIB), poor)


@pytest.mark.parametrize(
    ("live", "conf", "refused"),
    [
        ({"hard_limit": 2 * GIB}, {}, True),
        ({}, {"hard_limit": 2 * GIB}, True),
        ({"hard_limit": 3 * GIB}, {"hard_limit": 3 * GIB}, False),
        ({"hard_limit": 2 * GIB, "hugepages": 0}, {"hard_limit": 2 * GIB, "hugepages": 0}, False),
        ({}, {}, False),
    ],
)
def test_memory_up_to_the_limit_at_which_qemu_is_ended_is_refused_however_it_comes(live, conf, refused):
    room = {"memory_limit": 4 * GIB, "memory_slots": 4}
    known = facts(live=domain(**room, **live), conf=domain(**room, **conf))
    for request in (Request(memory=2 * GIB, overcommit=True), Request(memory=GIB // 2, overcommit=True)):
        if refused and request.memory == 2 * GIB:
            with pytest.raises(Refused, match="hard_limit"):
                compute(request, known)
        else:
            assert compute(request, known).due


def test_a_limit_that_the_next_start_has_no_more_keeps_nothing_from_it():
    known = facts(live=domain(hard_limit=2 * GIB), conf=domain())
    assert compute(Request(memory=2 * GIB, allow_restart=True, overcommit=True), known).restart


@pytest.mark.parametrize(
    ("known", "error"),
    [
        (facts(live=domain(managed_save=True)), Refused),
        (facts(job="a backup"), Busy),
        (facts(frozen=True), Refused),
        (facts(live=domain(state=DomainState("paused", "user"))), Refused),
    ],
)
def test_a_condition_in_which_nothing_may_change_is_refused(known, error):
    with pytest.raises(error):
        compute(Request(vcpus=4), known)


def test_what_several_domains_take_is_asked_for_together():
    request = Request(memory=2 * GIB)
    known = facts(host=Host(cpus=8, free_memory=3 * GIB // 2))
    planned = [(known, compute(request, known).changes)] * 2
    check_host(request, planned[:1])
    with pytest.raises(Refused, match=r"2\.0 GiB more"):
        check_host(request, planned)
    check_host(replace(request, overcommit=True), planned)
    huge = facts(live=domain(hugepages=0), host=Host(8, 64 * GIB, {2 * MIB: 768}, 2 * MIB))
    with pytest.raises(Refused, match="hugepages of 2"):
        check_host(request, [(huge, compute(request, huge).changes)] * 2)


def test_what_several_disks_take_is_asked_of_the_filesystem_that_they_really_lie_on(tmp_path, monkeypatch):
    (tmp_path / "pool").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pool" / "b.qcow2")
    paths = {"vda": tmp_path / "pool" / "a.qcow2", "vdb": tmp_path / "link"}
    disks = {
        target: Disk(target, "disk", "file", "virtio", (Layer(str(path), "qcow2"),)) for target, path in paths.items()
    }
    known = facts(
        live=domain(disks=tuple(disks.values())),
        disks={target: DiskFacts(disk, GIB, disk.chain) for target, disk in disks.items()},
    )
    asked = []

    def free_bytes(directory):
        asked.append(directory)
        return 3 * GIB // 2

    monkeypatch.setattr(space, "free_bytes", free_bytes)
    compute(Request(disks=(DiskRequest("vda", 2 * GIB, False),)), known)
    both = Request(disks=(DiskRequest("vda", 2 * GIB, False), DiskRequest("vdb", 2 * GIB, False)))
    with pytest.raises(NoSpace, match="overcommit"):
        compute(both, known)
    assert set(asked) == {str(tmp_path / "pool")}
    assert compute(replace(both, overcommit=True), known).due
