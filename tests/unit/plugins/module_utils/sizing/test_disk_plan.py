# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of disks and of what is on them, from facts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    AgentSilent,
    Busy,
    NoSpace,
    NotFound,
    Refused,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    BlockJob,
    DomainState,
    Layer,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change import (
    DiskGrowth,
    DiskShrink,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import (
    DiskFacts,
    Facts,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.guest_filesystem import Filesystem
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import DiskRequest, Request
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing.a_domain import (
    DISK,
    GIB,
    MIB,
    domain,
    facts,
    only,
    ways,
)


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


@pytest.mark.parametrize("kind", ["block", "volume"])
def test_a_raw_disk_becomes_as_large_as_its_device_and_not_less(kind):
    raw = replace(DISK, chain=(Layer("/dev/vg/lv", "raw", kind),), kind=kind)
    with pytest.raises(Refused, match="Give size: 3221225472"):
        compute(grown(), disk_facts(disk=raw, device_size=3 * GIB))
    assert only(grown(), disk_facts(disk=raw, device_size=2 * GIB)).action.kind == "block"
    assert only(grown(), disk_facts(device_size=3 * GIB)).action.kind == "block", "a qcow2 image on a device"
    assert only(grown(), disk_facts(disk=replace(raw, encrypted=True), device_size=3 * GIB)).due


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


LAST = Filesystem("vda", "sda1", "/", "ext4", "sda", GIB // 2, 1, MIB, GIB // 2 - MIB, GIB // 2 - MIB)
ONLY_WHAT_IS_ON_IT = (DiskRequest("vda", None),)


def test_a_disk_that_the_guest_has_not_noticed_waits_for_a_start_and_its_filesystem_with_it():
    known = replace(disk_facts(), filesystems=(LAST,))
    for disks in (ONLY_WHAT_IS_ON_IT, (DiskRequest("vda", GIB),)):
        waits = compute(Request(disks=disks), known)
        assert not waits.due
        assert waits.changes[0].warn
        assert "has not noticed" in waits.pending[0]
        assert ways(Request(disks=disks, allow_restart=True), known) == {
            "disk vda": "restart",
            "filesystem vda": "restart",
        }


def test_for_the_next_boot_no_filesystem_grows():
    known = replace(disk_facts(), filesystems=(replace(LAST, disk_size=GIB),))
    assert ways(Request(disks=ONLY_WHAT_IS_ON_IT), known) == {"filesystem vda": "live"}
    change = only(Request(disks=ONLY_WHAT_IS_ON_IT, apply="next_boot"), known)
    assert change.how == "none"
    assert "next_boot" in change.why


@pytest.mark.parametrize(
    ("mounted", "says"),
    [
        ({"type": "xfs"}, "XFS cannot"),
        ({"type": "btrfs"}, "btrfs cannot"),
        (
            {"covered": True, "problem": "another partition lies behind vda1"},
            "another partition lies behind.*shut down first",
        ),
    ],
)
def test_what_the_running_guest_says_cannot_be_smaller_costs_no_shutdown(mounted, says):
    known = replace(disk_facts(), filesystems=(replace(FILESYSTEM, **mounted),))
    with pytest.raises(Refused, match=says):
        compute(shrunk(), known)


@pytest.mark.parametrize("mounted", [{}, {"type": "ext2", "problem": "filesystems of type ext2 are not grown"}])
def test_what_may_be_smaller_by_the_running_guest_is_tried(mounted):
    known = replace(disk_facts(), filesystems=(replace(FILESYSTEM, **mounted),))
    assert compute(shrunk(), known).restart


def test_what_lies_on_a_smaller_disk_with_room_left_grows_after_the_start():
    short = replace(FILESYSTEM, device_size=GIB // 4, size=GIB // 4)
    known = replace(disk_facts(), filesystems=(short,))
    planned = compute(shrunk(), known)
    assert {change.what: change.how for change in planned.due} == {"disk vda": "restart", "filesystem vda": "restart"}
    assert planned.changes[1].action.disk_size == GIB // 2
    alone = Request(disks=(DiskRequest("vda", GIB // 2, False),), allow_shrink=True, allow_restart=True)
    assert ways(alone, known) == {"disk vda": "restart"}
    assert ways(shrunk(), replace(known, filesystems=(FILESYSTEM,))) == {"disk vda": "restart"}
