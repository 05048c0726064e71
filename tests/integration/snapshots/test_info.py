# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``snapshot_info`` and ``domain_info`` tell what is, and change nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import libvirt
import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import proof
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks

SIZE = 8 * MIB


def bare(target: str, **options) -> DiskSpec:
    return DiskSpec(target, size=SIZE, fs=None, writer=False, **options)


@pytest.fixture(scope="module")
def tree(make_guest) -> Guest:
    """A shut-off domain with the snapshots a, b (both disks) and c (one disk)."""
    guest = make_guest(GuestSpec("tree", disks=(bare("vda"), bare("vdb", format="raw"))), start="no")
    tasks.ok("snapshot", domains=[guest.name], name="a", tags={"app": "web"}, description="the first")
    tasks.ok("snapshot", domains=[guest.name], name="b", tags={"app": "web", "tier": "gold"})
    tasks.ok("snapshot", domains=[guest.name], name="c", disks=["vda"])
    return guest


@pytest.fixture(scope="module")
def running(make_guest) -> Guest:
    return make_guest(GuestSpec("info", disks=(DiskSpec("vda", size=64 * MIB, cache="unsafe"),), vcpus=2))


def snapshots_of(guest: Guest, **options) -> dict:
    return {entry["name"]: entry for entry in tasks.ok("snapshot_info", domains=[guest.name], **options)["snapshots"]}


def test_the_tree_says_who_stands_on_whom(tree):
    found = snapshots_of(tree)
    assert list(found) == ["a", "b", "c"]
    assert [entry["parent"] for entry in found.values()] == [None, "a", "b"]
    assert [entry["depth"] for entry in found.values()] == [0, 1, 2]
    assert found["a"]["children"] == ["b"]
    assert [entry["current"] for entry in found.values()] == [False, False, True]
    assert found["a"]["description"] == "the first"
    base = {disk["target"]: disk["base"] for disk in found["a"]["disks"]}
    assert set(found["a"]["depends_on"]) == set(base.values())
    assert set(base.values()) < set(found["b"]["depends_on"])
    assert {"kind": "snapshot", "name": "b"} in found["a"]["needed_by"]
    assert {"kind": "domain", "name": tree.name} in found["a"]["needed_by"]
    assert all(entry["bootable"] for entry in found.values())
    assert found["a"]["bytes"] == sum(os.stat(disk["overlay"]).st_blocks * 512 for disk in found["a"]["disks"])


def test_chains_are_told_layer_by_layer_and_a_long_one_is_warned_about(tree):
    answer = tasks.ok("snapshot_info", domains=[tree.name])
    chain = answer["chains"][tree.name]["vda"]
    assert [layer["after_snapshot"] for layer in chain] == ["c", "b", "a", None]
    assert chain[-1]["path"] == str(tree.images["vda"])
    assert {layer["virtual_size"] for layer in chain} == {SIZE}
    assert [layer["format"] for layer in answer["chains"][tree.name]["vdb"]] == ["qcow2", "qcow2", "raw"]
    assert answer.warnings == []
    for number in range(5):
        tasks.ok("snapshot", domains=[tree.name], name=f"more{number}", disks=["vda"])
    warned = tasks.ok("snapshot_info", domains=[tree.name])
    assert any("vda: the chain has 9 layers" in line and "blockcommit" in line for line in warned.warnings)


def test_names_and_tags_choose(tree):
    assert list(snapshots_of(tree, name="b")) == ["b"]
    assert list(snapshots_of(tree, tags={"app": "web"})) == ["a", "b"]
    assert list(snapshots_of(tree, tags={"app": "web", "tier": "gold"})) == ["b"]
    assert snapshots_of(tree, name="nobody") == {}


def test_a_snapshot_that_somebody_else_took_is_shown_with_no_more_than_is_known(tree, make_guest):
    foreign = make_guest(GuestSpec("foreign", disks=(bare("vda"),)), start="no")
    foreign.domain().snapshotCreateXML(
        "<domainsnapshot><name>by hand</name><disks><disk name='vda' snapshot='external'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY,
    )
    found = snapshots_of(foreign)["by hand"]
    assert found["consistency"] in ("crash", "offline")
    assert found["tags"] == {}
    assert found["frozen_ms"] is None


def test_a_missing_layer_makes_a_snapshot_unbootable_and_is_named(make_guest):
    broken = make_guest(GuestSpec("broken", disks=(bare("vda"),)), start="no")
    tasks.ok("snapshot", domains=[broken.name], name="a")
    broken.images["vda"].unlink()
    answer = tasks.ok("snapshot_info", domains=[broken.name])
    assert not answer["snapshots"][0]["bootable"]
    info = tasks.ok("domain_info", domains=[broken.name])["domain"]
    assert any(str(broken.images["vda"]) in line for line in [*answer.warnings, *info["warnings"]])


def test_without_names_every_domain_is_told(tree, running):
    told = {entry["name"] for entry in tasks.ok("domain_info")["domains"]}
    assert {tree.name, running.name} <= told
    assert {entry["domain"] for entry in tasks.ok("snapshot_info")["snapshots"]} >= {tree.name}


def test_info_changes_nothing(tree):
    before = evidence.host_state(tree.connection(), [tree.directory])
    for module in ("snapshot_info", "domain_info"):
        assert not tasks.ok(module, domains=[tree.name]).changed
        assert not tasks.ok(module, domains=[tree.name], check=True).changed
    assert before.differences(evidence.host_state(tree.connection(), [tree.directory])) == []


def test_a_running_guest_is_described_from_outside_and_inside(running):
    info = tasks.ok("domain_info", domains=[running.name])["domain"]
    assert info["state"] == "running"
    assert info["vcpus"] == {"maximum": 2, "configured": 2, "live": 2, "guest": 2}
    assert info["memory"]["configured"] == 160 * MIB
    assert 0 < info["memory"]["guest"] < 160 * MIB
    assert info["agent"]["responding"]
    assert info["agent"]["can_freeze"]
    assert info["agent"]["obstacle"] is None
    assert info["filesystems"] == ["/disk/vda"]
    assert info["frozen"] is False
    assert info["would_capture"] == ["vda"]
    assert info["disks"][0]["capacity"] == 64 * MIB
    assert info["unfinished"] is None
    assert info["locked_by"] is None


def test_what_the_agent_may_not_do_is_told(running):
    proof.stop_agent(running)
    port = f"qemu-ga -m virtio-serial -p {proof.PORT} -t /run/qga -f /run/qga/pid -l /run/qga/log"
    running.exec(f"{port} -b guest-exec,guest-file-open,guest-fsfreeze-freeze -d")
    running.wait_agent()
    try:
        agent = tasks.ok("domain_info", domains=[running.name])["domain"]["agent"]
        assert agent["responding"]
        assert not agent["can_freeze"]
        assert not agent["can_execute"]
        assert not agent["can_use_files"]
        assert agent["obstacle"] == "the guest agent does not allow freezing filesystems"
        refused = tasks.run("snapshot", domains=[running.name], name="x", quiesce="required")
        assert refused.failed
        assert "does not allow freezing" in refused.message
    finally:
        proof.use_agent(running, "real")


def test_who_is_at_work_and_what_was_interrupted_is_told(running, tmp_path):
    log = tmp_path / "steps"
    process = tasks.killed_at("overlays", "snapshot", log, how="stop", domains=[running.name], name="late")
    until(lambda: "!overlays" in tasks.steps_in(log), "the module stopping")
    info = tasks.ok("domain_info", domains=[running.name])["domain"]
    assert info["locked_by"]["pid"] == process.pid
    assert info["locked_by"]["operation"] == "snapshot 'late'"
    assert info["unfinished"]["last_step"] == "overlays"
    os.kill(process.pid, signal.SIGKILL)
    tasks.finish(process)
    info = tasks.ok("domain_info", domains=[running.name])["domain"]
    assert info["locked_by"] is None
    assert info["unfinished"]["operation"] == "snapshot"
    # Check mode sees it, promises the snapshot, and leaves it to the run.
    assert tasks.ok("snapshot", domains=[running.name], name="late", check=True).changed
    assert tasks.ok("snapshot", domains=[running.name], name="late").changed
    assert tasks.ok("domain_info", domains=[running.name])["domain"]["unfinished"] is None


def test_who_is_not_root_gets_what_that_user_may_read(running):
    outcome = tasks.run("domain_info", domains=[running.name], user=65534)
    if outcome.failed:  # a host whose libvirt asks polkit, and nobody answers
        assert "libvirt group" in outcome.message
    else:
        assert outcome["domain"]["name"] == running.name


def test_a_transient_domain_is_warned_about(make_guest, host):
    guest = make_guest(GuestSpec("gone", disks=(bare("vda"),)), start="no")
    xml = guest.xml_text(inactive=True)
    guest.domain().undefine()
    guest.connection().createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
    taken = tasks.ok("snapshot", domains=[guest.name], name="a")
    assert any("is transient" in line for line in taken.warnings)
    refused = tasks.run("snapshot", domains=[guest.name], name="b", quiesce="shutdown")
    assert refused.failed
    assert "transient" in refused.message
    assert Path(taken["snapshot"]["disks"][0]["overlay"]).exists()
