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
