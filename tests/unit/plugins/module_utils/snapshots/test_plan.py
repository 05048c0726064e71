# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    AgentSilent,
    Busy,
    Conflict,
    InvalidInput,
    Refused,
    Unsupported,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import AgentInfo
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    BlockJob,
    Disk,
    Domain,
    DomainState,
    Layer,
    Nvram,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import plan
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.model import Labels, Snapshot, SnapshotDisk
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.plan import (
    Facts,
    Request,
    compare_existing,
    plan_take,
)

GIB = 1 << 30
FREEZER = AgentInfo("7", frozenset({"guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"}))
CLEAN = DomainState("shutoff", "shutdown")


def disk(target, path=None, image_format="qcow2", **options):
    kind = "block" if (path or "").startswith("/dev/") else "file"
    return Disk(
        target, "disk", kind, "virtio", (Layer(path or f"/images/{target}.img", image_format, kind),), **options
    )


RUNNING = DomainState("running")


def domain(*disks, state=RUNNING, **options):
    options.setdefault("agent_configured", True)
    return Domain("web", "u1", state, options.pop("persistent", True), disks or (disk("vda"), disk("vdb")), **options)


def facts(one=None, **options):
    one = one or domain()
    options.setdefault("agent", FREEZER)
    return Facts(one, sizes={each.target: 10 * GIB for each in one.disks}, **options)


def take(one=None, *, exists=lambda _path: False, request=None, **options):
    return plan_take(request or Request("new", **options), one if isinstance(one, Facts) else facts(one), exists)


def snapshot(name="old", mode="external", **options):
    disks = tuple(
        SnapshotDisk(target, mode, f"/{target}", "qcow2", f"/{target}.o")
        for target in options.pop("targets", ("vda", "vdb"))
    )
    created = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    options.setdefault("labels", Labels("filesystem", tags={"a": "b"}))
    return Snapshot(name, created, options.pop("state", "disk-snapshot"), disks, **options)


def test_a_running_domain_is_frozen_and_gets_an_overlay_beside_each_image():
    planned = take()
    assert (planned.mode, planned.freeze, planned.shutdown, planned.expected_level) == (
        "external",
        True,
        False,
        "filesystem",
    )
    assert [one.path for one in planned.overlays] == ["/images/web.vda.new.qcow2", "/images/web.vdb.new.qcow2"]
    assert {(one.base_format, one.size) for one in planned.overlays} == {("qcow2", 10 * GIB)}
    assert "keeps running" in planned.mode_reason


def test_a_block_device_gets_its_overlay_in_the_default_pool_and_a_directory_goes_before_all():
    block = domain(disk("vda", "/dev/vg/lv", "raw"))
    assert take(block).overlays[0].path == "/var/lib/libvirt/images/web.vda.new.qcow2"
    assert take(block, directory="/srv").overlays[0].path == "/srv/web.vda.new.qcow2"


def test_a_name_that_is_taken_is_never_reused():
    taken = {"/images/web.vda.new.qcow2", "/images/web.vda.new.2.qcow2"}
    assert take(exists=taken.__contains__).overlays[0].path == "/images/web.vda.new.3.qcow2"


def test_memory_goes_beside_the_first_overlay_and_nothing_is_frozen_for_it():
    planned = take(memory=True)
    assert planned.memory_file == "/images/web.new.memory"
    assert (planned.freeze, planned.expected_level) == (False, "memory")
    off = take(domain(state=CLEAN), memory=True)
    assert (off.memory, off.memory_file, off.expected_level) == (False, None, "offline")


@pytest.mark.parametrize(
    ("state", "quiesce", "level"),
    [
        (DomainState("running"), "auto", "filesystem"),
        (DomainState("running"), "never", "crash"),
        (DomainState("running"), "shutdown", "offline"),
        (DomainState("paused"), "auto", "crash"),
        (DomainState("crashed"), "auto", "crash"),
        (CLEAN, "auto", "offline"),
        (CLEAN, "required", "offline"),
        (CLEAN, "shutdown", "offline"),
        (DomainState("shutoff", "destroyed"), "auto", "crash"),
    ],
)
def test_the_level_that_is_promised(state, quiesce, level):
    assert take(domain(state=state), quiesce=quiesce).expected_level == level


@pytest.mark.parametrize(
    ("one", "options", "error", "words"),
    [
        (facts(domain(managed_save=True)), {}, Refused, "virsh managedsave-remove web"),
        (facts(job="a migration"), {}, Busy, "a migration"),
        (facts(domain(disk("vda", job=BlockJob("copy", False, None)))), {}, Busy, "running block job"),
        (facts(), {"memory": True, "quiesce": "shutdown"}, InvalidInput, "exclude each other"),
        (facts(), {"memory": True, "quiesce": "required"}, InvalidInput, "frozen guest"),
        (facts(domain(persistent=False)), {"quiesce": "shutdown"}, Refused, "transient"),
        (facts(domain(state=DomainState("paused"))), {"quiesce": "shutdown"}, Refused, "cannot be shut down cleanly"),
        (facts(domain(state=DomainState("paused"))), {"quiesce": "required"}, AgentSilent, "is paused"),
        (facts(domain(state=DomainState("shutoff", "destroyed"))), {"quiesce": "required"}, Refused, "(destroyed)"),
        (facts(agent=None, agent_problem="not connected"), {"quiesce": "required"}, AgentSilent, "not connected"),
        (facts(), {"exclude": ("vda", "vdb")}, Refused, "no disk that a snapshot can hold"),
        (facts(frozen=True), {"memory": True}, Refused, "Thaw it first"),
        (facts(frozen=True), {"quiesce": "shutdown"}, Refused, "Thaw it first"),
        (facts(domain(disk("vda", encrypted=True))), {}, Unsupported, "in the clear"),
        (Facts(domain(), agent=FREEZER), {}, Unsupported, "virtual size"),
        (facts(layers={"vda": 25, "vdb": 1}, longest_startable=25), {}, Refused, "could not start the guest again"),
    ],
)
def test_what_is_refused_before_anything_is_made(one, options, error, words):
    with pytest.raises(error) as raised:
        take(one, **options)
    assert words in str(raised.value)
    assert "Nothing was changed." in str(raised.value)
    assert raised.value.advice


def test_a_chain_may_grow_as_long_as_the_guest_can_be_started_on_it():
    assert take(facts(layers={"vda": 24, "vdb": 1}, longest_startable=25)).overlays
    assert take(facts(layers={"vda": 25, "vdb": 1}, longest_startable=25), exclude=("vda",)).overlays


def test_a_guest_that_somebody_froze_is_cut_as_it_is():
    planned = take(facts(frozen=True, frozen_whole=True), quiesce="required")
    assert (planned.freeze, planned.standing, planned.expected_level) == (False, True, "filesystem")


def test_a_guest_that_was_frozen_by_other_means_proves_nothing():
    planned = take(facts(frozen=True))
    assert (planned.freeze, planned.standing, planned.expected_level) == (False, False, "crash")
    assert "by other means" in planned.why_not_frozen
    with pytest.raises(Refused, match="Thaw it first"):
        take(facts(frozen=True), quiesce="required")


def test_a_shutdown_is_refused_when_the_next_start_would_stand_on_other_disks():
    same = facts(next_start=domain(state=CLEAN))
    assert take(same, quiesce="shutdown").shutdown
    other = facts(next_start=domain(disk("vda", "/other"), disk("vdb"), state=CLEAN))
    with pytest.raises(Refused, match="another one at its next start"):
        take(other, quiesce="shutdown")


def test_checkpoints_are_no_obstacle_to_a_live_external_snapshot():
    assert take(domain(checkpoints=("c",))).mode == "external"


def test_checkpoints_are_no_obstacle_to_an_external_snapshot_of_a_domain_that_is_off():
    assert take(domain(checkpoints=("c",), state=CLEAN)).mode == "external"


@pytest.mark.parametrize(
    ("one", "options", "words"),
    [
        (facts(domain(disk("vda", image_format="raw"), state=CLEAN)), {}, "vda is raw"),
        (facts(domain(disk("vda", image_format=None), state=CLEAN)), {}, "unknown format"),
        (facts(domain(state=CLEAN, nvram=Nvram("/v"))), {}, "UEFI variables"),
        (facts(domain(state=CLEAN, checkpoints=("c",))), {}, "kills QEMU"),
        (facts(domain(state=CLEAN)), {"exclude": ("vdb",)}, "some are left out"),
        (facts(domain(state=CLEAN), snapshots=(snapshot(),)), {}, "external snapshots"),
        (facts(), {}, "memory: true"),
    ],
)
def test_an_internal_snapshot_is_refused_where_it_hurts(one, options, words):
    with pytest.raises(Unsupported, match="mode: external") as raised:
        take(one, mode="internal", **options)
    assert words in str(raised.value)


def test_an_internal_snapshot_is_taken_where_it_does_not():
    assert take(domain(state=CLEAN, nvram=Nvram("/v", "qcow2")), mode="internal").mode == "internal"
    planned = take(mode="internal", memory=True)
    assert (planned.overlays, planned.memory_file, planned.memory) == ((), None, True)


@pytest.mark.parametrize(("size", "expected"), [(1, 64 << 20), (4 * GIB, 4 * GIB // 20), (1 << 50, GIB)])
def test_room_is_reserved_in_proportion_within_bounds(size, expected):
    assert plan.reserve(size) == expected


def test_room_is_asked_for_where_each_file_goes():
    planned = take(domain(disk("vda"), disk("vdb", "/dev/x", "raw"), memory_max=2 * GIB), memory=True)
    assert planned.needs() == [
        ("/images", GIB // 2),
        ("/var/lib/libvirt/images", GIB // 2),
        ("/images", 2 * GIB + (64 << 20)),
    ]


def parsed(planned):
    root = ElementTree.fromstring(plan.snapshot_xml(planned))
    return root, {one.get("name"): one for one in root.iterfind("disks/disk")}


def test_the_xml_names_every_disk_so_that_libvirt_chooses_nothing():
    cdrom = Disk("sda", "cdrom", "file", "sata", (Layer("/x.iso", "raw"),), readonly=True)
    empty = Disk("sdb", "cdrom", "file", "sata", ())
    root, disks = parsed(take(domain(disk("vda"), disk("vdb"), cdrom, empty), exclude=("vdb",), description="<&>"))
    assert root.findtext("description") == "<&>"
    assert root.find("memory").get("snapshot") == "no"
    assert {name: one.get("snapshot") for name, one in disks.items()} == {"vda": "external", "vdb": "no", "sda": "no"}
    assert disks["vda"].find("source").get("file") == "/images/web.vda.new.qcow2"
    assert disks["vda"].find("driver").get("type") == "qcow2"


def test_the_xml_of_memory_and_of_internal_snapshots():
    root, _disks = parsed(take(memory=True))
    assert root.find("memory").attrib == {"snapshot": "external", "file": "/images/web.new.memory"}
    root, disks = parsed(take(mode="internal", memory=True))
    assert root.find("memory").get("snapshot") == "internal"
    assert {one.get("snapshot") for one in disks.values()} == {"internal"}
    root, _disks = parsed(take(domain(state=CLEAN), mode="internal"))
    assert root.find("memory") is None


def test_a_snapshot_that_is_there_is_left_alone():
    have = facts(snapshots=(snapshot(),))
    assert compare_existing(Request("new"), have) is None
    for request in (
        Request("old"),
        Request("old", quiesce="required"),
        Request("old", tags={"a": "b"}),
        Request("old", disks=("vda", "vdb")),
        Request("old", mode="external"),
        Request("old", description=""),
    ):
        assert compare_existing(request, have).relabel is None


def test_new_labels_are_stored_and_nothing_else_of_them_is_lost():
    found = compare_existing(Request("old", tags={}, description="why"), facts(snapshots=(snapshot(),)))
    assert (found.relabel.tags, found.relabel.consistency, found.description) == ({}, "filesystem", "why")


@pytest.mark.parametrize(
    ("there", "request_options", "words"),
    [
        (snapshot(targets=("vda",)), {"disks": ("vda", "vdb")}, "holds vda and not vda, vdb"),
        (snapshot(), {"memory": True}, "has no memory"),
        (snapshot(), {"mode": "internal"}, "it is external"),
        (snapshot(labels=Labels("crash")), {"quiesce": "required"}, "quiesce is required"),
        (snapshot(labels=None), {"quiesce": "required"}, "consistency is crash"),
        (snapshot(), {"quiesce": "shutdown"}, "was not shut down"),
    ],
)
def test_a_snapshot_with_other_content_is_a_conflict(there, request_options, words):
    with pytest.raises(Conflict, match="Choose another name") as raised:
        compare_existing(Request("old", **request_options), facts(snapshots=(there,)))
    assert words in str(raised.value)


def test_a_group_has_it_everywhere_or_nowhere():
    found = plan.Existing(snapshot())
    plan.check_group([("a", found), ("b", found)], "old")
    plan.check_group([("a", None), ("b", None)], "old")
    with pytest.raises(Conflict, match="exists on a and not on b"):
        plan.check_group([("a", found), ("b", None)], "old")


def test_labels_carry_what_was_decided():
    labels = replace(take(exclude=("vdb",), tags={"x": "y"})).labels("filesystem", 120, None)
    assert (labels.consistency, labels.frozen_ms, labels.paused_ms) == ("filesystem", 120, None)
    assert labels.tags == {"x": "y"}
    assert labels.not_captured[0]["reason"] == "excluded"
