# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Sizes change while the guest runs; the guest's own /proc and its files decide whether they did."""

from __future__ import annotations

import os
from pathlib import Path

import libvirt
import pytest
from lab import ansible, evidence
from lab.evidence import host_state
from lab.guest import DiskSpec, Guest, GuestSpec

from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory
from ansible_collections.vmkeeper.libvirt.tests.integration.sizing.resizing import (
    MIB,
    change,
    memory_total,
    online_cpus,
    ordinary_gap,
    resize,
    start,
    twice,
    unfinished,
    writes,
)

VIRTIO_MEM = (
    "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node>"
    "<block unit='MiB'>2</block><requested unit='MiB'>0</requested></target></memory>"
)


@pytest.fixture(scope="module")
def calm(guest: Guest) -> float:
    """The longest gap between two writes that this machine's load makes by itself, in seconds."""
    return ordinary_gap(guest)


def undisturbed(gap: float, calm: float) -> bool:
    """No gap above a second, beyond what the machine's load makes anyway: an emulated guest waits its turn on the host."""
    crowd = os.getloadavg()[0] / (os.cpu_count() or 1)
    return gap <= max(1.0, crowd) + 2 * calm


def test_vcpus_are_plugged_and_brought_online_through_ansible(guest: Guest, calm: float) -> None:
    with writes(guest) as window:
        result = ansible.run_module("resize_domain", domain=guest.name, vcpus=2)
    assert not result["failed"], result["msg"]
    assert change(result, "vcpus")["applied"] == "live"
    assert change(result, "vcpus")["guest_sees"] == 2 == online_cpus(guest)
    assert guest.xml(inactive=True).find("vcpu").get("current") == "2"
    assert not result["restart_required"]
    assert undisturbed(window.longest, calm), (window, calm)
    assert not resize(guest, vcpus=2)["changed"]


def test_a_frozen_guest_is_left_alone(guest: Guest) -> None:
    domain = guest.domain()
    domain.fsFreeze()
    try:
        result = start(guest, vcpus=1).result()
    finally:
        domain.fsThaw()
    assert result["failed"]
    assert "are frozen" in result["msg"]
    assert online_cpus(guest) == 2


def test_more_vcpus_than_the_host_has_need_overcommit(guest: Guest) -> None:
    result = start(guest, vcpus=4, overcommit=False).result()
    if not result["failed"]:
        pytest.skip("this host has four CPUs")
    assert "overcommit" in result["msg"]
    assert online_cpus(guest) == 2


def test_a_vcpu_that_cannot_be_unplugged_is_taken_offline(guest: Guest, calm: float) -> None:
    with writes(guest) as window:
        result = twice(guest, vcpus=1)
    assert change(result, "vcpus")["guest_sees"] == 1 == online_cpus(guest)
    if guest.xml().get("type") != "kvm":
        assert result["restart_required"], "QEMU's emulation keeps the vCPU until the next start"
    assert undisturbed(window.longest, calm), (window, calm)


def test_the_balloon_takes_memory_and_gives_it_back(guest: Guest, calm: float) -> None:
    before = memory_total(guest)
    with writes(guest) as window:
        taken = twice(guest, memory="208M", apply="live")
        assert change(taken, "memory")["guest_sees"] == memory_total(guest)
        assert before - memory_total(guest) == 16 * MIB
        twice(guest, memory="224M")
    assert memory_total(guest) == before
    assert undisturbed(window.longest, calm), (window, calm)


def test_for_the_next_boot_only_the_definition_changes(guest: Guest) -> None:
    before = online_cpus(guest), memory_total(guest)
    made = twice(guest, vcpus=3, memory="256M", max_vcpus=6, max_memory="2G", apply="next_boot")
    assert {one["what"]: one["applied"] for one in made["changes"]} == dict.fromkeys(
        ("vcpus", "memory", "max_vcpus", "max_memory"), "next_boot"
    )
    assert made["restart_required"]
    assert (online_cpus(guest), memory_total(guest)) == before
    twice(guest, vcpus=1, memory="224M", max_vcpus=4, max_memory="1G", apply="next_boot")
    assert not resize(guest, vcpus=1, memory="224M")["changed"]


def test_a_dimm_is_plugged_and_its_way_out_is_explained(guest: Guest, calm: float) -> None:
    before = memory_total(guest)
    with writes(guest) as window:
        made = twice(guest, memory="352M")
    assert "DIMM" in change(made, "memory")["why"]
    # The page table of new memory is taken out of it.
    assert 0.95 * 128 * MIB < memory_total(guest) - before <= 128 * MIB
    assert "offline" not in guest.exec("cat /sys/devices/system/memory/memory*/state").text
    back = twice(guest, memory="224M")
    assert memory_total(guest) - before < 8 * MIB
    left = guest.xml().findall("devices/memory")
    assert not left or "the guest keeps the DIMM" in change(back, "memory")["why"]
    assert undisturbed(window.longest, calm), (window, calm)


def test_virtio_mem_grows_and_shrinks(guest: Guest, calm: float) -> None:
    try:
        guest.domain().attachDeviceFlags(VIRTIO_MEM, libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    except libvirt.libvirtError as error:
        pytest.skip(f"this host has no virtio-mem: {error}")
    before = memory_total(guest)
    with writes(guest) as window:
        made = twice(guest, memory="416M")  # more than a DIMM that the guest kept
        assert "virtio-mem" in change(made, "memory")["why"]
        assert memory_total(guest) > before + 176 * MIB
        twice(guest, memory="224M")
    assert memory_total(guest) < before + 8 * MIB
    assert undisturbed(window.longest, calm), (window, calm)


@pytest.mark.parametrize(("target", "size", "begins"), [("vda", 224, 65), ("vdb", 176, 1), ("vdc", 384, 0)])
def test_a_disk_grows_with_its_partition_and_filesystem(
    guest: Guest, calm: float, target: str, size: int, begins: int
) -> None:
    """``vda`` is the disk that the guest boots from. ``size`` of the disk and where its filesystem ``begins``, in MiB."""
    with writes(guest, target) as window:
        made = twice(guest, disks=[{"target": target, "size": f"{size}M"}])
    assert change(made, f"disk {target}")["guest_sees"] == size * MIB
    grown = change(made, f"filesystem {target}")
    room = (size - begins) * MIB
    assert room - 6 * MIB <= grown["guest_sees"] <= room
    blocks = int(guest.exec(["/bin/df", "-k", f"/disk/{target}"]).text.split()[-5])
    assert blocks * 1024 > 0.8 * room
    assert undisturbed(window.longest, calm), (window, calm)


@pytest.mark.skipif(int(os.environ.get("VMK_SCALE", "1")) < 2, reason="make test-long")
def test_an_xfs_grows_with_its_partition(guest_factory: GuestFactory) -> None:
    disks = (DiskSpec("vda"), DiskSpec("vdb", size=384 * MIB, fs="xfs", partitioned=True))
    grown = twice(guest_factory(GuestSpec("partxfs", disks=disks)), disks=[{"target": "vdb", "size": "448M"}])
    assert change(grown, "filesystem vdb")["guest_sees"] > 440 * MIB


def test_a_disk_grows_alone_when_its_filesystem_is_to_stay(guest: Guest) -> None:
    alone = {"target": "vdc", "size": "400M", "grow_filesystem": False}
    assert [one["what"] for one in twice(guest, disks=[alone])["changes"]] == ["disk vdc"]
    grown = twice(guest, disks=[{"target": "vdc"}])
    assert [one["what"] for one in grown["changes"]] == ["filesystem vdc"]
    assert change(grown, "filesystem vdc")["guest_sees"] > 390 * MIB


def test_a_partition_with_another_one_behind_it_stays_and_the_rest_is_done(guest: Guest) -> None:
    size = guest.domain().blockInfo("vdb")[0] // MIB + 16
    resize(guest, disks=[{"target": "vdb", "size": f"{size}M", "grow_filesystem": False}])
    guest.exec("echo ', +' | sfdisk --quiet --force --no-reread --append /dev/vdb && partx --update /dev/vdb")
    try:
        made = twice(guest, memory="208M", disks=[{"target": "vdb", "size": f"{size + 16}M"}])
        assert change(made, "filesystem vdb")["applied"] == "none"
        assert "another partition lies behind" in change(made, "filesystem vdb")["why"]
    finally:
        guest.exec("sfdisk --quiet --force --no-reread --delete /dev/vdb 2 && partx --delete --nr 2 /dev/vdb")
    grown = twice(guest, memory="224M", disks=[{"target": "vdb"}])
    assert change(grown, "filesystem vdb")["guest_sees"] > (size + 8) * MIB


def test_a_disk_with_overlays_grows_and_its_checkpoints_end(guest: Guest, tmp_path: Path) -> None:
    domain = guest.domain()
    cut = "<domainsnapshot><disks><disk name='vda' snapshot='external'/>" + "".join(
        f"<disk name='{other}' snapshot='no'/>" for other in ("vdb", "vdc")
    )
    domain.checkpointCreateXML(_checkpoint("vmk-0123abcd-one"))
    domain.checkpointCreateXML(_checkpoint("vmk-0123abcd-two"))
    domain.snapshotCreateXML(cut + "</disks></domainsnapshot>", libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    domain.checkpointCreateXML(_checkpoint("somebody-elses"))
    wanted = {"disks": [{"target": "vda", "size": "256M"}]}

    before = host_state(guest.connection())
    refused = start(guest, **wanted).result()
    assert refused["failed"]
    assert "somebody-elses" in refused["msg"]
    assert not before.differences(host_state(guest.connection()))

    domain.checkpointLookupByName("somebody-elses").delete()
    assert start(guest, kill_at="checkpoints disk vda", **wanted).wait() < 0
    assert len(domain.listAllCheckpoints()) == 2
    assert start(guest, kill_at="disk vda", **wanted).wait() < 0
    assert not domain.listAllCheckpoints()
    assert domain.blockInfo("vda")[0] == 224 * MIB
    made = resize(guest, **wanted)
    assert change(made, "disk vda")["after"] == 256 * MIB
    assert not resize(guest, **wanted)["changed"]


def _checkpoint(name: str) -> str:
    return (
        f"<domaincheckpoint><name>{name}</name><disks><disk name='vda' checkpoint='bitmap'/>"
        "<disk name='vdb' checkpoint='no'/><disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
    )


def test_a_kill_at_any_step_is_repaired_by_the_next_run(guest: Guest, tmp_path: Path) -> None:
    kills = [
        (["begin"], {"vcpus": 2, "memory": "208M"}),
        (["begin", "vcpus"], {"vcpus": 1, "memory": "224M"}),
        (["begin", "vcpus"], {"vcpus": 2, "memory": "208M"}),
        (["begin", "vcpus", "memory"], {"vcpus": 1, "memory": "224M"}),
        (["begin", "vcpus", "memory", "definition"], {"vcpus": 2, "memory": "208M"}),
        (["begin", "disk vdb"], {"disks": [{"target": "vdb", "size": "224M"}]}),
        (["begin", "disk vdb", "filesystem vdb"], {"disks": [{"target": "vdb", "size": "240M"}]}),
    ]
    for number, (steps, wanted) in enumerate(kills):
        log = tmp_path / str(number)
        process = start(guest, kill_at=steps[-1], log=log, **wanted)
        assert process.wait() < 0, (steps, process.result())
        assert log.read_text().split("\n")[:-1] == [*steps[:-1], f"!{steps[-1]}"]
        made = resize(guest, **wanted)
        assert not resize(guest, **wanted)["changed"], (steps, made)
        assert online_cpus(guest) == wanted.get("vcpus", 2)
        assert guest.is_running()
    assert not unfinished(guest)


def test_bad_wishes_are_refused_before_anything_changes(guest: Guest) -> None:
    before = host_state(guest.connection())
    for options, says in (
        ({}, "Nothing to resize"),
        ({"vcpus": 0}, "vcpus"),
        ({"memory": "lots"}, "size"),
        ({"memory": "1025K"}, "MiB"),
        ({"disks": [{"target": "vdz", "size": "1G"}]}, "vda, vdb, vdc"),
        ({"disks": [{"target": "../vda", "size": "1G"}]}, "safe name"),
        ({"disks": [{"target": "vda", "size": "32M"}]}, "lost"),
        ({"vcpus": 9, "apply": "live"}, "cannot be changed live"),
        ({"vcpus": 2, "max_vcpus": 1}, "max_vcpus"),
        ({"max_vcpus": 4096}, "machine type"),
        ({"max_memory": "192M"}, "max_memory"),
        ({"memory": "8T", "max_memory": "8T", "overcommit": False}, "overcommit"),
        ({"vcpus": 1, "disks": [{"target": "vda", "size": "8T"}], "overcommit": False}, "overcommit"),
    ):
        result = start(guest, **options).result()
        assert result["failed"], options
        assert says in result["msg"], (options, result["msg"])
    assert not before.differences(host_state(guest.connection()))


def test_all_that_the_guest_wrote_is_there_in_sound_filesystems(guest: Guest) -> None:
    logs = {target: guest.writer_log(target).last.count for target in ("vda", "vdb", "vdc")}
    assert not any(guest.writer_errors(target) for target in logs)
    images = guest.active_paths()
    guest.shutdown()
    for target, count in logs.items():
        partition = {"vda": 2, "vdb": 1}.get(target)
        checked = evidence.fsck(images[target], partition)
        assert checked.clean, checked.output
        if target != "vdc":  # debugfs reads ext4 only
            log = evidence.writer_log(images[target], partition)
            assert log.is_intact
            assert log.last.count >= count
    guest.start()  # from the disk that has grown
