# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What needs a start: the next boot, a restart, and the way back when the new size does not work."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import libvirt
import pytest
from lab import images
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.host import TestHost
from lab.images import run
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Journal
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import restart, settle, shrinking
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory
from ansible_collections.vmkeeper.libvirt.tests.integration.sizing.resizing import (
    MIB,
    change,
    memory_total,
    online_cpus,
    resize,
    start,
    twice,
    unfinished,
)
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks

IDE = (
    "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>"
    "<target dev='hda' bus='ide'/></disk>"
)
BLOCK = "<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{}'/><target dev='vdz' bus='virtio'/></disk>"
MOUNT_IT = (
    "modprobe ata_piix; for n in $(seq 200); do [ -b /dev/sda ] && break; sleep 0.1; done;"
    " mkdir -p /mnt && mount /dev/sda /mnt"
)


@pytest.fixture(scope="module")
def small(module_guest_factory: GuestFactory) -> Guest:
    """No room to grow while it runs."""
    return module_guest_factory(GuestSpec("small", vcpus=1, memory=160, disks=(DiskSpec("vda"),)))


def test_the_next_boot_gets_what_cannot_be_live(small: Guest) -> None:
    made = twice(small, vcpus=2, memory="192M", max_memory="256G")
    assert made["restart_required"]
    assert not made["restarted"]
    assert {one["applied"] for one in made["changes"]} == {"next_boot"}
    assert online_cpus(small) == 1
    definition = small.xml(inactive=True)
    assert definition.find("vcpu").text == "2"
    assert definition.find("cpu/numa/cell").get("memory") == str(192 * 1024)


def test_a_restart_puts_it_in_force(small: Guest) -> None:
    made = resize(
        small, vcpus=2, memory="192M", max_memory="256G", allow_restart=True, health_command=["cat", "/run/lab-ready"]
    )
    assert made["changed"]
    assert made["restarted"]
    assert made["downtime_ms"] > 0
    assert not made["restart_required"]
    assert change(made, "vcpus")["guest_sees"] == 2 == online_cpus(small)
    assert change(made, "memory")["guest_sees"] == memory_total(small)
    assert not resize(small, vcpus=2, memory="192M", max_memory="256G", allow_restart=True)["changed"]


def test_room_alone_is_worth_a_restart_that_was_allowed(small: Guest) -> None:
    waits = twice(small, max_vcpus=3, max_memory="256G")
    assert waits["restart_required"]
    made = resize(small, max_vcpus=3, max_memory="256G", allow_restart=True)
    assert made["restarted"]
    assert not made["restart_required"]
    assert change(made, "max_vcpus")["applied"] == "restart"
    assert not resize(small, max_vcpus=3, max_memory="256G", allow_restart=True)["changed"]
    assert resize(small, vcpus=3)["changed"]
    assert online_cpus(small) == 3
    resize(small, vcpus=2, allow_restart=True)


def test_what_qemu_refuses_live_waits_for_the_next_boot_and_the_rest_is_stored(small: Guest) -> None:
    before = online_cpus(small)
    # No host of these tests has so much: QEMU cannot make the DIMM.
    made = resize(small, vcpus=before + 1, memory=f"{192 * 1024 + 192}M")
    assert change(made, "vcpus")["applied"] == "live"
    assert change(made, "memory")["applied"] == "next_boot"
    assert "Plugging" in change(made, "memory")["why"]
    assert made["restart_required"]
    definition = small.xml(inactive=True)
    assert definition.find("vcpu").get("current", definition.findtext("vcpu")) == str(before + 1)
    resize(small, vcpus=before, memory="192M")
    assert not resize(small, vcpus=before, memory="192M")["changed"]
    assert small.is_running()


@pytest.fixture(scope="module")
def stopped(module_guest_factory: GuestFactory) -> Guest:
    """Never started."""
    return module_guest_factory(
        GuestSpec("stopped", vcpus=1, memory=160, disks=(DiskSpec("vda", writer=False),)), start=False
    )


def test_a_size_that_cannot_boot_comes_back_by_itself_and_the_domain_before_it_is_told(
    small: Guest, stopped: Guest
) -> None:
    before = small.xml_text(inactive=True)
    wanted = {"memory": "48M", "allow_restart": True, "health_timeout": "20s", "overcommit": True}
    result = tasks.run("resize_domain", domains=[stopped.name, small.name], **wanted)
    assert result.failed
    assert result["rolled_back"] is True
    assert "old definition is back" in result.message
    assert f"What was done on {stopped.name} before stays." in result.message
    (done,) = result["resized"]
    assert (done["domain"], [one["what"] for one in done["changes"]]) == (stopped.name, ["memory"])
    assert stopped.xml(inactive=True).findtext("currentMemory") == str(48 * 1024)
    assert small.xml_text(inactive=True) == before
    small.wait_ready()
    assert memory_total(small) > 64 * MIB
    assert small.writer_log("vda").is_intact
    assert not unfinished(small)


def test_a_definition_that_is_edited_while_another_domain_of_the_task_is_changed_keeps_the_edit(
    guest_factory: GuestFactory, stopped: Guest, tmp_path: Path
) -> None:
    disks = (DiskSpec("vda", writer=False),)
    second = guest_factory(GuestSpec("edited", vcpus=1, memory=160, disks=disks), start=False)
    names = [stopped.name, second.name]
    process = tasks.killed_at("definition", "resize_domain", tmp_path / "steps", how="stop", domains=names, vcpus=2)
    until(lambda: "!definition" in tasks.steps_in(tmp_path / "steps"), "the change of the first")
    second.connection().defineXML(
        second.xml_text(inactive=True).replace("</name>", "</name><title>edited since</title>", 1)
    )
    os.kill(process.pid, signal.SIGCONT)
    resized = tasks.finish(process)
    assert not resized.failed, resized.message
    assert resized["rolled_back"] is False
    assert [one["domain"] for one in resized["resized"]] == names
    assert (second.xml(inactive=True).findtext("title"), second.xml(inactive=True).findtext("vcpu")) == (
        "edited since",
        "2",
    )


def test_a_guest_that_is_off_when_libvirtd_comes_back_is_started_again_by_the_task(
    small: Guest, host: TestHost, tmp_path: Path
) -> None:
    before = small.xml_text(inactive=True)
    wanted = {"domain": small.name, "max_vcpus": 8, "allow_restart": True, "overcommit": True}
    process = tasks.killed_at("start", "resize_domain", tmp_path / "steps", how="stop", **wanted)
    until(lambda: "!start" in tasks.steps_in(tmp_path / "steps"), "the guest being off", 120)
    assert not small.is_running()
    host.restart_libvirtd()
    os.kill(process.pid, signal.SIGCONT)
    lost = tasks.finish(process)
    assert lost.failed
    assert "defect" not in lost.message
    assert "Once libvirt answered again" in lost.message, lost.message
    assert lost["rolled_back"] is False, lost.message
    small.wait_ready()
    assert not unfinished(small)
    assert small.writer_log("vda").is_intact
    small.connection().defineXML(before)


def test_a_change_without_a_restart_in_which_libvirtd_went_away_keeps_no_other_task_off(
    small: Guest, host: TestHost, tmp_path: Path
) -> None:
    before = small.xml_text(inactive=True)
    wanted = {"domain": small.name, "max_vcpus": 8, "apply": "next_boot", "overcommit": True}
    process = tasks.killed_at("definition", "resize_domain", tmp_path / "steps", how="stop", **wanted)
    until(lambda: "!definition" in tasks.steps_in(tmp_path / "steps"), "the step")
    host.restart_libvirtd()
    os.kill(process.pid, signal.SIGCONT)
    assert tasks.finish(process).failed
    assert not unfinished(small), "nothing is to be settled"
    tasks.ok("snapshot", domain=small.name, name="other", quiesce="never")
    tasks.ok("snapshot", domain=small.name, name="other", state="absent")
    assert tasks.ok("resize_domain", **wanted).changed
    assert not tasks.ok("resize_domain", **wanted).changed
    assert small.is_running()
    small.connection().defineXML(before)


def test_a_definition_that_libvirt_refuses_leaves_the_guest_running(small: Guest) -> None:
    before, number = small.xml_text(inactive=True), small.domain().ID()
    # Above 255, QEMU's q35 needs an interrupt remapping that this domain has not.
    result = start(small, max_vcpus=280, allow_restart=True).result()
    assert result["failed"]
    assert "Its definition is as it was" in result["msg"], result["msg"]
    assert small.domain().ID() == number
    assert small.xml_text(inactive=True) == before
    assert not unfinished(small)


def test_a_definition_that_cannot_be_started_is_taken_back_even_without_rollback(small: Guest) -> None:
    before = small.xml_text(inactive=True)
    result = start(small, memory="2T", max_memory="3T", allow_restart=True, rollback=False).result()
    assert result["failed"]
    assert result["rolled_back"], result["msg"]
    assert small.xml_text(inactive=True) == before
    small.wait_ready()
    assert not unfinished(small)


def test_a_kill_at_any_step_of_a_restart_is_repaired(small: Guest, tmp_path: Path) -> None:
    steps = ["begin", "define", "shutdown", "start", "health"]
    for number, step in enumerate(steps):
        wanted = {"max_vcpus": 3 + number, "vcpus": 3 + number, "allow_restart": True}
        log = tmp_path / str(number)
        # Not told to shut down, it does not: the next run waits no longer than the killed one would have.
        patience = {"shutdown_timeout": "2s"} if step == "shutdown" else {}
        assert start(small, kill_at=step, log=log, **wanted, **patience).wait() < 0, step
        assert log.read_text().splitlines()[-1] == f"!{step}"
        resize(small, **wanted)
        assert online_cpus(small) == 3 + number, step
        assert not resize(small, **wanted)["changed"], step
    assert small.writer_log("vda").is_intact
    assert not unfinished(small)


def test_a_guest_that_was_switched_off_since_stays_off_with_the_definition_that_was_edited(small: Guest) -> None:
    wanted = {"max_vcpus": 9, "vcpus": 2, "allow_restart": True}
    assert start(small, kill_at="health", **wanted).wait() < 0
    small.wait_ready()
    small.shutdown()
    edited = small.xml_text(inactive=True).replace("</name>", "</name><title>edited since</title>", 1)
    small.connection().defineXML(edited)
    settled = resize(small, **wanted)
    assert any("switched off since" in warning for warning in settled["warnings"]), settled["warnings"]
    assert not small.is_running()
    definition = small.xml(inactive=True)
    assert definition.findtext("title") == "edited since"
    assert definition.findtext("vcpu") == "9"
    assert not unfinished(small)
    small.start()


def test_a_definition_that_was_stored_only_is_taken_back_unless_it_was_edited(small: Guest) -> None:
    before = small.xml_text(inactive=True)
    number = small.domain().ID()
    wanted = {"max_vcpus": 10, "allow_restart": True, "shutdown_timeout": "2s"}
    assert start(small, kill_at="shutdown", **wanted).wait() < 0
    assert small.xml(inactive=True).findtext("vcpu") == "10"
    settled = tasks.ok("recover_domain", domain=small.name)["findings"]
    assert ["left running" in one["action"] for one in settled] == [True]
    assert small.xml_text(inactive=True) == before
    assert start(small, kill_at="shutdown", **wanted).wait() < 0
    small.connection().defineXML(small.xml_text(inactive=True).replace("edited since", "edited again"))
    tasks.ok("recover_domain", domain=small.name)
    assert small.xml(inactive=True).findtext("title") == "edited again"
    assert small.xml(inactive=True).findtext("vcpu") == "10"
    assert small.domain().ID() == number
    small.connection().defineXML(before)


def test_a_restart_of_a_domain_that_is_undefined_since_is_given_up(small: Guest, tmp_path: Path) -> None:
    wanted = {"max_vcpus": 3, "vcpus": 3, "allow_restart": True}
    assert start(small, kill_at="shutdown", log=tmp_path / "log", **wanted).wait() < 0
    definition = small.xml_text(inactive=True)
    small.destroy()
    small.domain().undefine()
    try:
        (found,) = tasks.ok("recover_domain")["findings"]
        assert (found["domain"], found["settled"]) == (small.name, True)
        assert "given up" in found["action"]
        assert tasks.ok("recover_domain")["findings"] == []
    finally:
        small.connection().defineXML(definition)
    small.start()


@pytest.mark.parametrize("step", ["rollback", "start-old"])
def test_a_kill_during_the_way_back_is_repaired(small: Guest, step: str) -> None:
    before = small.xml_text(inactive=True)
    now = online_cpus(small)
    wanted = {"max_vcpus": 12, "vcpus": now + 1, "allow_restart": True}
    killed = start(small, kill_at=step, health_command=["false"], health_timeout="1s", **wanted)
    assert killed.wait() < 0
    present = resize(small, vcpus=now)  # the size that it had
    assert not present["changed"]
    assert any("taken back" in warning for warning in present["warnings"])
    assert small.xml_text(inactive=True) == before
    small.wait_ready()
    assert online_cpus(small) == now
    assert not unfinished(small)


class _Late:
    """A domain that seems to be off until its disks are exchanged."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        self._domain = domain
        self.seen = False

    def isActive(self) -> bool:
        return self.seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)


def _begun_shrink(guest: Guest) -> Journal:
    """The journal of a shrink of vda, up to the shutdown."""
    stem = f"{guest.images['vda']}.vmk-0000"
    names = {"path": str(guest.images["vda"]), "work": f"{stem}.work", "copy": f"{stem}.copy", "kept": f"{stem}.kept"}
    plan = {
        **dict.fromkeys(("old_xml", "new_xml"), guest.xml_text(inactive=True)),
        **dict.fromkeys(("rollback", "judge", "was_running"), True),
        "health_command": None,
        "health_timeout": 300.0,
        "shutdown_timeout": 1.0,
        "shrinks": [{**names, "target": "vda", "format": "qcow2", "size": MIB, "doing": "Making it smaller"}],
    }
    return Journal.begin(settle.OPERATION, [(guest.domain().UUIDString(), guest.name)], plan)


def test_a_guest_that_somebody_starts_while_its_disk_is_copied_is_not_stopped_and_keeps_its_disk(
    small: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs all the time here, as one that was started again right after it had shut down; only libguestfs is stood in for."""
    connection, number, image = small.connection(), small.domain().ID(), small.images["vda"]
    inode, files = image.stat().st_ino, set(image.parent.iterdir())

    def copied(shrink: dict[str, Any], *, doing: str) -> int:
        shutil.copyfile(shrink["path"], shrink["copy"])
        return os.stat(shrink["path"]).st_mtime_ns

    def exchanged(shrink: dict[str, Any]) -> None:
        swap(shrink)
        late.seen = True

    def untouched() -> bool:
        return (
            small.domain().ID() == number
            and image.stat().st_ino == inode
            and set(image.parent.iterdir()) == files
            and not unfinished(small)
        )

    swap, late = shrinking.swap, _Late(small.domain())
    monkeypatch.setattr(shrinking, "make_copy", copied)
    monkeypatch.setattr(restart, "shut_down", lambda handle, seconds, *, state: None)
    journal = _begun_shrink(small)
    with pytest.raises(Refused, match="somebody has started"):
        restart.restart(connection, small.domain(), journal, journal.operation.plan["new_xml"])
    assert untouched()

    monkeypatch.setattr(shrinking, "swap", exchanged)
    small.stop_writers()
    journal = _begun_shrink(small)
    with pytest.raises(Refused, match="vda has its old size"):
        restart.restart(connection, late, journal, journal.operation.plan["new_xml"])
    assert untouched()

    for steps in (["shutdown", "swap"], ["shutdown", "swap", "start", "health"]):
        journal = _begun_shrink(small)
        for step in steps:
            journal.step(step)
        (shrink,) = journal.operation.plan["shrinks"]
        copied(shrink, doing="")
        swap(shrink)
        assert image.stat().st_ino != inode
        settled = settle.settle("qemu:///system", journal)
        assert "vda of the old size" in settled["action"]
        assert untouched()
    small.start_writer("vda")


def test_a_guest_that_was_switched_off_after_the_way_back_stays_off(small: Guest) -> None:
    """Its run was killed while it waited for the old size."""
    journal = _begun_shrink(small)
    journal.operation.plan["shrinks"] = []
    for step in ("define", "shutdown", "start", "health", "rollback", "put-back"):
        journal.step(step)
    journal.step("start-old", ended="destroyed")
    small.shutdown()
    assert "switched off since" in settle.settle("qemu:///system", journal)["action"]
    assert not small.is_running()
    assert not unfinished(small)


def test_a_stopped_domain_and_its_disk_change_at_once(small: Guest) -> None:
    if small.is_running():
        small.shutdown()
    made = twice(small, vcpus=1, memory="160M", disks=[{"target": "vda", "size": "160M"}])
    assert change(made, "disk vda")["applied"] == "offline"
    assert change(made, "filesystem vda")["applied"] == "none"
    assert not made["restart_required"]
    small.start()
    assert online_cpus(small) == 1
    grown = twice(small, disks=[{"target": "vda"}])
    assert change(grown, "filesystem vda")["guest_sees"] == 160 * MIB


def test_a_raw_disk_on_a_device_gets_the_size_of_the_device_and_no_other(small: Guest) -> None:
    backing = small.directory / "volume"
    backing.touch()
    os.truncate(backing, 32 * MIB)
    node = images.attach_loop(backing)
    disk = BLOCK.format(node)
    try:
        small.domain().attachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        os.truncate(backing, 64 * MIB)
        run("losetup", "--set-capacity", node)
        wanted = {"target": "vdz", "grow_filesystem": False}
        result = start(small, disks=[{**wanted, "size": "48M"}]).result()
        assert result["failed"]
        assert f"Give size: {64 * MIB}" in result["msg"]
        assert small.domain().blockInfo("vdz")[0] == 32 * MIB
        twice(small, disks=[{**wanted, "size": str(64 * MIB)}])
    finally:
        small.domain().detachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        until(lambda: "vdz" not in small.active_paths(), "the disk going away", 60)
        run("losetup", "--detach", node)


def test_a_saved_domain_is_refused(small: Guest) -> None:
    small.domain().managedSave()
    result = start(small, vcpus=2).result()
    assert result["failed"]
    assert "saved state" in result["msg"]
    assert result["rolled_back"] is False
    assert result["resized"] == []
    small.start()


def test_without_guest_exec_it_says_so_and_grows_the_disk(guest_factory: GuestFactory) -> None:
    closed = guest_factory(
        GuestSpec("closed", vcpus=2, agent="real:guest-exec guest-file-open", extra_cmdline="nr_cpus=1")
    )
    made = twice(closed, disks=[{"target": "vda", "size": "160M"}], memory="144M")
    assert change(made, "disk vda")["applied"] == "live"
    assert change(made, "disk vda")["guest_sees"] is None
    assert change(made, "filesystem vda")["applied"] == "none"
    assert "guest-exec" in change(made, "filesystem vda")["why"]
    assert any("was not grown" in warning for warning in made["warnings"])
    # Whether it could spare 16 MiB, nobody tells.
    assert change(made, "memory")["applied"] == "next_boot"
    assert "does not tell what it can spare" in change(made, "memory")["why"]
    assert closed.domain().info()[2] == 160 * 1024
    # Its kernel takes one vCPU and no more: another start would bring the same.
    limited = resize(closed, vcpus=2, allow_restart=True)
    assert not limited["changed"]
    assert not limited["restarted"]
    assert "it sees 1" in change(limited, "vcpus")["why"]
    assert any("it sees 1" in warning for warning in limited["warnings"])


def test_without_rollback_a_size_that_is_not_well_stays(guest_factory: GuestFactory) -> None:
    sick = guest_factory(GuestSpec("sick", vcpus=1, memory=160, disks=(DiskSpec("vda", writer=False),)))
    wanted = {"max_vcpus": 2, "vcpus": 2, "allow_restart": True, "rollback": False}
    result = start(sick, health_command=["false"], health_timeout="1s", **wanted).result()
    assert result["failed"], result
    assert not result["rolled_back"]
    assert "new definition (rollback: false)" in result["msg"]
    sick.wait_ready()
    assert online_cpus(sick) == 2
    assert not resize(sick, **wanted)["changed"]
    assert not unfinished(sick)

    more = {**wanted, "max_vcpus": 3, "vcpus": 3, "health_command": ["false"], "health_timeout": "1s"}
    assert start(sick, kill_at="health", **more).wait() < 0
    sick.wait_ready()
    number = sick.domain().ID()
    assert not resize(sick, **more)["changed"], "what the killed run had begun stays"
    assert sick.domain().ID() == number
    assert online_cpus(sick) == 3


def test_an_ide_disk_that_the_guest_does_not_see_grow_waits_for_a_start(guest_factory: GuestFactory) -> None:
    old = guest_factory(GuestSpec("old", machine="pc", disks=(DiskSpec("vda", writer=False),)), start=False)
    image = old.directory / "ide.raw"
    image.touch()
    os.truncate(image, 32 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    old.domain().attachDeviceFlags(IDE.format(image), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    old.start()
    old.exec(MOUNT_IT)
    wanted = {"disks": [{"target": "hda", "size": "48M"}]}
    made = resize(old, **wanted)
    assert made["changed"]
    assert made["restart_required"], made
    assert any("has not noticed" in warning for warning in made["warnings"]), made["warnings"]
    again = resize(old, **wanted)
    assert not again["changed"], again["changes"]
    assert again["restart_required"]
    assert resize(old, allow_restart=True, **wanted)["restarted"]
    old.exec(MOUNT_IT)
    grown = resize(old, **wanted)
    assert change(grown, "filesystem hda")["guest_sees"] == 48 * MIB
    assert not resize(old, **wanted)["changed"]
