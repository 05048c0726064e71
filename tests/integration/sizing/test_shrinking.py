# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Disks get smaller only when their filesystem fits, as a checked copy, and the original comes back when it has to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import appliance, evidence
from lab.ansible import run_module
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.images import run
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory
from ansible_collections.vmkeeper.libvirt.tests.integration.sizing.resizing import (
    MIB,
    change,
    refused,
    resize,
    start,
    unfinished,
)

#: One boot of libguestfs takes tens of seconds in emulation: all but one shrink are for `make test-long`.
LONG = int(os.environ.get("VMK_SCALE", "1")) > 1
pytestmark = pytest.mark.timeout(3600)  # a busy machine makes minutes of them
CHECKPOINT = (
    "<domaincheckpoint><name>vmk-0123abcd-one</name><disks><disk name='vda' checkpoint='bitmap'/>"
    "<disk name='vdb' checkpoint='no'/><disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
)
FREELY = {"allow_shrink": True, "allow_restart": True}


@pytest.fixture(scope="module")
def roomy(module_guest_factory: GuestFactory) -> Guest:
    """A plain disk, a partitioned raw one and an XFS, with much room."""
    disks = (
        DiskSpec("vda", size=128 * MIB),
        DiskSpec("vdb", size=128 * MIB, format="raw", partitioned=True),
        DiskSpec("vdc", size=320 * MIB, fs="xfs", writer=False),
    )
    return module_guest_factory(GuestSpec("roomy", memory=160, disks=disks))


@pytest.fixture(scope="module")
def kept(roomy: Guest) -> str:
    """The sums of files that lie at the end of vda."""
    return fill(roomy, "/disk/vda")


@pytest.fixture(autouse=True)
def libguestfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the modules' libguestfs needs here."""
    why = appliance.missing()
    if why:
        pytest.skip(f"disks are made smaller in libguestfs: {why}")
    for name, value in appliance.environment().items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def hidden(program: str) -> Iterator[None]:
    """The program is not installed for a while, on this private test host."""
    path = shutil.which(program, path="/usr/bin:/bin")
    assert path
    run("mount", "--bind", "/dev/null", path)
    try:
        yield
    finally:
        run("umount", path)


def beside(guest: Guest) -> set[str]:
    """Files in the places of the guest's images that are not its images."""
    images = {path.name for path in guest.images.values()}
    return {path.name for path in guest.images["vda"].parent.iterdir() if ".vmk-" in path.name} - images


def fill(guest: Guest, directory: str) -> str:
    """Files that lie behind much that is gone again, so that they have to move; returns their sums."""
    guest.exec(
        f"cd {directory} && mkdir -p kept && dd if=/dev/zero of=drop bs=1M count=90 2>/dev/null &&"
        " for n in $(seq 10); do head -c 40000 /dev/urandom > kept/$n; done; rm drop; sync",
        timeout=300,
    )
    return sums(guest, directory)


def sums(guest: Guest, directory: str) -> str:
    text = guest.exec(f"cd {directory}/kept && sha256sum *", timeout=300).text
    assert len(text.splitlines()) == 10
    return text


def test_a_disk_is_made_smaller_only_on_all_of_its_conditions(roomy: Guest) -> None:
    smaller = {"disks": [{"target": "vda", "size": "96M"}]}
    assert "would be lost" in refused(roomy, **smaller)["msg"]
    assert "allow_restart: true" in refused(roomy, allow_shrink=True, **smaller)["msg"]
    assert "rollback: true" in refused(roomy, rollback=False, **FREELY, **smaller)["msg"]
    with hidden("guestfish"):
        assert "needs libguestfs" in refused(roomy, **FREELY, **smaller)["msg"]
    assert roomy.is_running()
    assert not unfinished(roomy)


def test_a_disk_that_others_need_is_not_made_smaller(roomy: Guest) -> None:
    clone = roomy.images["vda"].with_name("clone.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", roomy.images["vda"], clone, "128M")
    try:
        result = refused(roomy, disks=[{"target": "vda", "size": "96M"}], **FREELY)
        assert clone.name in result["msg"]
    finally:
        clone.unlink()


def test_what_cannot_be_smaller_is_refused_while_the_guest_runs_on_with_its_checkpoints(roomy: Guest) -> None:
    roomy.domain().checkpointCreateXML(CHECKPOINT)
    number = roomy.domain().ID()
    for target, size, check, says in (
        ("vda", "2M", False, "needs at least"),
        ("vdb", "2M", True, "needs at least"),
        ("vdc", "310M", False, "XFS cannot"),
    ):
        result = start(roomy, check=check, disks=[{"target": target, "size": size}], **FREELY).result()
        assert result["failed"]
        assert says in result["msg"]
    assert roomy.domain().ID() == number
    (checkpoint,) = roomy.domain().listAllCheckpoints()
    checkpoint.delete()
    assert not beside(roomy)
    assert not unfinished(roomy)


def test_a_disk_that_fits_gets_smaller_and_keeps_every_file(roomy: Guest, kept: str) -> None:
    wanted = {"disks": [{"target": "vda", "size": "96M"}], **FREELY}
    foreseen = resize(roomy, check=True, **wanted)
    assert change(foreseen, "disk vda")["applied"] == "restart"
    roomy.domain().checkpointCreateXML(CHECKPOINT)
    made = resize(roomy, **wanted)
    assert any("the next backup is a full one" in warning for warning in made["warnings"]), made["warnings"]
    assert not roomy.domain().listAllCheckpoints()
    assert made["restarted"]
    assert made["downtime_ms"] > 0
    assert roomy.domain().blockInfo("vda")[0] == 96 * MIB
    assert int(roomy.exec("cat /sys/block/vda/size").text) * 512 == 96 * MIB
    assert sums(roomy, "/disk/vda") == kept
    assert roomy.writer_log("vda").is_intact
    assert not beside(roomy)
    assert not resize(roomy, **wanted)["changed"]
    assert not unfinished(roomy)


@pytest.mark.skipif(not LONG, reason="make test-long")
@pytest.mark.parametrize(("target", "size", "says"), [("vda", "32M", "needs at least"), ("vdc", "310M", "XFS cannot")])
def test_a_guest_that_does_not_tell_that_it_does_not_fit_is_started_again(
    roomy: Guest, target: str, size: str, says: str
) -> None:
    roomy.exec("head -c 40000000 /dev/urandom > /disk/vda/much; sync")
    roomy.domain().checkpointCreateXML(
        f"{CHECKPOINT.partition('<disks>')[0]}<disks><disk name='{target}'/></disks></domaincheckpoint>"
    )
    before = roomy.domain().blockInfo(target)[0]
    result = start(roomy, disks=[{"target": target, "size": size, "grow_filesystem": False}], **FREELY).result()
    assert result["failed"]
    for part in (says, "started again", "Checkpoints vmk-0123abcd-one have ended"):
        assert part in result["msg"]
    roomy.wait_ready()
    assert roomy.domain().blockInfo(target)[0] == before
    assert not beside(roomy)
    assert not unfinished(roomy)
    roomy.exec("rm /disk/vda/much; sync")


@pytest.mark.skipif(not LONG, reason="make test-long")
def test_a_partition_gets_smaller_with_its_disk(roomy: Guest) -> None:
    before = fill(roomy, "/disk/vdb")
    identity = roomy.exec("blkid /dev/vdb1").text
    resize(roomy, disks=[{"target": "vdb", "size": "100M"}], **FREELY)
    assert roomy.domain().blockInfo("vdb")[0] == 100 * MIB
    assert roomy.exec("blkid /dev/vdb1").text == identity
    assert "GPT" not in roomy.exec("dmesg | grep -i gpt || true").text, "the kernel complains of the table"
    assert sums(roomy, "/disk/vdb") == before
    assert roomy.writer_log("vdb").is_intact
    assert not beside(roomy)
    # Smaller, and still larger than what lies on it.
    resize(roomy, disks=[{"target": "vdb", "size": "140M", "grow_filesystem": False}])
    wanted = {"disks": [{"target": "vdb", "size": "120M"}], **FREELY}
    assert change(resize(roomy, **wanted), "filesystem vdb")["guest_sees"] > 110 * MIB
    assert not resize(roomy, **wanted)["changed"]
    assert sums(roomy, "/disk/vdb") == before


@pytest.mark.skipif(not LONG, reason="make test-long")
def test_a_stopped_domain_is_started_to_prove_it_and_gets_its_disk_back_if_it_is_not_well(
    roomy: Guest, kept: str
) -> None:
    roomy.shutdown()
    inode = roomy.images["vda"].stat().st_ino
    smaller = {"disks": [{"target": "vda", "size": "80M"}], **FREELY}
    assert "needs at least" in refused(roomy, disks=[{"target": "vda", "size": "1M"}], **FREELY)["msg"]
    result = start(roomy, health_command=["false"], health_timeout="5s", **smaller).result()
    assert result["failed"]
    assert result["rolled_back"]
    assert "off again" in result["msg"]
    assert not roomy.is_running()
    assert roomy.images["vda"].stat().st_ino == inode
    assert not beside(roomy)
    resize(roomy, **smaller)
    assert not roomy.is_running()
    assert not beside(roomy)
    roomy.start()
    assert sums(roomy, "/disk/vda") == kept


STEPS = ["begin", "checkpoints disk vda", "define", "shutdown", "shrink", "swap", "start", "health", "drop"]


@pytest.mark.skipif(not LONG, reason="make test-long")
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_of_a_shrink_is_repaired(roomy: Guest, kept: str, tmp_path: Path, step: str) -> None:
    number = STEPS.index(step) + 1
    size = (80 << 10) - 768 * number
    wanted = {"disks": [{"target": "vda", "size": f"{size}K"}], "max_vcpus": 2 + number, **FREELY}
    log = tmp_path / "steps"
    roomy.domain().checkpointCreateXML(CHECKPOINT)
    # Not told to shut down, it does not: the next run waits no longer than the killed one would have.
    patience = {"shutdown_timeout": "2s"} if step == "shutdown" else {}
    assert start(roomy, kill_at=step, log=log, **wanted, **patience).wait() < 0
    assert log.read_text().splitlines() == [*STEPS[: STEPS.index(step)], f"!{step}"]
    resize(roomy, **wanted)
    roomy.wait_ready()
    assert roomy.domain().blockInfo("vda")[0] == size << 10
    assert not roomy.domain().listAllCheckpoints()
    assert not resize(roomy, **wanted)["changed"]
    assert not beside(roomy)
    assert sums(roomy, "/disk/vda") == kept
    assert roomy.writer_log("vda").is_intact
    assert not unfinished(roomy)


@pytest.mark.skipif(not LONG, reason="make test-long")
@pytest.mark.parametrize("step", ["", "rollback", "put-back", "start-old"])
def test_disk_and_definition_of_a_running_domain_come_back_together(roomy: Guest, kept: str, step: str) -> None:
    """By the run itself, or by the next one where it is killed on the way."""
    inode, before = roomy.images["vda"].stat().st_ino, roomy.xml_text(inactive=True)
    present = roomy.domain().blockInfo("vda")[0]
    wanted = {"disks": [{"target": "vda", "size": "73M"}], "max_vcpus": 20, **FREELY}
    run = start(roomy, kill_at=step, health_command=["false"], health_timeout="2s", **wanted)
    if step:
        assert run.wait() < 0
        settled = resize(roomy, disks=[{"target": "vda", "size": str(present)}])
        assert not settled["changed"]
        assert any("taken back: it runs" in warning for warning in settled["warnings"]), settled["warnings"]
    else:
        result = run.result()
        assert result["failed"]
        assert result["rolled_back"]
        assert "its old disks are" in result["msg"]
    roomy.wait_ready()
    assert roomy.images["vda"].stat().st_ino == inode
    assert roomy.xml_text(inactive=True) == before
    assert roomy.domain().blockInfo("vda")[0] == present
    assert not beside(roomy)
    assert sums(roomy, "/disk/vda") == kept
    assert roomy.writer_log("vda").is_intact
    assert not unfinished(roomy)


@pytest.mark.skipif(not LONG, reason="make test-long")
def test_what_a_guest_wrote_on_its_smaller_disk_since_the_kill_is_never_thrown_away(roomy: Guest, kept: str) -> None:
    wanted = {"disks": [{"target": "vda", "size": "72M"}], **FREELY}
    assert start(roomy, kill_at="health", **wanted).wait() < 0
    roomy.wait_ready()
    roomy.write_file("/disk/vda/since", b"written since")
    roomy.exec("sync")
    roomy.shutdown()
    settled = resize(roomy, **wanted)
    (original,) = beside(roomy)
    assert any(original in warning and "switched off since" in warning for warning in settled["warnings"])
    assert not roomy.is_running()
    roomy.start()
    assert roomy.read_file("/disk/vda/since") == b"written since"
    assert roomy.domain().blockInfo("vda")[0] == 72 * MIB
    assert sums(roomy, "/disk/vda") == kept
    assert not unfinished(roomy)
    roomy.images["vda"].with_name(original).unlink()


@pytest.mark.skipif(not LONG, reason="make test-long")
def test_a_copy_that_somebody_has_started_since_the_kill_is_not_exchanged(roomy: Guest, kept: str) -> None:
    wanted = {"disks": [{"target": "vda", "size": "71M"}], **FREELY}
    assert start(roomy, kill_at="start", **wanted).wait() < 0
    roomy.start()
    roomy.write_file("/disk/vda/since", b"written after the kill")
    roomy.exec("sync")
    assert any("found well" in warning for warning in resize(roomy, **wanted)["warnings"])
    assert roomy.read_file("/disk/vda/since") == b"written after the kill"
    assert not beside(roomy)


@pytest.mark.skipif(not LONG, reason="make test-long")
def test_a_kill_before_a_proved_domain_is_off_again_is_repaired(roomy: Guest, kept: str) -> None:
    roomy.shutdown()
    wanted = {"disks": [{"target": "vda", "size": "70M"}], **FREELY}
    assert start(roomy, kill_at="stop", **wanted).wait() < 0
    assert roomy.is_running()
    assert not resize(roomy, **wanted)["changed"]
    assert not roomy.is_running()
    assert not beside(roomy)
    roomy.start()
    assert sums(roomy, "/disk/vda") == kept


@pytest.mark.skipif(not LONG, reason="make test-long")
def test_a_kill_while_libguestfs_works_leaves_nothing_of_it(roomy: Guest, kept: str) -> None:
    inode = roomy.images["vda"].stat().st_ino
    killed = start(roomy, disks=[{"target": "vda", "size": "69M"}], **FREELY)
    scratch = until(lambda: scratch_of(killed.pid), "guestfish working on the image", 600)
    killed.kill()
    assert scratch.is_dir()
    (recovered,) = run_module("recover_domain", domain=roomy.name)["findings"]
    assert recovered["settled"], recovered
    assert not scratch.exists()
    roomy.wait_ready()
    assert roomy.images["vda"].stat().st_ino == inode
    assert not beside(roomy)
    assert sums(roomy, "/disk/vda") == kept
    assert not unfinished(roomy)


def scratch_of(pid: int) -> Path | None:
    """The directory of the appliance that the module with this pid has booted and given its image to."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{pid}\n" not in (process / "status").read_text():
                continue
            environment = (process / "environ").read_bytes().split(b"\0")
            for word in environment:
                if word.startswith(b"LIBGUESTFS_TMPDIR=") and list(Path(os.fsdecode(word[18:])).glob("*/*")):
                    return Path(os.fsdecode(word[18:]))
    return None


@pytest.mark.skipif(not LONG, reason="make test-long")
def test_a_disk_with_a_dos_table_gets_smaller_and_still_boots(guest_factory: GuestFactory) -> None:
    machine = guest_factory(GuestSpec("dosboot", disks=(DiskSpec("vda", size=224 * MIB, boot=True),)))
    before = fill(machine, "/disk/vda")
    identity = machine.exec("blkid /dev/vda*").text
    made = resize(machine, disks=[{"target": "vda", "size": "160M"}], **FREELY)
    assert made["restarted"]
    machine.wait_ready()
    assert machine.domain().blockInfo("vda")[0] == 160 * MIB
    assert machine.exec("blkid /dev/vda*").text == identity
    assert int(machine.exec("cat /sys/block/vda/vda2/size").text) * 512 == 95 * MIB
    assert sums(machine, "/disk/vda") == before
    assert machine.writer_log("vda").is_intact
    machine.shutdown()
    assert evidence.fsck(machine.images["vda"], 2).clean
    assert not beside(machine)
