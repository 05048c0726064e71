# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Points of domains that are stopped, paused or saved, of groups, of disks that come and go; restores in place."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

import libvirt
import pytest
from lab import evidence
from lab.ansible import run_module_process
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB, OVMF_CODE
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(
        GuestSpec(
            "states",
            disks=(
                DiskSpec("vda", size=48 * MIB),
                DiskSpec("vdb", size=16 * MIB, fs=None, writer=False),
                DiskSpec("vdc", size=8 * MIB, fs=None, writer=False, format="raw", kind="block"),
            ),
        )
    )


@pytest.fixture(scope="module")
def other(module_guest_factory) -> Guest:
    return module_guest_factory(GuestSpec("states2", disks=(DiskSpec("vda", size=48 * MIB),)))


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    return make_repository()


def test_two_domains_are_cut_at_one_instant(guest: Guest, other: Guest, repository: Path) -> None:
    made = ok("backup", domains=[guest.name, other.name], repository=str(repository), quiesce="required")[
        "restore_points"
    ]
    assert [one["consistency"] for one in made] == ["filesystem", "filesystem"]
    assert made[0]["group"] == sorted(one["id"] for one in made)
    assert all(one["paused_ms"] is not None for one in made)
    for one in made:
        image = directory_of(repository, one) / "vda.qcow2"
        assert evidence.fsck(image).clean
        assert evidence.writer_log(image).is_intact
    points.assert_nothing_left(guest, repository)
    points.assert_nothing_left(other, repository)


def test_a_group_of_which_one_cannot_be_frozen_has_no_point(guest: Guest, other: Guest, directory: Path) -> None:
    other.domain().suspend()
    try:
        refused = task("backup", domains=[guest.name, other.name], repository=str(directory), quiesce="required")
        assert refused["failed"]
        assert other.name in refused["msg"]
        assert not list(directory.glob("*/2*"))
    finally:
        other.domain().resume()


def test_a_stopped_member_that_is_written_to_while_the_others_are_copied_spoils_the_group(
    module_guest_factory, other: Guest, repository: Path, tmp_path: Path
) -> None:
    disk = DiskSpec("vda", size=4 * MIB, fs=None, writer=False)
    asleep = module_guest_factory(GuestSpec("asleep", disks=(disk,)), start=False)
    group = {"domains": [other.name, asleep.name], "repository": str(repository)}
    log = tmp_path / "steps"
    held = run_module_process("backup", env=points.killed_at("copy", log, how="stop"), **group)
    until(lambda: (log.exists() and "!" in log.read_text()) or not held.running(), "the backup reaching copy")
    # What a guest that somebody starts and stops now leaves: its state is as it was.
    points.run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", asleep.images["vda"])
    os.kill(held.pid, signal.SIGCONT)
    failed = held.result()
    assert failed["failed"]
    assert f"{asleep.images['vda']} of domain '{asleep.name}' was written to" in failed["msg"], failed["msg"]
    points.assert_nothing_left(other, repository)
    made = ok("backup", **group)["restore_points"]
    assert points.content(directory_of(repository, made[1]) / "vda.qcow2") == points.content(asleep.images["vda"])


def test_a_paused_guest_gives_a_crash_consistent_point_and_stays_paused(other: Guest, repository: Path) -> None:
    other.domain().suspend()
    try:
        made = ok("backup", domain=other.name, repository=str(repository))
        assert made["restore_point"]["consistency"] == "crash"
        assert any("paused" in warning for warning in made["warnings"])
        assert other.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    finally:
        other.domain().resume()
    points.assert_nothing_left(other, repository)


def test_an_added_disk_gets_a_full_while_the_others_go_on(guest: Guest, repository: Path, directory: Path) -> None:
    image = directory / "vdd.qcow2"
    points.run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    points.run("qemu-io", "-c", "write -P 0x5a 0 1M", image)
    inner = f"<driver name='qemu' type='qcow2'/><source file='{image}'/><target dev='vdd' bus='virtio'/>"
    xml = f"<disk type='file' device='disk'>{inner}</disk>"
    flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
    guest.domain().attachDeviceFlags(xml, flags)
    try:
        first = point(guest, repository)
        kinds = {disk["target"]: disk["type"] for disk in first["disks"]}
        assert kinds == {"vda": "incremental", "vdb": "incremental", "vdc": "full", "vdd": "full"}
        second = point(guest, repository)
        assert {disk["target"]: disk["type"] for disk in second["disks"]}["vdd"] == "incremental"
        assert points.content(directory_of(repository, second) / "vdd.qcow2") == points.content(
            directory_of(repository, first) / "vdd.qcow2"
        )
    finally:
        guest.domain().detachDeviceFlags(xml, flags)


def test_a_raw_image_that_ends_within_a_sector_goes_on_with_zeros_as_the_guest_sees_it(
    module_guest_factory, other: Guest, directory: Path
) -> None:
    disk = DiskSpec("vda", size=1 * MIB, fs=None, writer=False, format="raw")
    stopped = module_guest_factory(GuestSpec("odd", disks=(disk,)), start=False)
    image = stopped.images["vda"]
    image.write_bytes(b"\x11" * 1000001)
    seen = hashlib.sha256(b"\x11" * 1000001 + bytes(447)).hexdigest()
    cold = point(stopped, directory)
    assert points.content(directory_of(directory, cold) / "vda.qcow2") == seen
    assert ok("backup_verify", repository=str(directory), id=cold["id"])["verified"]
    image.unlink()
    ok("restore", repository=str(directory), id=cold["id"], in_place=True, confirm=stopped.name)
    assert points.sha256(image) == seen

    image.write_bytes(b"\x11" * 1000001)
    xml = f"<disk type='file'><driver name='qemu' type='raw'/><source file='{image}'/><target dev='vdz' bus='virtio'/></disk>"
    other.domain().attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    try:
        live = point(other, directory, disks=["vdz"])
    finally:
        other.domain().detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    assert points.content(directory_of(directory, live) / "vdz.qcow2") == seen
    assert ok("backup_verify", repository=str(directory), id=live["id"])["verified"]


def test_stopped_and_saved_domains_are_copied_with_the_level_they_deserve(guest: Guest, repository: Path) -> None:
    live = point(guest, repository)
    guest.domain().managedSave(0)
    saved = ok("backup", domain=guest.name, repository=str(repository))
    assert saved["restore_point"]["consistency"] == "crash"
    assert any("saved state" in warning for warning in saved["warnings"])
    refused = task("restore", repository=str(repository), id=live["id"], in_place=True, confirm=guest.name)
    assert refused["failed"]
    assert "managedsave-remove" in refused["msg"]
    guest.domain().create()
    guest.wait_ready()
    assert guest.shutdown() == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN
    cold = point(guest, repository)
    assert (cold["consistency"], cold["type"]) == ("offline", "full")
    assert "not running" in cold["reason"]
    for target in ("vda", "vdb", "vdc"):
        assert evidence.same_content(guest.active_paths()[target], directory_of(repository, cold) / f"{target}.qcow2")
    assert points.checkpoints(guest) == [live["checkpoint"]], "the live chain goes on"
    guest.start()
    points.fill(guest, "vdb", "after-cold", 4, 3)
    expected = points.device_hash(guest, "vdb")
    made = point(guest, repository)
    assert (made["type"], made["parent"]) == ("incremental", live["id"])
    assert points.content(directory_of(repository, made) / "vdb.qcow2") == expected
    points.assert_nothing_left(guest, repository)


def test_the_guests_disk_destroyed_and_put_back_in_place(guest: Guest, repository: Path) -> None:
    points.fill(guest, "vdb", "precious", 8, 20)
    expected = points.device_hash(guest, "vdb")
    made = point(guest, repository, quiesce="required")
    running = task("restore", repository=str(repository), id=made["id"], in_place=True, confirm=guest.name)
    assert running["failed"]
    assert "Shut it down" in running["msg"]
    guest.destroy()
    image = guest.active_paths()["vdb"]
    owner = (image.stat().st_uid, image.stat().st_gid)
    image.write_bytes(b"gone")
    wrong = task("restore", repository=str(repository), id=made["id"], disks=["vdb"], in_place=True, confirm="somebody")
    assert wrong["failed"]
    assert f"confirm: {guest.name}" in wrong["msg"]
    ok("restore", repository=str(repository), id=made["id"], disks=["vda", "vdb"], in_place=True, confirm=guest.name)
    assert points.content(image) == expected
    assert (image.stat().st_uid, image.stat().st_gid) == owner
    assert sorted(path.name for path in guest.directory.iterdir() if "part" in path.name or "before" in path.name) == []
    guest.start()
    assert points.device_hash(guest, "vdb") == expected
    full = point(guest, repository)
    assert {disk["target"]: disk["type"] for disk in full["disks"]} == {"vda": "full", "vdb": "full", "vdc": "full"}
    block = task("restore", repository=str(repository), id=made["id"], disks=["vdc"], in_place=True, confirm=guest.name)
    assert block["failed"]


def test_a_single_disk_is_attached_to_another_domain(
    guest: Guest, other: Guest, repository: Path, directory: Path
) -> None:
    made = point(guest, repository)
    result = ok(
        "restore",
        repository=str(repository),
        id=made["id"],
        disks=["vdb"],
        attach_to=other.name,
        directory=str(directory),
    )
    try:
        assert result["restored"][0]["attached_as"] == "vdb"
        assert (
            points.content(directory_of(repository, made) / "vdb.qcow2")
            == other.exec("sha256sum /dev/vdb").text.split()[0]
        )
        assert other.xml(inactive=True).find("devices/disk/target[@dev='vdb']") is not None
    finally:
        xml = f"<disk type='file' device='disk'><source file='{result['restored'][0]['path']}'/><target dev='vdb' bus='virtio'/></disk>"
        other.domain().detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)


def test_a_running_domain_lets_go_of_a_disk_when_the_next_cannot_be_attached(
    guest: Guest, other: Guest, repository: Path, directory: Path, tmp_path: Path
) -> None:
    made = point(guest, repository, min_age="1d")
    log = tmp_path / "steps"
    held = run_module_process(
        "restore",
        env=points.killed_at("attach", log, how="stop"),
        repository=str(repository),
        id=made["id"],
        disks=["vdb", "vdc"],
        attach_to=other.name,
        directory=str(directory),
    )
    until(lambda: (log.exists() and "!" in log.read_text()) or not held.running(), "the restore reaching attach")
    assert held.running(), held.result()["msg"]
    before = other.active_paths()
    taken = "<disk type='file' device='disk'><source file='/nowhere'/><target dev='vdc' bus='virtio'/></disk>"
    other.domain().attachDeviceFlags(taken, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    os.kill(held.pid, signal.SIGCONT)
    failed = held.result()
    other.domain().detachDeviceFlags(taken, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    assert failed["failed"]
    assert "Nothing was attached" in failed["msg"], failed["msg"]
    assert other.active_paths() == before
    assert other.xml(inactive=True).find("devices/disk/target[@dev='vdb']") is None
    assert list(directory.iterdir()) == []
    assert list(points.JOURNALS.glob("*")) == []


def test_a_restore_of_a_lost_domain_brings_it_back_as_it_was(other: Guest, repository: Path, directory: Path) -> None:
    made = point(other, repository)
    definition = other.xml_text(inactive=True)
    mac_and_uuid = (made["domain_uuid"], other.name)
    other.destroy()
    other.domain().undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    lost = directory / "lost"
    lost.mkdir()
    shutil.move(str(other.images["vda"]), lost)
    try:
        result = ok("restore", repository=str(repository), source_domain=other.name, state="running")
        assert (result["domain"]["uuid"], result["domain"]["name"]) == mac_and_uuid
        assert other.is_running()
        other.wait_ready()
        assert other.writer_log("vda").is_intact
    finally:
        other.destroy()
        points.forget_domain(other, other.name)
        other.connection().defineXML(definition)
        other.images["vda"].unlink(missing_ok=True)


@pytest.mark.skipif(not OVMF_CODE.exists(), reason="no OVMF on this host")
def test_uefi_variables_come_along(module_guest_factory, directory: Path) -> None:
    disk = DiskSpec("vda", size=8 * MIB, fs=None, writer=False)
    guest = module_guest_factory(
        GuestSpec("uefi", disks=(disk,), firmware="uefi", agent="absent", memory=256), start=False
    )
    guest.start(wait=False)
    guest.destroy()
    nvram = Path(str(guest.xml(inactive=True).findtext("os/nvram")))
    expected = points.sha256(nvram)
    made = point(guest, directory)
    assert made["nvram"]
    assert not [part for part in made["not_captured"] if part["kind"] == "nvram"]
    result = ok("restore", repository=str(directory), id=made["id"], domain="lab-uefi-r", directory=str(directory))
    try:
        restored = next(Path(one["path"]) for one in result["restored"] if one["target"] == "nvram")
        assert restored != nvram
        assert points.sha256(restored) == expected
    finally:
        points.forget_domain(guest, "lab-uefi-r")
