# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``snapshot`` with ``state: present``: every kind of disk, memory, internal, second runs and check mode."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import proof
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks

SMALL = 64 * MIB
EXTRA = """
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
<filesystem type='mount' accessmode='mapped'><source dir='/usr/share/doc'/><target dir='hostshare'/></filesystem>
"""


@pytest.fixture(scope="module")
def guest(make_guest) -> Guest:
    def bare(target: str, **options) -> DiskSpec:
        return DiskSpec(target, size=8 * MIB, fs=None, writer=False, **options)

    return make_guest(
        GuestSpec(
            "kinds",
            disks=(
                DiskSpec("vda", size=SMALL, cache="unsafe"),
                DiskSpec("vdb", size=SMALL, cache="unsafe", format="raw"),
                DiskSpec("vdc", size=SMALL, cache="unsafe", format="raw", kind="block"),
                DiskSpec("vdd", size=SMALL, cache="unsafe", kind="volume"),
                bare("vde", snapshot="no"),
                bare("vdf", readonly=True),
                bare("vdg", format="raw", shareable=True),
            ),
            extra_devices=EXTRA,
        )
    )


@pytest.fixture(scope="module")
def stopped(make_guest) -> Guest:
    """A UEFI domain, shut off, on qcow2 alone."""
    disks = (DiskSpec("vda", size=8 * MIB, fs=None, writer=False), DiskSpec("vdb", size=8 * MIB, fs=None, writer=False))
    return make_guest(GuestSpec("stopped", disks=disks), start="no")


def test_check_mode_predicts_what_the_run_then_does_and_changes_nothing(guest):
    task = {
        "domains": [guest.name],
        "name": "one",
        "quiesce": "required",
        "tags": {"change": "CHG-1"},
        "description": "first",
    }
    images = [guest.directory]
    before = evidence.host_state(guest.connection(), images, content=False).parts
    predicted = tasks.ok("snapshot", check=True, **task)
    after = evidence.host_state(guest.connection(), images, content=False).parts
    assert _without_what_the_guest_writes(before) == _without_what_the_guest_writes(after)
    assert predicted.changed
    done = tasks.ok("snapshot", **task)
    assert done.changed
    same = (
        "name",
        "domain",
        "mode",
        "mode_reason",
        "consistency",
        "description",
        "tags",
        "not_captured",
        "parent",
        "memory",
    )
    assert {key: predicted["snapshot"][key] for key in same} == {key: done["snapshot"][key] for key in same}
    assert predicted["snapshot"]["disks"] == done["snapshot"]["disks"]
    assert done["diff"]["before"] == {guest.name: {}}
    assert done["diff"]["after"][guest.name]["one"]["consistency"] == "filesystem"


def _without_what_the_guest_writes(parts: dict) -> dict:
    """Size and mtime of the images that a running guest writes to move by themselves."""
    return {
        name: value if not name.endswith((".qcow2", ".raw", ".img")) else value.split()[:3]
        for name, value in parts.items()
    }


def test_every_kind_of_disk_is_captured_and_each_snapshot_layer_is_clean(guest):
    snapshot = tasks.ok("snapshot_info", domains=[guest.name], name="one")["snapshots"][0]
    assert [disk["target"] for disk in snapshot["disks"]] == ["vda", "vdb", "vdc", "vdd"]
    assert [disk["base_format"] for disk in snapshot["disks"]] == ["qcow2", "raw", "raw", "qcow2"]
    for disk in snapshot["disks"]:
        proof.clean(disk["base"])
        assert guest.active_paths()[disk["target"]] == Path(disk["overlay"])
    assert snapshot["bootable"]


def test_what_is_not_captured_is_listed_with_its_reason_and_warned_about(guest):
    done = tasks.ok("snapshot", domains=[guest.name], name="one", check=True)
    found = {part["name"]: part["reason"] for part in done["snapshot"]["not_captured"]}
    assert found == {
        "vde": "snapshot-no",
        "vdf": "read-only",
        "vdg": "shareable",
        "sda": "cdrom",
        "hostshare": "host-shared",
    }
    fresh = tasks.ok("snapshot", domains=[guest.name], name="another", check=True)
    assert any(
        "vde (snapshot-no), vdf (read-only), vdg (shareable), hostshare (host-shared)" in line
        for line in fresh.warnings
    )


def test_overlays_are_private_rightly_owned_and_named_after_what_they_belong_to(guest):
    snapshot = tasks.ok("snapshot_info", domains=[guest.name], name="one")["snapshots"][0]
    running_as = os.stat(f"/proc/{guest.host.qemu_pids()[guest.name]}").st_uid
    for disk in snapshot["disks"]:
        overlay = Path(disk["overlay"])
        status = overlay.stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_uid == running_as
        assert overlay.name == f"{guest.name}.{disk['target']}.one.qcow2"
        if not disk["base"].startswith("/dev/"):
            assert overlay.parent == Path(disk["base"]).parent


def test_a_second_run_changes_nothing_and_new_tags_change_the_labels_alone(guest):
    task = {"domains": [guest.name], "name": "one", "quiesce": "required"}
    before = evidence.host_state(guest.connection()).parts
    assert not tasks.ok("snapshot", **task).changed
    assert evidence.host_state(guest.connection()).parts == before
    assert tasks.ok("snapshot", check=True, tags={"change": "CHG-2"}, **task).changed
    assert evidence.host_state(guest.connection()).parts == before
    relabelled = tasks.ok("snapshot", tags={"change": "CHG-2"}, **task)
    assert relabelled.changed
    assert relabelled["diff"]["before"][guest.name]["one"]["tags"] == {"change": "CHG-1"}
    assert relabelled["diff"]["after"][guest.name]["one"]["tags"] == {"change": "CHG-2"}
    shown = tasks.ok("snapshot_info", domains=[guest.name], name="one")["snapshots"][0]
    assert shown["tags"] == {"change": "CHG-2"}
    assert shown["description"] == "first"
    assert shown["consistency"] == "filesystem"
    assert not tasks.ok("snapshot", tags=json.dumps({"change": "CHG-2"}), **task).changed


def test_it_reads_well_on_the_command_line(guest):
    outcome = tasks.ad_hoc("snapshot", f"domain={guest.name} name=before-upgrade disks=vda", "--diff")
    assert outcome.rc == 0, outcome.stderr
    assert outcome.changed
    assert [disk["target"] for disk in outcome["snapshot"]["disks"]] == ["vda"]
    excluded = {part["name"] for part in outcome["snapshot"]["not_captured"] if part["reason"] == "excluded"}
    assert excluded == {"vdb", "vdc", "vdd", "vde"}
    assert '"before-upgrade"' in outcome.stderr


def test_a_disk_that_the_definition_leaves_out_is_taken_when_the_task_names_it(guest):
    taken = tasks.ok("snapshot", domains=[guest.name], name="named", disks=["vde"])["snapshot"]
    assert [disk["target"] for disk in taken["disks"]] == ["vde"]
    refused = tasks.run("snapshot", domains=[guest.name], name="readonly", disks=["vdf"])
    assert refused.failed
    assert "the guest cannot write to it" in refused.message


def test_memory_and_disks_are_of_one_instant_and_the_memory_file_is_private(guest):
    refused = tasks.run("snapshot", domains=[guest.name], name="ram", memory=True, quiesce="required")
    assert refused.failed
    assert "would bring back a frozen guest" in refused.message
    taken = tasks.ok("snapshot", domains=[guest.name], name="ram", memory=True, exclude_disks=["vdb"])["snapshot"]
    assert taken["consistency"] == "memory"
    memory = Path(taken["memory"])
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600
    assert memory.name == f"{guest.name}.ram.memory"
    count = guest.gaps("vda").count
    until(lambda: guest.gaps("vda").count > count, "the guest writing on")


def test_an_agent_that_is_not_there_fails_a_required_freeze_before_anything_changed(guest):
    guest.exec("kill -STOP $(cat /run/qga/pid)")
    try:
        before = evidence.host_state(guest.connection(), [guest.directory], content=False).parts
        required = tasks.run("snapshot", domains=[guest.name], name="quiet", quiesce="required")
        assert required.failed
        assert "Nothing was changed" in required.message
        after = evidence.host_state(guest.connection(), [guest.directory], content=False).parts
        assert _without_what_the_guest_writes(before) == _without_what_the_guest_writes(after)
        automatic = tasks.ok("snapshot", domains=[guest.name], name="quiet", disks=["vda"])
        assert automatic["snapshot"]["consistency"] == "crash"
        assert any("crash-consistent" in line for line in automatic.warnings)
    finally:
        guest.exec("kill -CONT $(cat /run/qga/pid)")
    never = tasks.ok("snapshot", domains=[guest.name], name="unfrozen", quiesce="never", disks=["vda"])["snapshot"]
    assert never["consistency"] == "crash"
    assert never["frozen_ms"] is None


def test_internal_snapshots_are_taken_where_they_do_no_harm_and_refused_with_the_reasons_elsewhere(guest, stopped):
    refused = tasks.run("snapshot", domains=[guest.name], name="inside", mode="internal")
    assert refused.failed
    for reason in ("some are left out", "external snapshots", "memory: true"):
        assert reason in refused.message
    taken = tasks.ok("snapshot", domains=[stopped.name], name="inside", mode="internal")["snapshot"]
    assert taken["mode"] == "internal"
    assert taken["consistency"] == "crash"
    for path in stopped.images.values():
        assert "inside" in evidence.run("qemu-img", "snapshot", "-l", path)
    assert not tasks.ok("snapshot", domains=[stopped.name], name="inside", mode="internal").changed


def test_a_shut_off_domain_gets_overlays_and_a_free_directory(stopped):
    place = stopped.directory / "elsewhere"
    place.mkdir(mode=0o711)
    taken = tasks.ok("snapshot", domains=[stopped.name], name="cold", directory=str(place))["snapshot"]
    assert {Path(disk["overlay"]).parent for disk in taken["disks"]} == {place}
    assert taken["parent"] == "inside"
    assert stopped.active_paths() == {disk["target"]: Path(disk["overlay"]) for disk in taken["disks"]}
    for disk in taken["disks"]:
        evidence.check(Path(disk["overlay"]))
        assert evidence.same_content(Path(disk["overlay"]), Path(disk["base"]))


def test_uefi_variables_are_not_carried_and_forbid_an_internal_snapshot(make_guest):
    uefi = make_guest(
        GuestSpec("uefi", disks=(DiskSpec("vda", size=8 * MIB, fs=None, writer=False),), firmware="uefi", memory=256),
        start="no",
    )
    refused = tasks.run("snapshot", domains=[uefi.name], name="inside", mode="internal")
    assert refused.failed
    assert "UEFI variables are in a raw file" in refused.message
    taken = tasks.ok("snapshot", domains=[uefi.name], name="outside")
    assert [part["reason"] for part in taken["snapshot"]["not_captured"]] == ["nvram"]
    assert any("(nvram)" in line for line in taken.warnings)


def test_labels_survive_a_libvirtd_restart_and_a_reboot_of_the_host(guest, host):
    """Last of the module: it ends every guest of the host."""

    def labels() -> list:
        keys = (
            "name",
            "tags",
            "description",
            "consistency",
            "frozen_ms",
            "mode_reason",
            "not_captured",
            "parent",
            "disks",
        )
        return [
            {key: entry[key] for key in keys} for entry in tasks.ok("snapshot_info", domains=[guest.name])["snapshots"]
        ]

    before = labels()
    assert before[0]["tags"] == {"change": "CHG-2"}
    host.restart_libvirtd()
    assert labels() == before
    host.reboot()
    assert labels() == before
    guest.start()
    proof.whole(guest.writer_log("vda"))
