# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How each change is applied, and why, from facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    AgentSilent,
    Busy,
    InvalidInput,
    NoSpace,
    NotFound,
    Refused,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import AgentInfo
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    BlockJob,
    Disk,
    Domain,
    DomainState,
    Layer,
    MemoryDevice,
    Vcpu,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import (
    DiskGrowth,
    DiskShrink,
    MemoryAction,
    VcpuAction,
    compute,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import (
    DiskFacts,
    Facts,
    GuestCpus,
    GuestMemory,
    Host,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.guest_filesystem import Filesystem
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import DiskRequest, Request

MIB = 1 << 20
GIB = 1 << 30

AGENT = AgentInfo(
    "7.2",
    frozenset(
        [
            "guest-get-vcpus",
            "guest-set-vcpus",
            "guest-get-memory-blocks",
            "guest-set-memory-blocks",
            "guest-get-memory-block-info",
            "guest-get-fsinfo",
            "guest-exec",
            "guest-exec-status",
        ]
    ),
)
DISK = Disk("vda", "disk", "file", "virtio", (Layer("/nowhere/vda.qcow2", "qcow2"),))


def domain(**values) -> Domain:
    base = Domain(
        name="d",
        uuid="1",
        state=DomainState("running"),
        persistent=True,
        disks=(DISK,),
        memory_max=GIB,
        memory_current=GIB,
        vcpus_max=4,
        vcpus_current=2,
        arch="x86_64",
    )
    return replace(base, **values)


def facts(*, live: Domain | None = None, conf: Domain | None = None, **values) -> Facts:
    running = live or domain()
    base = Facts(
        configured=conf or running,
        live=running,
        agent=AGENT,
        cpus=GuestCpus(
            frozenset(range(running.vcpus_current)), frozenset(), frozenset(range(1, running.vcpus_current))
        ),
        memory=GuestMemory(total=GIB, available=GIB // 2, block_size=128 * MIB),
        balloon=running.memory_current,
        disks={"vda": DiskFacts(DISK, GIB, DISK.chain)},
        host=Host(cpus=16, free_memory=64 * GIB),
    )
    return replace(base, **values)


def ways(request: Request, known: Facts) -> dict[str, str]:
    return {change.what: change.how for change in compute(request, known).changes}


def only(request: Request, known: Facts):
    (change,) = compute(request, known).changes
    return change


# --- vCPUs ---


def test_vcpus_within_the_maximum_are_plugged_live():
    assert only(Request(vcpus=4), facts()).action == VcpuAction(4, 4)


def test_nothing_is_due_when_all_three_values_agree():
    assert not compute(Request(vcpus=2, memory=GIB), facts()).changes


def test_vcpus_that_the_guest_left_offline_are_brought_online():
    known = facts(cpus=GuestCpus(frozenset({0}), frozenset({1}), frozenset()))
    assert only(Request(vcpus=2), known).action == VcpuAction(None, 2)


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


# --- memory ---


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
    ],
)
def test_why_no_dimm_can_be_plugged_is_said(live, wanted, says):
    change = only(Request(memory=wanted), facts(live=live))
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


# --- restart, host, condition ---


def test_a_restart_carries_what_would_have_been_plugged():
    assert ways(Request(vcpus=4, memory=2 * GIB, allow_restart=True), facts()) == {
        "vcpus": "restart",
        "memory": "restart",
    }


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


def test_room_is_made_at_the_next_boot_and_never_below_what_is_used():
    assert ways(Request(max_vcpus=8), facts()) == {"max_vcpus": "next_boot"}
    with pytest.raises(InvalidInput):
        compute(Request(max_vcpus=1), facts())


# --- disks ---


def grown(**values) -> Request:
    return Request(disks=(DiskRequest("vda", 2 * GIB, False),), **{"overcommit": True, **values})


def disk_facts(**values) -> Facts:
    return facts(disks={"vda": replace(DiskFacts(DISK, GIB, DISK.chain), **values)})


def test_a_disk_in_use_grows_live():
    assert isinstance(only(grown(), disk_facts()).action, DiskGrowth)


OVERLAY = (Layer("/nowhere/overlay", "qcow2"), *DISK.chain)


def test_a_resize_under_overlays_ends_our_checkpoints_and_refuses_for_others():
    assert only(grown(), disk_facts(layers=OVERLAY, checkpoints=("vmk-1-a",))).ends_checkpoints == ("vmk-1-a",)
    assert only(grown(), disk_facts(checkpoints=("other",))).ends_checkpoints == ()
    with pytest.raises(Refused, match="other"):
        compute(grown(), disk_facts(layers=OVERLAY, checkpoints=("vmk-1-a", "other")))


@pytest.mark.parametrize("trait", ["transient", "readonly", "shareable"])
def test_disks_that_must_not_change_are_refused(trait):
    with pytest.raises(Refused):
        compute(grown(), disk_facts(disk=replace(DISK, **{trait: True})))


def test_a_disk_with_a_job_is_busy_and_an_unknown_one_is_named():
    with pytest.raises(Busy):
        compute(grown(), disk_facts(disk=replace(DISK, job=BlockJob("commit", False, None))))
    with pytest.raises(NotFound, match="vda"):
        compute(Request(disks=(DiskRequest("vdz", GIB),)), facts())


def test_a_smaller_disk_is_refused():
    with pytest.raises(Refused, match="lost"):
        compute(Request(disks=(DiskRequest("vda", GIB // 2),)), facts())


def shrunk(**values) -> Request:
    return Request(
        disks=(DiskRequest("vda", GIB // 2),),
        **{"allow_shrink": True, "allow_restart": True, "rollback": True, **values},
    )


def test_a_smaller_disk_that_is_asked_for_is_a_restart_with_the_rest_carried_along():
    planned = compute(shrunk(vcpus=3), facts())
    assert {change.what: change.how for change in planned.due} == {"vcpus": "restart", "disk vda": "restart"}
    assert planned.shrinks == (DiskShrink("vda", GIB // 2, "/nowhere/vda.qcow2", "qcow2"),)
    assert not compute(shrunk(), disk_facts(size=GIB // 2)).shrinks


@pytest.mark.parametrize("option", [{"allow_restart": False}, {"rollback": False}, {"apply": "next_boot"}])
def test_a_smaller_disk_needs_a_restart_and_a_way_back(option):
    with pytest.raises(Refused, match="kept only if the domain is well"):
        compute(shrunk(**option), facts())


@pytest.mark.parametrize(
    ("trait", "says"),
    [
        ({"layers": (*DISK.chain, Layer("/nowhere/base", "qcow2"))}, "overlays"),
        ({"readers": ("the image /nowhere/clone",)}, "/nowhere/clone would see it cut"),
        ({"internal_snapshots": 1}, "internal snapshots"),
        ({"checkpoints": ("theirs",)}, "theirs of another tool"),
        (
            {"disk": replace(DISK, chain=(Layer("/dev/vg/lv", "raw", "block"),), kind="block")},
            "not a raw or qcow2 file",
        ),
    ],
)
def test_a_disk_that_others_need_is_not_made_smaller(trait, says):
    with pytest.raises(Refused, match=says):
        compute(shrunk(), disk_facts(**trait))


def test_our_checkpoints_end_with_a_smaller_disk_and_only_while_the_domain_runs():
    known = disk_facts(checkpoints=("vmk-1-2",))
    (change,) = compute(shrunk(), known).due
    assert change.ends_checkpoints == ("vmk-1-2",)
    off = replace(known, live=None, configured=domain(agent_configured=True), agent=None)
    with pytest.raises(Refused, match="start it first"):
        compute(shrunk(), off)


def test_a_stopped_domain_that_nobody_could_judge_is_not_started_for_a_smaller_disk():
    off = replace(facts(), live=None, configured=domain(agent_configured=False), agent=None)
    with pytest.raises(AgentSilent, match="no guest agent channel"):
        compute(shrunk(), off)


def test_a_device_below_must_have_the_room():
    with pytest.raises(Refused, match="Extend the device"):
        compute(grown(), disk_facts(device_size=GIB))


def test_space_is_asked_for(tmp_path):
    disk = replace(DISK, chain=(Layer(str(tmp_path / "x"), "qcow2"),))
    with pytest.raises(NoSpace):
        compute(Request(disks=(DiskRequest("vda", 1 << 60, False),)), disk_facts(disk=disk))


def test_a_stopped_disk_with_checkpoints_waits_for_the_domain_to_run():
    off = domain(state=DomainState("shutoff"))
    known = replace(disk_facts(checkpoints=("vmk-1-a",)), live=None, configured=off, agent=None, balloon=None)
    with pytest.raises(Refused, match="Start the domain"):
        compute(grown(), known)


FILESYSTEM = Filesystem("vda", "vda1", "/", "ext4", "vda", GIB, 1, MIB, GIB - 2 * MIB, GIB - 2 * MIB)


def test_a_filesystem_follows_its_disk_and_is_left_alone_when_it_fills_it():
    known = facts(filesystems=(FILESYSTEM,))
    request = Request(disks=(DiskRequest("vda", 2 * GIB),), overcommit=True)
    assert ways(request, known) == {"disk vda": "live", "filesystem vda": "live"}
    assert not compute(Request(disks=(DiskRequest("vda", GIB),)), known).changes


def test_a_filesystem_that_cannot_be_grown_is_an_entry_that_says_why():
    known = facts(filesystems_problem="the guest agent does not allow guest-exec")
    change = only(Request(disks=(DiskRequest("vda", GIB),)), known)
    assert (change.how, "guest-exec" in change.why, change.due) == ("none", True, False)
