# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A backup or restore that is killed, loses QEMU or libvirtd, or fills its target: whole or absent, and the guest writes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from lab.ansible import Result, run_module_process
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.images import filesystem
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(
        GuestSpec(
            "killed", disks=(DiskSpec("vda", size=64 * MIB), DiskSpec("vdb", size=32 * MIB, fs=None, writer=False))
        )
    )


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    """With what XML escapes in its path."""
    where = make_repository() / "R&D 'a' \"b\" <c>"
    where.mkdir(mode=0o755)
    return where


def steps_of(log: Path) -> list[str]:
    """The steps that a run reached, numbered where one comes twice."""
    seen: dict[str, int] = {}
    named = []
    for line in log.read_text().split():
        seen[line] = seen.get(line, 0) + 1
        named.append(line if seen[line] == 1 else f"{line}#{seen[line]}")
    return named


def ids(repository: Path) -> list[str]:
    """The points that exist."""
    return sorted(path.parent.name for path in repository.glob("*/[0-9]*/manifest.json"))


@pytest.mark.timeout(2400)
def test_killed_at_every_step_the_next_run_makes_a_right_point(guest: Guest, repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    point(guest, repository)
    arguments = {"domain": guest.name, "repository": str(repository), "quiesce": "required"}
    listed = run_module_process("backup", env=points.killed_at("", log), **arguments).result()
    assert not listed["failed"], listed["msg"]
    steps = steps_of(log)
    assert {"targets", "watch", "armed", "cut", "thawed", "copy", "describe", "publish", "retire"} <= set(steps), steps
    kinds = ["auto", "full"]
    rounds = [(step, kind) for step in steps for kind in kinds]
    if points.SCALE == 1:
        rounds = [(step, kinds[number % 2]) for number, step in enumerate(steps)]
    for number, (step, kind) in enumerate(rounds):
        before = ids(repository)
        log.unlink()
        killed = run_module_process("backup", env=points.killed_at(step, log), type=kind, **arguments)
        assert killed.wait() == -signal.SIGKILL, (step, kind)
        assert log.read_text().split()[-1].startswith("!"), "the kill landed"
        assert guest.is_running()
        points.fill(guest, "vdb", f"after-{number}", number % 400, 3)
        expected = points.device_hash(guest, "vdb")
        again = point(guest, repository, quiesce="required")
        points.assert_nothing_left(guest, repository)
        added = set(ids(repository)) - set(before) - {again["id"]}
        assert len(added) <= 1
        assert not added or step in ("publish", "retire"), (step, kind, added)
        assert again["type"] == "incremental", (step, kind, again["reason"])
        assert points.content(directory_of(repository, again) / "vdb.qcow2") == expected, (step, kind)
        assert points.checkpoints(guest) == [again["checkpoint"]], (step, kind)
        if (number + 1) % 10 == 0:
            point(guest, repository, type="full")  # the chain's limit is not what is tested here


def test_restore_killed_at_every_step_is_finished_or_leaves_nothing(
    guest: Guest, repository: Path, directory: Path, tmp_path: Path
) -> None:
    made = point(guest, repository, type="full")
    expected = points.content(directory_of(repository, made) / "vdb.qcow2")
    log = tmp_path / "steps"
    arguments = {
        "repository": str(repository),
        "id": made["id"],
        "domain": "lab-killed-r",
        "directory": str(directory),
        "network": "disconnected",
        "state": "running",
    }
    listed = run_module_process("restore", env=points.killed_at("", log), **arguments).result()
    assert not listed["failed"], listed["msg"]
    steps = steps_of(log)
    points.forget_domain(guest, "lab-killed-r")
    for step in steps:
        for path in directory.iterdir():
            path.unlink()
        log.unlink()
        killed = run_module_process("restore", env=points.killed_at(step, log), **arguments)
        assert killed.wait() == -signal.SIGKILL, step
        assert ok("restore", check=True, **arguments)["changed"], step
        ok("restore", **arguments)
        restored = guest.connection().lookupByName("lab-killed-r")
        assert restored.isActive(), step
        restored.destroy()
        assert sorted(path.suffix for path in directory.iterdir()) == [".qcow2", ".qcow2"], step
        assert points.content(directory / "lab-killed-r.vdb.qcow2") == expected, step
        points.forget_domain(guest, "lab-killed-r")
        assert list(points.JOURNALS.glob("*")) == []


def held_at(step: str, guest: Guest, repository: Path, log: Path, **options: str):
    """A backup whose module is stopped at a step; at ``copy`` the guest was just thawed, and the job runs or is over."""
    log.unlink(missing_ok=True)
    held = run_module_process(
        "backup", env=points.killed_at(step, log, how="stop"), domain=guest.name, repository=str(repository), **options
    )
    until(lambda: log.exists() and f"!{step}" in log.read_text(), f"the backup reaching {step}")
    return held


def test_libvirtd_killed_during_the_copy(guest: Guest, repository: Path, tmp_path: Path) -> None:
    point(guest, repository)
    before = ids(repository)
    held = held_at("copy", guest, repository, tmp_path / "steps")
    guest.host.kill_libvirtd()
    os.kill(held.pid, signal.SIGCONT)
    guest.host.start()
    result = held.result()
    if not result["failed"]:
        assert ids(repository) != before
    expected = points.device_hash(guest, "vdb")
    again = point(guest, repository)
    assert points.content(directory_of(repository, again) / "vdb.qcow2") == expected
    points.assert_nothing_left(guest, repository)


def test_a_copy_outlives_libvirtd(guest_factory, repository: Path, tmp_path: Path) -> None:
    # A fast disk copies much until the limit takes hold.
    disks = (DiskSpec("vda", size=16 * MIB), DiskSpec("vdb", size=768 * MIB, fs=None, writer=False))
    guest = guest_factory(GuestSpec("enduring", disks=disks), start=False)
    points.run("qemu-io", "-f", "qcow2", "-c", "write -P 0x41 0 768M", guest.images["vdb"])
    guest.start()
    log = tmp_path / "steps"
    options = {"domain": guest.name, "repository": str(repository), "bandwidth": "48M"}
    copying = run_module_process("backup", env=points.killed_at("", log), **options)
    until(lambda: (log.exists() and "copy" in log.read_text().split()) or not copying.running(), "the copy beginning")
    time.sleep(1)  # the limit is set, and the task waits
    guest.host.kill_libvirtd()
    guest.host.start()
    assert points.has_job(guest), "the copy goes on without libvirtd"
    assert_good(copying.result(), guest, repository)


@pytest.mark.parametrize("step", ["store", "describe"])
def test_a_backup_outlives_libvirtd_after_its_copy(
    guest: Guest, repository: Path, directory: Path, tmp_path: Path, step: str
) -> None:
    held = held_at(step, guest, repository, tmp_path / "steps", scratch=str(directory))
    guest.host.kill_libvirtd()
    guest.host.start()
    os.kill(held.pid, signal.SIGCONT)
    assert_good(held.result(), guest, repository)
    assert list(directory.iterdir()) == []


def assert_good(result: Result, guest: Guest, repository: Path) -> None:
    """The backup has made a point that holds what the disks hold, and left nothing else."""
    assert not result["failed"], result["msg"]
    made = result["restore_point"]
    assert points.content(directory_of(repository, made) / "vdb.qcow2") == points.device_hash(guest, "vdb")
    assert points.checkpoints(guest) == [made["checkpoint"]]
    points.assert_nothing_left(guest, repository)


def test_qemu_killed_during_the_copy_and_the_next_point_is_a_full_that_says_so(
    guest: Guest, repository: Path, tmp_path: Path
) -> None:
    point(guest, repository)
    before = ids(repository)
    held = held_at("copy", guest, repository, tmp_path / "steps")
    os.kill(guest.host.qemu_pids()[guest.name], signal.SIGKILL)
    guest.wait_shutoff()
    os.kill(held.pid, signal.SIGCONT)
    result = held.result()
    assert result["failed"], result
    assert ids(repository) == before
    points.assert_nothing_left(guest, repository)
    guest.start()
    again = point(guest, repository)
    assert again["type"] == "full"
    assert {disk["reason"] for disk in again["disks"]} == {
        "the disk's bitmap is missing or inconsistent, as after a crash of QEMU or of the host"
    }
    points.assert_nothing_left(guest, repository)


# --- a target that fills up ----------------------------------------------------------------------------


@pytest.fixture
def small(directory: Path) -> Iterator[Path]:
    """A repository on a filesystem of 160 MiB that cannot set blocks aside."""
    with filesystem(directory, 160 * MIB) as where:
        yield where


def test_a_full_that_cannot_fit_is_refused_before_the_freeze(guest: Guest, small: Path) -> None:
    (small / ".ballast").write_bytes(bytes(130 * MIB))
    refused = task("backup", domain=guest.name, repository=str(small))
    assert refused["failed"]
    assert refused["error"]["kind"] == "no_space", refused["msg"]
    points.assert_nothing_left(guest, small)


def test_no_write_of_the_guest_fails_when_the_target_fills_up(
    module_guest_factory, small: Path, tmp_path: Path
) -> None:
    guest = module_guest_factory(
        GuestSpec(
            "filling", disks=(DiskSpec("vda", size=64 * MIB), DiskSpec("vdb", size=96 * MIB, fs=None, writer=False))
        )
    )
    node = guest.exec("cat /run/disk/vdb").text
    guest.exec(f"dd if=/dev/urandom of={node} bs=1M count=80 oflag=direct 2>/dev/null")
    log = tmp_path / "steps"
    held = run_module_process(
        "backup",
        env=points.killed_at("cut", log, how="stop"),
        domain=guest.name,
        repository=str(small),
        quiesce="never",
    )
    # Whoever else fills the filesystem does so while the targets are made and the job has not begun.
    until(lambda: (log.exists() and "!cut" in log.read_text()) or not held.running(), "the backup reaching its cut")
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={small}/.ballast", "bs=1M", "count=70"], capture_output=True, check=False
    )
    os.kill(held.pid, signal.SIGCONT)
    while held.running():
        guest.exec(
            f"dd if=/dev/urandom of={node} bs=64k count=20 seek={random.randrange(1200)} oflag=direct conv=notrunc 2>/dev/null"
        )
    result = held.result()
    assert result["failed"]
    assert result["error"]["kind"] == "no_space", result["msg"]
    assert guest.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    points.assert_nothing_left(guest, small)
    assert guest.exec("dmesg | grep -ci 'I/O error' || true").text == "0"
    assert [path.name for path in small.glob("*/2*")] == []
    (small / ".ballast").unlink()
    made = point(guest, small)
    assert points.content(directory_of(small, made) / "vdb.qcow2") == points.device_hash(guest, "vdb")


@pytest.fixture
def medium(directory: Path) -> Iterator[Path]:
    """Like ``small``, of 800 MiB."""
    with filesystem(directory, 800 * MIB) as where:
        yield where


@pytest.mark.skipif(points.SCALE == 1, reason="moves half a gigabyte; runs in make test-long")
def test_no_write_of_the_guest_fails_when_the_target_fills_up_in_the_middle_of_the_copy(
    module_guest_factory, medium: Path
) -> None:
    guest = module_guest_factory(
        GuestSpec(
            "pouring", disks=(DiskSpec("vda", size=64 * MIB), DiskSpec("vdb", size=640 * MIB, fs=None, writer=False))
        )
    )
    node = guest.exec("cat /run/disk/vdb").text
    guest.destroy()
    points.run("dd", "if=/dev/urandom", f"of={medium}/.data", "bs=1M", "count=500")
    points.run("qemu-img", "dd", "-O", "qcow2", f"if={medium}/.data", f"of={medium}/../vdb.qcow2", "bs=1M")
    points.run("qemu-img", "resize", "-q", f"{medium}/../vdb.qcow2", str(640 * MIB))
    (medium / ".data").unlink()
    (medium.parent / "vdb.qcow2").replace(guest.images["vdb"])
    guest.start()

    def overwrite() -> None:
        place = random.randrange(9000)
        guest.exec(f"dd if=/dev/urandom of={node} bs=64k count=4 seek={place} oflag=direct conv=notrunc 2>/dev/null")

    backup = run_module_process("backup", domain=guest.name, repository=str(medium), quiesce="never")
    until(lambda: points.has_job(guest) or not backup.running(), "the job beginning")
    with (medium / ".ballast").open("wb") as ballast, contextlib.suppress(OSError):
        while backup.running():
            ballast.write(bytes(MIB))
            ballast.flush()
            if ballast.tell() % (64 * MIB) == 0:
                overwrite()
    while backup.running():
        overwrite()
    result = backup.result()
    print(result["msg"])
    assert not result["failed"] or result["error"]["kind"] == "no_space", result["msg"]
    points.assert_nothing_left(guest, medium)
    assert guest.exec("dmesg | grep -ci 'I/O error' || true").text == "0"


def test_a_killed_backup_is_ended_by_its_sentry_alone(guest: Guest, repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    killed = run_module_process(
        "backup", env=points.killed_at("copy", log), domain=guest.name, repository=str(repository), type="full"
    )
    assert killed.wait() == -signal.SIGKILL
    until(lambda: not points.has_job(guest), "the sentry aborting the job", 30)
    point(guest, repository)
    points.assert_nothing_left(guest, repository)
