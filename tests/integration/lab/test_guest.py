# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The lab's guests are real: they boot, write, freeze, and shut down cleanly."""

from __future__ import annotations

import libvirt
import pytest
from lab import evidence, images
from lab.guest import DiskSpec, Guest, GuestSpec, digest
from lab.host import TestHost
from lab.spec import OVMF_CODE
from lab.waiting import until

MIB = 1 << 20

DISKS = (
    DiskSpec("vda"),
    DiskSpec("vdb", format="raw", partitioned=True, writer="sync"),
    DiskSpec("sda", bus="scsi", fs="xfs", size=320 * MIB, partitioned=True),
    DiskSpec("vdc", kind="block", format="raw"),
    DiskSpec("vdd", kind="volume"),
    DiskSpec("vde", kind="block", format="qcow2"),
    DiskSpec("vdf", fs=None),
)
WRITING = [disk for disk in DISKS if disk.fs]


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(GuestSpec("kinds", disks=DISKS, vcpus=1))


def test_every_kind_of_disk_is_written_without_a_hole(guest: Guest) -> None:
    for disk in WRITING:
        until(lambda target=disk.target: guest.gaps(target).count > 20, f"20 records on {disk.target}")
        log = guest.writer_log(disk.target)
        assert log.is_intact, log.problems
        assert log.torn == 0
        assert guest.writer_errors(disk.target) == []


def test_definition_shows_the_kinds_of_source(guest: Guest) -> None:
    paths = guest.active_paths()
    assert str(paths["vdc"]).startswith("/dev/loop")
    assert str(paths["vde"]).startswith("/dev/loop")
    assert paths["vdd"] == guest.images["vdd"]
    assert guest.chain("vda") == [guest.images["vda"]]


def test_two_writers_tick_by_the_same_clock(guest: Guest) -> None:
    guest.stop_writers()
    first, second = guest.writer_log("vda"), guest.writer_log("vdc")
    for target in ("vda", "vdc"):
        guest.start_writer(target)
    common = range(max(first.records[0].tick, second.records[0].tick), min(first.last.tick, second.last.tick))
    # A tick that one writer missed it was too late for; most of the ticks both have.
    both = first.ticks() & second.ticks() & set(common)
    assert len(both) > 0.5 * min(len(first.ticks() & set(common)), len(second.ticks() & set(common)))
    assert abs(first.last.tick - second.last.tick) < 100


def test_freeze_blocks_the_writers_and_the_gap_shows_it(guest: Guest) -> None:
    for target in ("vda", "vdc"):
        guest.exec(
            f"killall labwriter; while pidof labwriter >/dev/null; do sleep 0.05; done; rm -f /run/writer-{target}.gaps"
        )
    for target in ("vda", "vdc"):
        guest.start_writer(target)
    before = guest.gaps("vda")
    guest.domain().fsFreeze()
    try:
        frozen_at = guest.gaps("vda").count
        assert set(guest.frozen_filesystems()) == {f"/disk/{disk.target}" for disk in WRITING}
        assert guest.gaps("vda").count <= frozen_at + 1
    finally:
        guest.domain().fsThaw()
    until(lambda: guest.gaps("vda").count > frozen_at + 5, "the writer going on after the thaw")
    assert guest.frozen_filesystems() == []
    assert guest.gaps("vda").longest_ms > 2000 > before.longest_ms
    assert guest.gaps("vdc").longest_ms > 2000
    assert guest.writer_log("vda").is_intact


def test_files_go_in_and_out_unchanged(guest: Guest) -> None:
    data = bytes(range(256)) * 4096
    guest.write_file("/disk/vda/blob", data)
    assert guest.sha256("/disk/vda/blob") == digest(data)
    assert guest.read_file("/disk/vda/blob") == data


def test_a_failing_program_tells_its_exit_code_and_stderr(guest: Guest) -> None:
    result = guest.exec("echo out; echo err >&2; exit 3", check=False)
    assert (result.rc, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    with pytest.raises(RuntimeError, match="err"):
        guest.exec("echo err >&2; exit 3")


def test_the_agent_is_the_real_one(guest: Guest) -> None:
    assert guest.agent_command("guest-info")["version"].startswith("7.2")
    mounts = {entry[0] if isinstance(entry, tuple) else entry["mountpoint"] for entry in guest.domain().fsInfo()}
    assert {f"/disk/{disk.target}" for disk in WRITING} <= mounts


def test_shutdown_is_clean_and_the_data_at_rest_agrees_with_the_guest(guest: Guest) -> None:
    guest.write_file("/disk/vdb/proof", b"proof")
    devices = guest.active_paths()
    assert guest.shutdown() == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN
    for disk in WRITING:
        image = devices[disk.target]
        found = evidence.fsck(image, disk.partition)
        assert found.clean, found.output
        assert not found.needs_recovery
        if disk.fs == "ext4":
            log = evidence.writer_log(image, disk.partition)
            assert log.is_intact, log.problems
    assert evidence.read_file(guest.images["vdb"], "/proof", partition=1) == b"proof"
    assert evidence.sha256_of_file(guest.images["vda"], "/blob") == digest(bytes(range(256)) * 4096)


def test_a_second_boot_continues_the_count(guest: Guest) -> None:
    before = evidence.writer_log(guest.images["vda"]).last
    guest.start()
    until(lambda: guest.gaps("vda").count > before.count + 20, "20 more records")
    log = guest.writer_log("vda")
    assert log.is_intact, log.problems
    assert len({record.boot for record in log.records}) == 2
    guest.destroy()


def test_a_pulled_plug_leaves_a_journal_to_replay_and_no_damage(guest: Guest) -> None:
    if guest.is_running():
        guest.destroy()
    guest.start()
    guest.write_file("/disk/vda/synced", b"x" * MIB)
    guest.destroy()
    found = evidence.fsck(guest.images["vda"])
    assert found.needs_recovery
    assert found.clean, found.output
    assert len(evidence.read_file(guest.images["vda"], "/synced")) == MIB
    assert evidence.writer_log(guest.images["vda"]).is_intact


def test_evidence_sees_damage(guest: Guest, tmp_path) -> None:
    image = evidence.flatten(guest.images["vdb"], tmp_path / "vdb.raw")
    assert evidence.same_content(image, guest.images["vdb"])
    raw = bytearray(evidence.read_file(image, "/writer.log", partition=1))
    raw[96 * 3 + 40] ^= 1
    assert "record 3 is damaged" in evidence.parse_writer_log(bytes(raw)).problems[0]
    hole = bytes(raw[: 96 * 2]) + bytes(raw[96 * 5 :])
    assert any("follows" in problem for problem in evidence.parse_writer_log(hole).problems)
    start, _size = evidence.partition_range(image, 1)
    with image.open("r+b") as file:
        file.seek(start + 5 * 1024)
        file.write(b"\xa5" * 8192)
    assert not evidence.same_content(image, guest.images["vdb"])
    assert not evidence.fsck(image, 1).clean


def test_overlay_over_an_existing_image_shows_its_files(guest: Guest, guest_factory) -> None:
    if guest.is_running():
        guest.destroy()
    spec = GuestSpec("over", disks=(DiskSpec("vda", backing=guest.images["vda"]),))
    over = guest_factory(spec)
    assert over.exec("ls /disk/vda").text.split().count("writer.log") == 1
    assert over.chain("vda") == [over.images["vda"], guest.images["vda"]]


def test_flags_reach_the_definition(guest_factory) -> None:
    spec = GuestSpec(
        "flags",
        disks=(
            DiskSpec("vda", transient=True, writer=False),
            DiskSpec("vdb", readonly=True),
            DiskSpec("vdc", shareable=True, format="raw"),
            DiskSpec("vdd", snapshot="no"),
        ),
        max_vcpus=3,
        memory=160,
        max_memory=1024,
        metadata_xml="<x:mark xmlns:x='urn:lab'>kept</x:mark>",
    )
    guest = guest_factory(spec, start=False)
    xml = guest.xml(inactive=True)
    disks = {disk.find("target").get("dev"): disk for disk in xml.iterfind("./devices/disk")}
    assert disks["vda"].find("transient") is not None
    assert disks["vdb"].find("readonly") is not None
    assert disks["vdc"].find("shareable") is not None
    assert disks["vdd"].get("snapshot") == "no"
    assert xml.find("./vcpu").get("current") == "1"
    guest.start()
    assert guest.writer_log("vdd").records


def test_a_guest_boots_from_its_own_disk(guest_factory) -> None:
    guest = guest_factory(GuestSpec("disk-boot", disks=(DiskSpec("vda", boot=True), DiskSpec("vdb"))))
    assert guest.xml().find("./os/kernel") is None
    assert "/dev/vda2 on /disk/vda" in guest.exec("mount").text
    assert guest.shutdown() == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN
    assert evidence.writer_log(guest.images["vda"], partition=2).is_intact
    assert evidence.fsck(guest.images["vda"], partition=2).clean


def test_uefi_guest_boots_with_a_variable_store_of_its_own(guest_factory) -> None:
    if not OVMF_CODE.exists():
        pytest.skip("the ovmf package is not installed")
    guest = guest_factory(GuestSpec("uefi", firmware="uefi", memory=256))
    assert guest.exec("test -d /sys/firmware/efi", check=False).rc == 0
    assert guest.xml().find("./os/nvram") is not None


def test_vcpus_and_memory_can_be_hot_plugged(guest_factory) -> None:
    guest = guest_factory(GuestSpec("hot", max_vcpus=2, max_memory=512, disks=()))
    guest.domain().setVcpusFlags(2, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    until(
        lambda: guest.exec("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l").text == "2", "the second vCPU appearing"
    )
    before = int(guest.exec("ls -d /sys/devices/system/memory/memory[0-9]* | wc -l").text)
    dimm = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>"
    guest.domain().attachDeviceFlags(dimm, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    until(
        lambda: int(guest.exec("ls -d /sys/devices/system/memory/memory[0-9]* | wc -l").text) > before,
        "memory blocks appearing",
    )


def test_a_grown_disk_can_be_grown_in_the_guest(guest_factory) -> None:
    guest = guest_factory(GuestSpec("grow", disks=(DiskSpec("vda", partitioned=True, size=64 * MIB),)))
    guest.domain().blockResize("vda", 160 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    until(lambda: guest.exec("cat /sys/block/vda/size").text == str(160 * MIB // 512), "the guest seeing the new size")
    guest.exec(["growpart", "/dev/vda", "1"])
    guest.exec(["resize2fs", "/dev/vda1"])
    assert (
        int(guest.exec("stat -f -c '%b' /disk/vda").text) * int(guest.exec("stat -f -c '%S' /disk/vda").text)
        > 120 * MIB
    )
    assert guest.writer_log("vda").is_intact


def test_a_freeze_hook_of_the_spec_runs(guest_factory) -> None:
    hook = '#!/bin/sh\necho "$1" >>/run/hook-calls\n'
    guest = guest_factory(GuestSpec("hook", hooks={"note": hook}))
    guest.domain().fsFreeze()
    guest.domain().fsThaw()
    assert guest.exec("cat /run/hook-calls").text.split() == ["freeze", "thaw"]


def test_cleanup_leaves_nothing(host: TestHost) -> None:
    guest = Guest(
        host,
        GuestSpec(
            "gone",
            disks=(
                DiskSpec("vda"),
                DiskSpec("vdb", kind="block", format="raw", snapshot="no"),
                DiskSpec("vdc", kind="volume", snapshot="no"),
            ),
        ),
    )
    guest.define().start()
    node = guest.active_paths()["vdb"]
    guest.domain().snapshotCreateXML(
        "<domainsnapshot><name>s</name></domainsnapshot>", libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    )
    guest.cleanup()
    connection = host.connect()
    assert "lab-gone" not in [domain.name() for domain in connection.listAllDomains()]
    assert not [pool for pool in connection.listAllStoragePools() if pool.name().startswith("lab-gone")]
    assert not guest.directory.exists()
    assert images.run("losetup", "--list", "--noheadings", "--output", "NAME", "-j", guest.images["vdb"]) == ""
    assert node.exists()
