# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Chains get shorter, nothing that anybody reads is written, and an interrupted commit is finished."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import ways
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks
from ansible_collections.vmkeeper.libvirt.tests.lab.evidence import check
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

MIB = 1 << 20
KILLED_AT = ["begin", "mark", "commit", "relink", "verify", "commit#2", "relink#2", "verify#2", "snapshots", "remove"]


@pytest.fixture(scope="module")
def guest(make_guest: Callable[..., Guest]) -> Guest:
    return make_guest(
        GuestSpec(
            "commit",
            disks=(
                DiskSpec("vda", size=40 * MIB, writer=False),
                DiskSpec("vdb", size=40 * MIB, format="raw", writer=False),
            ),
        )
    )


_numbers = itertools.count(1)


@pytest.fixture
def stopped(make_guest: Callable[..., Guest]) -> Guest:
    disks = (
        DiskSpec("vda", size=8 * MIB, fs=None, writer=False),
        DiskSpec("vdb", size=8 * MIB, fs=None, writer=False, format="raw"),
    )
    return make_guest(GuestSpec(f"stopped{next(_numbers)}", disks=disks), start="no")


@pytest.fixture(autouse=True)
def flat_and_running(guest: Guest) -> Iterator[None]:
    if not guest.is_running():
        guest.start()
    yield
    tasks.ok("recover_domain", domain=guest.name)
    if not guest.is_running():
        guest.start()
    for name in ways.snapshots(guest):
        tasks.ok("snapshot", domain=guest.name, name=name, protected=False)
    tasks.ok("blockcommit", domain=guest.name)
    assert not ways.snapshots(guest)
    ways.assert_whole(guest)


def history(guest: Guest, *names: str) -> None:
    """A snapshot of each name; before each the guest writes that name, and at last ``end``."""
    for name in names:
        ways.write(guest, name)
        tasks.ok("snapshot", domain=guest.name, name=name, quiesce="never")
    ways.write(guest, "end")


def test_a_running_guests_chain_becomes_flat_and_the_guest_sees_no_difference(guest: Guest) -> None:
    history(guest, "one", "two", "three")
    answer = tasks.ok("blockcommit", domain=guest.name)
    assert answer.changed
    assert {entry["name"] for entry in answer["snapshots_ended"]} == {"one", "two", "three"}
    assert {path.name for path in guest.active_paths().values()} == {"vda.qcow2", "vdb.raw"}
    assert all(len(entry["removed"]) == 3 for entry in answer["disks"])
    assert ways.read(guest) == {"end"}
    assert ways.snapshots(guest) == {}
    ways.assert_whole(guest)
    assert not tasks.ok("blockcommit", domain=guest.name).changed


def test_keep_merges_the_oldest_layers_and_the_newer_snapshots_stay_whole(guest: Guest) -> None:
    history(guest, "one", "two", "three")
    foreseen = tasks.ok("blockcommit", domain=guest.name, keep=2, check=True)
    answer = tasks.ok("blockcommit", domain=guest.name, keep=2)
    assert foreseen["snapshots_ended"] == answer["snapshots_ended"]
    assert [entry["chain_after"] for entry in foreseen["disks"]] == [entry["chain_after"] for entry in answer["disks"]]
    assert [entry["name"] for entry in answer["snapshots_ended"]] == ["one", "two"]
    assert ways.snapshots(guest) == {"three": None}
    assert ways.content_of(guest, "three") == {"three"}
    assert ways.read(guest) == {"end"}
    ways.assert_whole(guest)


def test_a_stopped_domain_is_committed_offline_active_and_intermediate(guest: Guest) -> None:
    history(guest, "one", "two", "three")
    guest.shutdown()
    tasks.ok("blockcommit", domain=guest.name, keep=2)
    assert ways.content_of(guest, "three") == {"three"}
    assert ways.read(guest) == {"end"}
    ways.assert_whole(guest)
    tasks.ok("blockcommit", domain=guest.name)
    assert ways.read(guest) == {"end"}
    check(guest.images["vda"])
    ways.assert_whole(guest)


def test_top_and_base_name_the_layers_and_a_wrong_one_is_refused_with_the_right_ones(guest: Guest) -> None:
    history(guest, "one", "two", "three")
    layers = guest.chain("vda")
    wrong = tasks.run("blockcommit", domain=guest.name, disks=["vda"], top="/nowhere")
    assert wrong.failed
    assert str(layers[0]) in wrong.message
    assert tasks.run("blockcommit", domain=guest.name, top=str(layers[1])).failed
    upside_down = tasks.run("blockcommit", domain=guest.name, disks=["vda"], top=str(layers[3]), base=str(layers[1]))
    assert upside_down.failed
    tasks.ok("blockcommit", domain=guest.name, disks=["vda"], top=str(layers[1]), base=str(layers[2]))
    assert guest.chain("vda") == [layers[0], layers[2], layers[3]]
    assert len(guest.chain("vdb")) == 4
    assert set(ways.snapshots(guest)) == {"one", "three"}
    assert ways.bases(guest, "three")["vda"] == layers[2]
    assert ways.content_of(guest, "three") == {"three"}
    assert ways.content_of(guest, "one") == {"one"}


def test_a_protected_snapshot_is_not_ended(guest: Guest) -> None:
    history(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one", protected=True)
    before = ways.files(guest)
    refused = tasks.run("blockcommit", domain=guest.name)
    assert refused.failed
    assert "protected" in refused.message
    assert tasks.run("snapshot", domain=guest.name, name="one", state="absent").failed
    assert ways.files(guest) == before
    assert ways.content_of(guest, "one") == {"one"}


def test_a_live_commit_killed_at_any_step_is_finished_by_the_same_task(guest: Guest, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    for number, step in enumerate(KILLED_AT):
        keep = 2 if number % 2 else 1
        history(guest, "one", "two")
        killed = tasks.finish(tasks.killed_at(step, "blockcommit", log, domain=guest.name, keep=keep))
        assert killed.killed, (step, tasks.steps_in(log))
        assert tasks.ok("blockcommit", domain=guest.name, keep=keep).changed, step
        assert ways.read(guest) == {"end"}, step
        assert set(ways.snapshots(guest)) == ({"two"} if keep == 2 else set()), step
        if keep == 2:
            assert ways.content_of(guest, "two") == {"two"}, step
            tasks.ok("blockcommit", domain=guest.name)
        ways.assert_whole(guest)


def test_an_offline_commit_killed_at_any_step_is_finished_by_the_same_task(stopped: Guest, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    for number, step in enumerate(KILLED_AT):
        keep = 2 if number % 2 else 1
        for name in ("one", "two"):
            ways.write_stopped(stopped, name)
            tasks.ok("snapshot", domain=stopped.name, name=name)
        ways.write_stopped(stopped, "end")
        killed = tasks.finish(tasks.killed_at(step, "blockcommit", log, domain=stopped.name, keep=keep))
        assert killed.killed, (step, tasks.steps_in(log))
        assert ways.read_stopped(stopped.active_paths().values()) == {"end"}, step
        assert tasks.ok("blockcommit", domain=stopped.name, keep=keep).changed, step
        assert ways.read_stopped(stopped.active_paths().values()) == {"end"}, step
        assert set(ways.snapshots(stopped)) == ({"two"} if keep == 2 else set()), step
        if keep == 2:
            assert ways.read_stopped(ways.bases(stopped, "two").values()) == {"two"}, step
            tasks.ok("blockcommit", domain=stopped.name)
        ways.assert_whole(stopped)


def test_a_layer_of_a_disk_that_was_detached_before_its_turn_is_not_deleted(stopped: Guest, tmp_path: Path) -> None:
    ways.write_stopped(stopped, "one")
    tasks.ok("snapshot", domain=stopped.name, name="one")
    ways.write_stopped(stopped, "end")
    overlay = stopped.active_paths()["vdb"]
    assert tasks.finish(tasks.killed_at("commit", "blockcommit", tmp_path / "log", domain=stopped.name)).killed
    xml = stopped.xml_text(inactive=True)
    start = xml.rindex("<disk ", 0, xml.index("<target dev='vdb'"))
    stopped.connection().defineXML(xml[:start] + xml[xml.index("</disk>", start) + len("</disk>") :])
    refused = tasks.run("blockcommit", domain=stopped.name)
    assert refused.answer["error"]["kind"] == "refused", refused.message
    assert str(overlay) in refused.message
    assert not tasks.ok("blockcommit", domain=stopped.name).changed
    tasks.ok("recover_domain", domain=stopped.name)
    assert ways.snapshots(stopped) == {}
    assert stopped.active_paths() == {"vda": stopped.images["vda"]}
    assert ways.read_stopped([stopped.images["vda"], overlay]) == {"end"}
    stopped.connection().defineXML(xml)


def back_up(guest: Guest, target: Path, *, since: str | None, checkpoint: str | None) -> Path:
    """A push backup of vda by libvirt alone: a full, or what its bitmap says of the time since a checkpoint."""
    incremental = f"<incremental>{since}</incremental>" if since else ""
    xml = (
        f"<domainbackup mode='push'>{incremental}<disks><disk name='vda' type='file'><driver type='qcow2'/>"
        f"<target file='{target}'/></disk><disk name='vdb' backup='no'/></disks></domainbackup>"
    )
    point = f"<domaincheckpoint><name>{checkpoint}</name><disks><disk name='vda'/></disks></domaincheckpoint>"
    guest.domain().backupBegin(xml, point if checkpoint else None, 1 if target.exists() else 0)
    until(lambda: guest.domain().jobInfo()[0] == 0, "the backup")
    return target


def test_a_snapshot_and_a_commit_of_a_domain_that_is_off_keep_what_its_bitmaps_record(guest: Guest) -> None:
    room = guest.directory.parent
    full, increment = room / "full.qcow2", room / "increment.qcow2"
    try:
        guest.exec("dd if=/dev/urandom of=/disk/vda/old bs=1M count=6; sync", timeout=120)
        back_up(guest, full, since=None, checkpoint="point")
        ways.write(guest, "below")
        guest.shutdown()
        tasks.ok("snapshot", domain=guest.name, name="one", disks=["vda"], tags={"a": "b"})
        tasks.ok("snapshot", domain=guest.name, name="one", tags={"a": "c"})
        assert [one.getName() for one in guest.domain().listAllCheckpoints()] == ["point"]
        guest.start()
        guest.exec("dd if=/dev/urandom of=/disk/vda/above bs=64k count=20; sync", timeout=120)
        ways.write(guest, "end")
        guest.shutdown()
        answer = tasks.ok("blockcommit", domain=guest.name)
        assert {entry["disk"]: entry["method"] for entry in answer["disks"]} == {"vda": "offline", "vdb": None}
        guest.domain().createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        link = ["-f", "qcow2", "-F", "qcow2", "-b", str(full)]
        subprocess.run(["qemu-img", "create", "-q", *link, str(increment)], check=True)
        back_up(guest, increment, since="point", checkpoint=None)
        guest.destroy()
        images = [str(increment), str(guest.images["vda"])]
        subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", *images], check=True)
        # Only that: an increment of everything would be no proof that anything was recorded.
        assert increment.stat().st_blocks * 512 < guest.images["vda"].stat().st_blocks * 512 / 2
    finally:
        if not guest.is_running():
            guest.domain().createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        for one in guest.domain().listAllCheckpoints():
            one.delete()
        guest.destroy()
        full.unlink(missing_ok=True)
        increment.unlink(missing_ok=True)


def test_checkpoints_that_a_killed_run_had_put_aside_are_defined_again(stopped: Guest) -> None:
    stopped.domain().createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    for name in ("parent", "child"):
        xml = f"<domaincheckpoint><name>{name}</name><disks><disk name='vda'/></disks></domaincheckpoint>"
        stopped.domain().checkpointCreateXML(xml)
    stopped.destroy()
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import libvirt\n"
        "from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.checkpoints_aside import set_aside\n"
        "with set_aside(libvirt.open('qemu:///system').lookupByName(sys.argv[2])): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([tasks.PYTHON, "-c", script, str(tasks.COLLECTIONS), stopped.name], check=False)
    assert died.returncode < 0
    assert stopped.domain().listAllCheckpoints() == []
    tasks.ok("recover_domain", domain=stopped.name)
    assert {one.getName() for one in stopped.domain().listAllCheckpoints()} == {"parent", "child"}
    assert stopped.domain().checkpointLookupByName("child").getParent().getName() == "parent"


def test_a_libvirtd_restart_during_a_live_commit_costs_nothing(guest: Guest, host: TestHost) -> None:
    history(guest, "one")
    guest.exec("dd if=/dev/urandom of=/disk/vda/load bs=1M count=12; sync", timeout=120)
    began = tasks.start("blockcommit", domain=guest.name, disks=["vda"], bandwidth="1M")
    until(lambda: guest.domain().blockJobInfo("vda", 0), "the job starting")
    host.restart_libvirtd()
    lost = tasks.finish(began)
    assert lost.failed
    assert "goes on" in lost.message
    assert "Run this again" in lost.message
    guest.domain().blockJobInfo("vda", 0) and guest.domain().blockJobSetSpeed("vda", 0, 0)
    tasks.ok("blockcommit", domain=guest.name)
    assert guest.active_paths()["vda"].name == "vda.qcow2"
    assert ways.read(guest) == {"end"}
    ways.assert_whole(guest)


def test_a_worker_goes_on_when_the_task_has_answered_and_can_be_seen_limited_and_cancelled(guest: Guest) -> None:
    history(guest, "one")
    guest.exec("dd if=/dev/urandom of=/disk/vda/load bs=1M count=12; sync", timeout=120)
    before = guest.chain("vda")
    asked = {"domain": guest.name, "disks": ["vda"], "bandwidth": "1M", "wait": False}
    assert tasks.ok("blockcommit", **asked)["job"]["state"] == "pending"
    until(lambda: tasks.ok("domain_job", domain=guest.name)["block_jobs"], "the job of the worker")
    late = tasks.run("domain_job", domain=guest.name, state="finished", wait_timeout="1s")
    assert late.failed
    assert late["job"]["state"] == "running"
    assert tasks.ok("domain_job", domain=guest.name, state="absent").changed
    assert not tasks.ok("domain_job", domain=guest.name, state="absent").changed
    assert guest.chain("vda") == before
    assert tasks.ok("recover_domain", domain=guest.name, check=True)["findings"] != [], (
        "the snapshot is marked as going"
    )
    begun = tasks.ok("blockcommit", **asked)["job"]
    assert begun["state"] == "pending"
    until(lambda: tasks.ok("domain_job", domain=guest.name)["block_jobs"], "the job of the worker")
    assert tasks.ok("blockcommit", **asked)["job"]["id"] == begun["id"], "the same task is about the same worker"
    assert tasks.ok("domain_job", domain=guest.name, bandwidth="0").changed
    done = tasks.ok("domain_job", domain=guest.name, state="finished")
    assert done["job"]["state"] == "finished"
    assert [one["name"] for one in done["job"]["result"]["snapshots_ended"]] == ["one"]
    assert guest.chain("vda") == [guest.images["vda"]]
    idle = tasks.ok("blockcommit", **asked)
    assert not idle.changed
    assert "job" not in idle.answer, "nothing is to be done"
    assert ways.read(guest) == {"end"}


def test_a_worker_that_is_cancelled_through_one_domain_leaves_the_other_in_order(
    make_guest: Callable[..., Guest],
) -> None:
    disk = DiskSpec("vda", size=16 * MIB, fs=None, writer=False)
    first, second = (make_guest(GuestSpec(name, disks=(disk,)), start="no") for name in ("idle", "long"))
    for one in (first, second):
        tasks.ok("snapshot", domain=one.name, name="one")
    overlay = str(second.active_paths()["vda"])
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 0 12M", overlay], check=True, stdout=subprocess.DEVNULL)
    for one in (first, second):
        one.domain().createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    before = second.chain("vda")
    tasks.ok("blockcommit", domains=[first.name, second.name], bandwidth="1M", wait=False)
    until(lambda: second.domain().blockJobInfo("vda", 0), "the worker's second job")
    assert tasks.ok("domain_job", domain=first.name, state="absent").changed
    assert second.domain().blockJobInfo("vda", 0) == {}
    assert second.chain("vda") == before
    assert not any(Path("/var/lib/vmkeeper.libvirt/journal").iterdir())
    assert tasks.ok("domain_job", domain=second.name)["job"]["state"] == "cancelled"
    for one in (first, second):
        one.cleanup()


def test_a_worker_outlives_the_archive_that_ansible_had_packed_it_in(stopped: Guest) -> None:
    ways.write_stopped(stopped, "one")
    tasks.ok("snapshot", domain=stopped.name, name="one")
    asked = tasks.ad_hoc("blockcommit", json.dumps({"domain": stopped.name, "wait": False}))
    assert asked["job"]["state"] == "pending", asked.answer
    done = tasks.ad_hoc("domain_job", json.dumps({"domain": stopped.name, "state": "finished"}))
    assert done["job"]["state"] == "finished", done.answer
    assert ways.read_stopped(stopped.active_paths().values()) == {"one"}
    ways.assert_whole(stopped)


def test_wait_timeout_stops_nothing_and_the_same_task_takes_the_job_up(guest: Guest) -> None:
    history(guest, "one")
    guest.exec("dd if=/dev/urandom of=/disk/vda/load bs=1M count=12; sync", timeout=120)
    late = tasks.run("blockcommit", domain=guest.name, disks=["vda"], bandwidth="1M", wait_timeout="1s")
    assert late.failed
    assert late["job"]["type"] == "active-commit"
    assert guest.domain().blockJobInfo("vda", 0)
    guest.domain().blockJobSetSpeed("vda", 0, 0)
    assert tasks.ok("blockcommit", domain=guest.name).changed
    assert ways.read(guest) == {"end"}


def test_a_full_filesystem_fails_the_commit_and_harms_neither_guest_nor_chain(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    small = Path("/var/lib/libvirt/images/small")
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=0711", "none", str(small)], check=True)
    try:
        full = make_guest(GuestSpec("full", disks=(DiskSpec("vda", size=64 * MIB, writer=False, directory=small),)))
        ways.write(full, "before")
        tasks.ok("snapshot", domain=full.name, name="one", directory=str(full.directory))
        full.exec("dd if=/dev/urandom of=/disk/vda/load bs=1M count=30; sync", timeout=120)
        ways.write(full, "after")
        failed = tasks.run("blockcommit", domain=full.name)
        assert failed.failed
        assert full.state()[0] == 1  # running
        assert ways.read(full) == {"after"}
        assert len(full.chain("vda")) == 2
        info = tasks.ok("snapshot_info", domain=full.name)
        assert [snapshot["bootable"] for snapshot in info["snapshots"]] == [False]
        assert tasks.run("snapshot", domain=full.name, name="one", state="reverted", allow_restart=True).failed
        subprocess.run(["mount", "-o", "remount,size=128m", str(small)], check=True)
        tasks.ok("blockcommit", domain=full.name)
        assert ways.read(full) == {"after"}
        assert len(full.chain("vda")) == 1
        assert ways.snapshots(full) == {}
        full.cleanup()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
        small.rmdir()


def refusals(guest: Guest, name: str) -> list[Any]:
    """Everything that would write the base of the snapshot."""
    return [
        tasks.run("blockcommit", domain=guest.name),
        tasks.run("blockcommit", domain=guest.name, disks=["vda"], base=str(guest.images["vda"])),
        tasks.run("snapshot", domain=guest.name, name=name, state="absent"),
    ]


def test_a_base_that_another_domain_stands_on_is_never_written(guest: Guest) -> None:
    history(guest, "one")
    clone = guest.directory / "clone.qcow2"
    base = guest.images["vda"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(clone)], check=True)
    for refused in refusals(guest, "one"):
        assert refused.failed
        assert str(clone) in refused.message
    xml = (
        "<domain type='qemu'><name>lab-other</name><memory unit='MiB'>64</memory><os><type arch='x86_64'>hvm</type></os>"
        f"<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{clone}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    other = guest.connection().defineXML(xml)
    try:
        for refused in refusals(guest, "one"):
            assert refused.failed
            assert "lab-other" in refused.message
        other.create()
        for refused in refusals(guest, "one"):
            assert "lab-other" in refused.message
        other.managedSave(0)
        # Its definition stands elsewhere now, so only the saved state names the clone.
        elsewhere = guest.directory / "elsewhere.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(elsewhere), "8M"], check=True)
        guest.connection().defineXML(other.XMLDesc(2).replace(str(clone), str(elsewhere)))
        for refused in refusals(guest, "one"):
            assert refused.failed
            assert "lab-other" in refused.message
            assert "saved" in refused.message
    finally:
        if other.isActive():
            other.destroy()
        other.undefineFlags(1)
        clone.unlink()
        (guest.directory / "elsewhere.qcow2").unlink(missing_ok=True)
    assert ways.content_of(guest, "one") == {"one"}


@contextlib.contextmanager
def users_by_any_name(guest: Guest, base: Path) -> Iterator[set[str]]:
    """Domains that are only defined, and that use ``base`` by all the names that QEMU or libvirt understand."""
    away = guest.directory / "away"
    away.mkdir()
    mounted, link = away / "mounted", away / "link.qcow2"

    def overlay(name: str, backing: str, directory: Path = away) -> str:
        path = directory / f"{name}.qcow2"
        command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, str(path), "40M"]
        subprocess.run(command, check=True)
        return f"type='file'><driver type='qcow2'/><source file='{path}'/>"

    nested = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}})
    disks = {
        "by-file": overlay("file", f"file:{base}"),
        "by-json": overlay("json", f"json:{nested}"),
        "by-driver": overlay("driver", f"blkdebug::{base}"),
        "by-hard-link": overlay("hard", str(away / "hard-link")),
        "by-mount": overlay("mount", str(mounted / base.name)),
        "by-volume": f"type='volume'><driver type='qcow2'/><source pool='stopped' volume='{base.name}'/>",
    }
    real = away / "deeper"
    real.mkdir()
    overlay("real", f"../{base.name}", real)
    link.symlink_to(real / "real.qcow2")
    disks["by-link"] = f"type='file'><driver type='qcow2'/><source file='{link}'/>"
    os.link(base, away / "hard-link")
    mounted.mkdir()
    subprocess.run(["mount", "--bind", str(base.parent), str(mounted)], check=True)
    connection = guest.connection()
    made = [
        connection.storagePoolDefineXML(
            f"<pool type='dir'><name>stopped</name><target><path>{base.parent}</path></target></pool>"
        )
    ]
    try:
        for name, disk in disks.items():
            xml = (
                f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><os><type arch='x86_64'>hvm</type>"
                f"</os><devices><disk device='disk' {disk}<target dev='vda' bus='virtio'/></disk></devices></domain>"
            )
            made.append(connection.defineXML(xml))
        yield set(disks)
    finally:
        for one in made:
            one.undefine()
        subprocess.run(["umount", str(mounted)], check=True)
        shutil.rmtree(away)


def test_a_base_is_not_written_by_whatever_name_a_defined_domain_uses_it(guest: Guest) -> None:
    history(guest, "one")
    with users_by_any_name(guest, guest.images["vda"]) as users:
        for refused in refusals(guest, "one"):
            assert refused.failed
            assert {reader["name"] for reader in refused["needed_by"]} == users
    assert ways.content_of(guest, "one") == {"one"}


def test_a_layer_that_a_foreign_process_has_open_is_never_written(guest: Guest) -> None:
    history(guest, "one")
    socket = guest.directory / "nbd"
    server = subprocess.Popen(
        [
            "qemu-nbd",
            "-r",
            "--persistent",
            "-f",
            "qcow2",
            "-k",
            str(socket),
            str(guest.images["vda"]),
        ]
    )
    try:
        until(socket.exists, "the socket of qemu-nbd")
        for refused in refusals(guest, "one"):
            assert refused.failed
            assert "qemu-nbd" in refused.message
    finally:
        server.terminate()
        server.wait(30)
        until(lambda: not socket.exists(), "qemu-nbd being gone")
    assert ways.content_of(guest, "one") == {"one"}


def test_a_managed_save_is_refused(guest: Guest) -> None:
    history(guest, "one")
    guest.domain().managedSave(0)
    for refused in refusals(guest, "one"):
        assert refused.failed
        assert "managed-save" in refused.message
    guest.start()
    assert ways.read(guest) == {"end"}


def test_a_commit_does_not_go_on_over_a_saved_state_that_came_meanwhile(stopped: Guest, tmp_path: Path) -> None:
    tasks.ok("snapshot", domain=stopped.name, name="one")
    ways.write_stopped(stopped, "end")
    before = stopped.active_paths()
    assert tasks.finish(tasks.killed_at("commit", "blockcommit", tmp_path / "steps", domain=stopped.name)).killed
    stopped.start(wait=False)
    stopped.domain().managedSave(0)
    refused = tasks.run("blockcommit", domain=stopped.name)
    assert refused.failed
    assert "managed-save" in refused.message
    assert stopped.active_paths() == before
    assert [len(ways.chain(path)) for path in before.values()] == [2, 2]
    stopped.start(wait=False)
    stopped.destroy()
    tasks.ok("blockcommit", domain=stopped.name)
    assert ways.read_stopped(stopped.active_paths().values()) == {"end"}
    ways.assert_whole(stopped)


def test_a_domain_that_is_saved_while_another_of_the_task_is_committed_is_left_alone(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    disks = (DiskSpec("vda", size=8 * MIB, fs=None, writer=False),)
    pair = [make_guest(GuestSpec(name, disks=disks), start="no") for name in ("first", "second")]
    names = [one.name for one in pair]
    tasks.ok("snapshot", domains=names, name="one")
    pair[1].start(wait=False)
    before = pair[1].active_paths()
    process = tasks.killed_at("commit", "blockcommit", tmp_path / "steps", how="stop", domains=names)
    until(lambda: "!commit" in tasks.steps_in(tmp_path / "steps"), "the first commit")
    pair[1].domain().managedSave(0)
    os.kill(process.pid, signal.SIGCONT)
    refused = tasks.finish(process)
    assert "managed-save" in refused.message
    assert f"What was done on {names[0]} before stays" in refused.message
    assert ways.files(pair[0]) == {"vda.qcow2"}
    assert pair[1].active_paths() == before
    assert ways.snapshots(pair[1]) == {"one": None}
    tasks.ok("snapshot_info", domain=names[1], name="one")
    for one in pair:
        one.cleanup()
