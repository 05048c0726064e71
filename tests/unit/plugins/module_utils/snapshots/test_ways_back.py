# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plans of commit, removal and revert, on facts made by hand."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    Busy,
    InvalidInput,
    NotFound,
    Refused,
    VmkeeperError,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    BlockJob,
    Disk,
    Domain,
    DomainState,
    Layer,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.host_graph import HostGraph, Reader
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import revert_plan
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.commit_plan import Request, plan_commit
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.ground import Ground, Image
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.merge_plan import Work
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.model import Labels, Snapshot, SnapshotDisk
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.removal_plan import plan_removal

WEB = Reader("domain", "web", "u")
EPOCH = datetime.datetime.fromtimestamp(0, datetime.timezone.utc)


def snapshot(name: str, base: str, overlay: str, parent: str | None = None, labels: Labels | None = None) -> Snapshot:
    """An external snapshot of vda."""
    disk = SnapshotDisk("vda", "external", base, "qcow2", overlay)
    return Snapshot(name, EPOCH, "disk-snapshot", (disk,), parent=parent, labels=labels)


def ground(*paths: str, snapshots: tuple[Snapshot, ...] = (), active: bool = True) -> Ground:
    """A domain whose disk vda has these layers, from the active one down, and these snapshots."""
    layers = tuple(Layer(path, "qcow2") for path in paths)
    state = DomainState("running") if active else DomainState("shutoff", "shutdown")
    domain = Domain("web", "u", state, True, (Disk("vda", "disk", "file", "virtio", layers),))
    named: dict[str, tuple[Reader, ...]] = {paths[0]: (WEB,)}
    for one in snapshots:
        base = str(one.disks[0].base)
        named[base] = (*named.get(base, ()), Reader("snapshot", one.name, "u", "web"))
    below = dict(zip(paths, paths[1:]))
    return Ground(
        domain=domain,
        snapshots=snapshots,
        graph=HostGraph(named, below),
        chains={"vda": layers},
        images={path: Image(1 << 20) for path in paths},
    )


TWO = ground("/c", "/b", "/a", snapshots=(snapshot("one", "/a", "/b"), snapshot("two", "/b", "/c", "one")))


def test_a_flat_chain_is_one_merge_that_ends_every_snapshot() -> None:
    plan = plan_commit(Request(), TWO)
    (merge,) = plan.work.merges
    assert (merge.base, merge.merged) == ("/a", ("/c", "/b"))
    assert plan.work.ended == ("one", "two")
    assert plan.after("vda") == ("/a",)


def test_keep_merges_from_below_and_moves_the_snapshot_that_stays() -> None:
    plan = plan_commit(Request(keep=2), TWO)
    (merge,) = plan.work.merges
    assert (merge.base, merge.merged, merge.above) == ("/a", ("/b",), ("/c",))
    assert plan.work.ended == ("one",)
    assert [(one.snapshot, one.path) for one in plan.work.rebased] == [("two", "/a")]


def test_a_short_chain_is_left_alone() -> None:
    assert plan_commit(Request(keep=3), TWO).work.merges == ()


def test_a_plan_survives_the_journal() -> None:
    work = plan_commit(Request(keep=2), TWO).work
    assert Work.from_json(work.to_json()) == work


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (Request(keep=0), InvalidInput),
        (Request(top="/b"), InvalidInput),
        (Request(disks=("vda",), top="/b", keep=2), InvalidInput),
        (Request(disks=("vda",), top="/a", base="/b"), InvalidInput),
        (Request(disks=("vda",), base="/elsewhere"), NotFound),
        (Request(disks=("vdz",)), NotFound),
    ],
)
def test_what_cannot_be_meant_is_refused(request_: Request, kind: type[VmkeeperError]) -> None:
    with pytest.raises(kind):
        plan_commit(request_, TWO)


def shared_base() -> Ground:
    """Another domain stands on the lowest layer."""
    graph = TWO.graph
    named = {**graph.named, "/clone": (Reader("domain", "db", "v"),)}
    return replace(TWO, graph=HostGraph(named, {**graph.below, "/clone": "/a"}))


def test_a_base_with_an_own_snapshot_in_it_that_others_read_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="domain 'db'"):
        plan_commit(Request(), shared_base())


def test_the_base_of_linked_clones_stays_and_what_is_above_it_is_merged() -> None:
    clone = ground("/c", "/b", "/golden", snapshots=(snapshot("two", "/b", "/c"),))
    named = {**clone.graph.named, "/other": (Reader("domain", "db", "v"),)}
    clone = replace(clone, graph=HostGraph(named, {**clone.graph.below, "/other": "/golden"}))
    plan = plan_commit(Request(), clone)
    assert [(merge.base, merge.merged) for merge in plan.work.merges] == [("/b", ("/c",))]
    assert "db" in plan.notes[0]
    with pytest.raises(Refused, match="domain 'db'"):
        plan_commit(Request(disks=("vda",), base="/golden"), clone)


def test_an_image_that_a_process_has_open_is_refused() -> None:
    opened = {"/b": (Reader("process", "qemu-nbd (7)"),)}
    with pytest.raises(Busy, match="qemu-nbd"):
        plan_commit(Request(), replace(TWO, opened=opened))


def test_a_branch_in_the_middle_is_refused() -> None:
    branch = snapshot("branch", "/side", "/gone", "one")
    found = replace(TWO, snapshots=(*TWO.snapshots, branch))
    named = {**TWO.graph.named, "/side": (Reader("snapshot", "branch", "u", "web"),)}
    found = replace(found, graph=HostGraph(named, {**TWO.graph.below, "/side": "/a"}))
    with pytest.raises(Refused, match="'branch'"):
        plan_commit(Request(), found)


def test_a_layer_that_is_smaller_than_the_one_below_is_refused() -> None:
    images = {**TWO.images, "/b": Image(1 << 19)}
    with pytest.raises(Refused, match="smaller"):
        plan_commit(Request(), replace(TWO, images=images))


def test_a_missing_layer_is_refused() -> None:
    images = {**TWO.images, "/b": Image(exists=False)}
    with pytest.raises(Refused, match="missing"):
        plan_commit(Request(), replace(TWO, images=images))


def test_a_protected_snapshot_is_neither_ended_nor_removed() -> None:
    held = ground("/b", "/a", snapshots=(snapshot("one", "/a", "/b", labels=Labels("crash", protected=True)),))
    with pytest.raises(Refused, match="protected"):
        plan_commit(Request(), held)
    with pytest.raises(Refused, match="protected"):
        plan_removal("one", held)


def test_removing_the_first_of_two_moves_the_second() -> None:
    plan = plan_removal("one", TWO)
    assert plan is not None
    (merge,) = plan.work.merges
    assert (merge.base, merge.merged, merge.above) == ("/a", ("/b",), ("/c",))
    assert [(one.snapshot, one.path) for one in plan.work.rebased] == [("two", "/a")]
    assert plan.kept == ()
    assert plan_removal("none", TWO) is None


def test_removing_a_snapshot_that_two_branches_stand_on_keeps_its_layer() -> None:
    named = {**TWO.graph.named, "/side": (Reader("snapshot", "branch", "u", "web"),)}
    branched = replace(TWO, graph=HostGraph(named, {**TWO.graph.below, "/side": "/a"}))
    plan = plan_removal("one", branched)
    assert plan is not None
    assert plan.work.merges == ()
    assert {reader["name"] for reader in plan.kept[0]["for"]} == {"two", "web", "branch"}


def test_removing_the_tip_of_a_dead_branch_deletes_its_layers_and_never_a_base() -> None:
    lone = ground("/c", "/a", snapshots=(snapshot("dead", "/x", "/gone"),))
    lone = replace(lone, graph=HostGraph(lone.graph.named, {**lone.graph.below, "/x": "/y", "/y": "/a"}))
    plan = plan_removal("dead", lone)
    assert plan is not None
    assert plan.work.files == ("/x", "/y")
    base = ground("/c", "/a", snapshots=(snapshot("dead", "/base", "/gone"),))
    plan = plan_removal("dead", base)
    assert plan is not None
    assert plan.work.files == ()


def test_a_managed_save_refuses_everything() -> None:
    saved = replace(TWO, domain=replace(TWO.domain, managed_save=True))
    with pytest.raises(Refused, match="managed-save"):
        plan_commit(Request(), saved)
    with pytest.raises(Refused, match="managed-save"):
        plan_removal("one", saved)
    with pytest.raises(Refused, match="managed-save"):
        revert_plan.plan_revert(revert_plan.Request("one"), saved)


def test_a_snapshot_that_is_being_removed_is_no_way_back() -> None:
    going = ground("/b", "/a", snapshots=(snapshot("one", "/a", "/b", labels=Labels("crash", ending=True)),))
    with pytest.raises(Refused, match="being removed"):
        revert_plan.plan_revert(revert_plan.Request("one"), going)
    with pytest.raises(NotFound, match="'other'"):
        revert_plan.plan_revert(revert_plan.Request("other"), going)


OF_THE_MOMENT = Disk("vdb", "disk", "file", "virtio", (Layer("/data", "qcow2"),))


def test_a_disk_that_the_memory_alone_still_has_must_be_there_and_be_nobody_elses() -> None:
    def back(
        opened: dict[str, tuple[Reader, ...]], named: dict[str, tuple[Reader, ...]], *, there: bool = True
    ) -> None:
        graph = HostGraph(
            {**found.graph.named, **named}, {**found.graph.below, "/clone": "/data"} if named else found.graph.below
        )
        facts = replace(found, graph=graph, opened=opened, resumed=(OF_THE_MOMENT,))
        revert_plan._check_resumed(facts, found.snapshots[0], lambda _path: there)

    found = ground("/b", "/a", snapshots=(snapshot("one", "/a", "/b"),))
    back({}, {})
    with pytest.raises(Refused, match=r"/data, which is missing"):
        back({}, {}, there=False)
    with pytest.raises(Refused, match=r"domain 'clone' reads"):
        back({}, {"/clone": (Reader("domain", "clone", "c"),)})
    with pytest.raises(Refused, match=r"process qemu-nbd"):
        back({"/data": (Reader("process", "qemu-nbd (7)"),)}, {})


def confined(of: Ground, *denied: str, free: int = 1 << 40) -> Ground:
    """The same, with a profile that denies these layers to be written."""
    images = {path: replace(image, allocated=1 << 20, free=free) for path, image in of.images.items()}
    return replace(of, denied=frozenset(denied), images=images)


def test_a_denied_run_that_reaches_the_active_layer_is_pulled_and_the_disks_own_image_is_left() -> None:
    plan = plan_commit(Request(), confined(TWO, "/a", "/b"))
    (merge,) = plan.work.merges
    assert (merge.pull, merge.top, merge.gone, merge.below) == (True, "/c", ("/b", "/a"), None)
    assert plan.after("vda") == ("/c",)
    assert plan.work.files == ("/b",)
    assert plan.methods == {"vda": "pull"}
    assert "/a" in plan.notes[0]
    assert "AppArmor" in merge.why
    assert Work.from_json(plan.work.to_json()) == plan.work


def test_an_overlay_of_ours_that_a_pull_made_stand_on_nothing_goes_with_the_next() -> None:
    plan = plan_commit(Request(), confined(ground("/c", "/web.vda.one.qcow2"), "/web.vda.one.qcow2"))
    assert plan.work.files == ("/web.vda.one.qcow2",)
    plan = plan_commit(Request(), confined(ground("/c", "/web.vda.qcow2"), "/web.vda.qcow2"))
    assert plan.work.files == (), "that is a name for a disk's own image"


def test_removing_the_newest_pulls_its_layer_alone() -> None:
    plan = plan_removal("two", confined(TWO, "/a", "/b"))
    assert plan is not None
    (merge,) = plan.work.merges
    assert (merge.pull, merge.gone, merge.below) == (True, ("/b",), "/a")
    assert plan.work.files == ("/b",)
    assert plan.notes == ()


def test_what_the_profile_does_not_deny_is_committed_and_so_is_what_is_off() -> None:
    assert not plan_commit(Request(), confined(TWO, "/elsewhere")).work.merges[0].pull
    off = ground("/c", "/b", "/a", snapshots=TWO.snapshots, active=False)
    plan = plan_commit(Request(), confined(off, "/a"))
    assert not plan.work.merges[0].pull
    assert plan.methods == {"vda": "offline"}


@pytest.mark.parametrize(
    ("found", "request_", "reason"),
    [
        (confined(TWO, "/a"), Request(keep=2), "snapshot 'two' holds"),
        (confined(TWO, "/a", free=1 << 20), Request(), "are free"),
        (
            replace(confined(TWO, "/a"), domain=replace(TWO.domain, checkpoints=("virtnbdbackup.0",))),
            Request(),
            "virtnbdbackup.0",
        ),
    ],
    ids=["below the active layer", "no room", "checkpoints of others"],
)
def test_what_cannot_be_pulled_is_refused_or_merged_offline(found: Ground, request_: Request, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        plan_commit(request_, found)
    assert "allow_restart" in refused.value.advice
    plan = plan_commit(replace(request_, allow_restart=True), found)
    assert plan.work.restart
    assert plan.methods == {"vda": "offline"}
    assert reason in plan.work.merges[0].why
    transient = replace(found, domain=replace(found.domain, persistent=False))
    with pytest.raises(Refused, match=reason):
        plan_commit(replace(request_, allow_restart=True), transient)


def test_a_restart_is_refused_where_the_next_start_has_another_image() -> None:
    full = confined(TWO, "/a", "/b", free=1 << 20)
    for layers in ((Layer("/other", "qcow2"),), ()):
        then = replace(TWO.domain, disks=(replace(TWO.domain.disks[0], chain=layers),))
        with pytest.raises(Refused, match="next start"):
            plan_commit(Request(allow_restart=True), replace(full, next_start=then))
    assert plan_commit(Request(allow_restart=True), replace(full, next_start=TWO.domain)).work.restart


def test_a_layer_above_a_commit_that_would_get_another_backing_file_counts_too() -> None:
    four = ground("/d", "/c", "/b", "/a")
    with pytest.raises(Refused, match="/c"):
        plan_commit(Request(disks=("vda",), top="/b", base="/a"), confined(four, "/c"))


def test_our_checkpoints_end_with_a_pull() -> None:
    found = replace(confined(TWO, "/a"), domain=replace(TWO.domain, checkpoints=("vmk-12345678-x",)))
    plan = plan_commit(Request(), found)
    assert plan.work.checkpoints_ended == ("vmk-12345678-x",)
    assert "vmk-12345678-x" in plan.notes[-1]


def busy(of: Ground, kind: str, into: str | None = None) -> Ground:
    """The same, with a block job on vda: ``into`` is the image that the XML shows as its mirror, where there is one."""
    mirror = BlockJob(kind, False, into) if into else None
    disk = replace(of.domain.disks[0], job=mirror)
    named = dict(of.graph.named)
    if into:
        named[into] = (*named.get(into, ()), Reader("job", "web", "u"))
    return replace(
        of,
        domain=replace(of.domain, disks=(disk,)),
        graph=replace(of.graph, named=named),
        jobs={"vda": kind},
    )


def test_a_run_whose_commit_runs_already_goes_on() -> None:
    found = busy(confined(TWO, "/a", "/b"), "active-commit", "/a")
    assert not plan_commit(Request(), found).work.merges[0].pull
    below = busy(confined(TWO, "/a"), "commit")
    assert not plan_commit(Request(keep=2), below).work.merges[0].pull


def test_a_removal_takes_up_the_commit_that_runs_into_the_snapshots_layer() -> None:
    plan = plan_removal("two", busy(TWO, "active-commit", "/b"))
    assert plan is not None
    assert [(merge.base, merge.merged) for merge in plan.work.merges] == [("/b", ("/c",))]
    assert plan.kept == (), "the job is not one for whom the layer stays"
    below = plan_removal("one", busy(TWO, "commit"))
    assert below is not None
    assert [merge.base for merge in below.work.merges] == ["/a"]


@pytest.mark.parametrize(
    ("kind", "into"), [("copy", "/elsewhere"), ("pull", None), ("commit", None), ("active-commit", "/a")]
)
def test_another_block_job_on_the_disk_is_refused_before_anything_is_changed(kind: str, into: str | None) -> None:
    with pytest.raises(Busy, match=kind):
        plan_removal("two", busy(TWO, kind, into))
    with pytest.raises(Busy, match=kind):
        plan_commit(Request(disks=("vda",), base="/b"), busy(TWO, kind, into))


def test_a_pull_that_runs_already_goes_on() -> None:
    plan = plan_removal("two", busy(confined(TWO, "/a", "/b"), "pull"))
    assert plan is not None
    assert plan.work.merges[0].pull


def test_a_guest_whose_disk_has_a_job_is_not_shut_down() -> None:
    full = confined(TWO, "/a", "/b", free=1 << 20)
    with pytest.raises(Busy, match="pull"):
        plan_removal("two", busy(full, "pull"), allow_restart=True)


def test_active_commits_begin_before_those_below_and_pulls_come_last() -> None:
    def disk(target: str, *paths: str) -> tuple[Disk, tuple[Layer, ...]]:
        layers = tuple(Layer(path, "qcow2") for path in paths)
        return Disk(target, "disk", "file", "virtio", layers), layers

    first, second, third = disk("vda", "/a2", "/a1"), disk("vdb", "/b3", "/b2", "/b1"), disk("vdc", "/c2", "/c1")
    held = snapshot("held", "/b2", "/b3")
    held = replace(held, disks=(replace(held.disks[0], target="vdb"),))
    domain = replace(TWO.domain, disks=(first[0], second[0], third[0]))
    named = {"/a2": (WEB,), "/b3": (WEB,), "/c2": (WEB,)}
    below = {"/a2": "/a1", "/b3": "/b2", "/b2": "/b1", "/c2": "/c1"}
    found = Ground(
        domain=domain,
        graph=HostGraph(named, below),
        chains={"vda": first[1], "vdb": second[1], "vdc": third[1]},
        images={path: Image(1 << 20, free=1 << 40) for path in (*below, *below.values())},
        denied=frozenset({"/a1"}),
    )
    one = plan_commit(Request(), found).work.merges
    assert [merge.target for merge in one] == ["vdb", "vdc", "vda"]
    two = plan_commit(Request(keep=2), found).work.merges
    assert [merge.target for merge in two] == ["vdb"]
