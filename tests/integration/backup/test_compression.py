# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Compressed points, points that take the way over a scratch directory, and repositories that QEMU must not write to."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import evidence
from lab.ansible import run_module_process
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
            "pressed",
            disks=(DiskSpec("vda", size=64 * MIB), DiskSpec("vdb", size=32 * MIB - 512, fs=None, writer=False)),
        )
    )


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    return make_repository()


@pytest.fixture(scope="module")
def chain(guest: Guest, repository: Path) -> list[tuple[dict, str]]:
    """A zstd full, a zstd increment, a zlib one and a plain one; each with what the guest read from vdb just before.

    The disk ends within a cluster, as GPT's backup header may lie, and only the full was written to there.
    """
    made = []
    guest.exec("dd if=/dev/urandom of=$(cat /run/disk/vdb) bs=512 seek=65534 count=1 oflag=direct")
    for number, compression in enumerate(["zstd", "zstd", "zlib", "none"]):
        points.fill(guest, "vdb", f"round-{number}", 40 * number, 60)
        if number:
            # A cluster that held data and holds zeros now: the increment must say so.
            guest.exec(f"dd if=/dev/zero of=$(cat /run/disk/vdb) bs=65536 seek={40 * number - 30} count=5 oflag=direct")
        before = points.device_hash(guest, "vdb")
        made.append((point(guest, repository, quiesce="required", compression=compression), before))
    return made


def test_a_chain_of_compressed_layers_holds_what_the_guest_saw(chain, guest: Guest, repository: Path) -> None:
    assert [made["type"] for made, _hash in chain] == ["full", *["incremental"] * 3]
    assert [made["disks"][1]["compression"] for made, _hash in chain] == ["zstd", "zstd", "zlib", None]
    for made, before in chain:
        assert points.content(directory_of(repository, made) / "vdb.qcow2") == before
        image = directory_of(repository, made) / "vda.qcow2"
        assert evidence.fsck(image).clean
        assert evidence.writer_log(image).is_intact
    points.assert_nothing_left(guest, repository)
    assert points.scratch_files() == []


def test_what_repeats_takes_little_room(chain) -> None:
    for made, _hash in chain[:3]:
        pressed = made["disks"][1]
        assert pressed["stored_bytes"] * 4 < pressed["changed_bytes"], pressed
    plain = chain[3][0]["disks"][1]
    assert plain["stored_bytes"] >= plain["changed_bytes"] // 2


def test_compressed_points_are_proved_and_a_flipped_byte_is_found(chain, repository: Path) -> None:
    newest = chain[-1][0]
    for level in ("digest", "structure"):
        ok("backup_verify", repository=str(repository), id=newest["id"], level=level)
    image = directory_of(repository, chain[1][0]) / "vdb.qcow2"
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    good = image.read_bytes()
    image.write_bytes(content)
    try:
        found = task("backup_verify", repository=str(repository), id=newest["id"], level="digest")
        assert found["failed"]
        assert chain[1][0]["id"] in found["msg"]
    finally:
        image.write_bytes(good)


def test_a_compressed_chain_is_restored(chain, guest: Guest, repository: Path, directory: Path) -> None:
    made, before = chain[2]
    ok("restore", repository=str(repository), id=made["id"], domain="lab-pressed-r", directory=str(directory))
    try:
        assert points.content(directory / "lab-pressed-r.vdb.qcow2") == before
    finally:
        points.forget_domain(guest, "lab-pressed-r")


def test_a_plain_point_over_a_scratch_directory_is_as_if_pushed_straight(
    chain, guest: Guest, repository: Path, directory: Path
) -> None:
    points.fill(guest, "vdb", "over-scratch", 3, 9)
    before = points.device_hash(guest, "vdb")
    made = point(guest, repository, scratch=str(directory), quiesce="required")
    assert made["type"] == "incremental"
    assert points.content(directory_of(repository, made) / "vdb.qcow2") == before
    assert list(directory.iterdir()) == []
    ok("backup_verify", repository=str(repository), id=made["id"])


def test_an_increment_of_one_percent_is_small_and_points_below_go(guest: Guest, directory: Path) -> None:
    arguments = {"disks": ["vdb"], "compression": "zstd"}
    first = point(guest, directory, **arguments)["disks"][0]
    points.fill(guest, "vdb", "one-percent", 100, 5)  # of 512 blocks
    second = point(guest, directory, **arguments)["disks"][0]
    assert second["changed_bytes"] == 5 * 65536
    assert second["stored_bytes"] < second["changed_bytes"]
    print(
        f"1 %: {second['changed_bytes']} bytes changed, {second['stored_bytes']} stored; full: {first['stored_bytes']}"
    )


def test_a_stopped_domain_is_compressed_straight_into_the_repository(module_guest_factory, directory: Path) -> None:
    stopped = module_guest_factory(
        GuestSpec("pressed2", disks=(DiskSpec("vda", size=16 * MIB, fs=None, writer=False),)), start=False
    )
    points.run("qemu-io", "-c", "write -P 0x5a 1M 6M", stopped.images["vda"])
    for options, parent in (({"compression": "zstd"}, 4), ({}, 1)):
        made = point(stopped, directory, **options)
        image = directory_of(directory, made) / "vda.qcow2"
        assert evidence.same_content(stopped.images["vda"], image)
        assert made["disks"][0]["stored_bytes"] * parent < 7 * MIB
    ok("backup_verify", repository=str(directory), id=made["id"])


# --- what interrupts it --------------------------------------------------------------------------------


#: Steps of the freeze, which a backup into a local repository has too; test_interrupted kills there.
_COMMON = (
    "arm",
    "armed",
    "suspend",
    "suspended",
    "freeze",
    "frozen",
    "cut-done",
    "resume",
    "resumed",
    "thaw",
    "thawed",
)


@pytest.mark.timeout(1800)
def test_killed_at_every_step_of_the_way_the_scratch_is_emptied_and_the_next_run_is_right(
    chain, guest: Guest, repository: Path, directory: Path, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    arguments = {
        "domain": guest.name,
        "repository": str(repository),
        "compression": "zstd",
        "scratch": str(directory),
        "disks": ["vdb"],
    }
    assert not run_module_process("backup", env=points.killed_at("", log), **arguments).result()["failed"]
    steps = list(dict.fromkeys(log.read_text().split()))
    assert {"targets", "watch", "cut", "copy", "copied", "store", "describe", "publish", "retire"} <= set(steps), steps
    for number, step in enumerate(one for one in steps if points.SCALE > 1 or one not in _COMMON):
        points.fill(guest, "vdb", f"killed-{number}", 7 * number, 3)
        log.unlink()
        killed = run_module_process("backup", env=points.killed_at(step, log), **arguments)
        assert killed.wait() == -signal.SIGKILL, step
        assert log.read_text().split()[-1].startswith("!"), "the kill landed"
        again = ok("backup", **arguments)["restore_point"]
        assert list(directory.iterdir()) == [], step
        assert again["type"] == "incremental" or "16 points" in again["reason"], (step, again["reason"])
        assert points.content(directory_of(repository, again) / "vdb.qcow2") == points.device_hash(guest, "vdb"), step
    points.assert_nothing_left(guest, repository)


def test_no_write_of_the_guest_fails_when_the_scratch_fills_up(guest: Guest, directory: Path, tmp_path: Path) -> None:
    repository = directory / "repository"
    repository.mkdir()
    node = guest.exec("cat /run/disk/vdb").text
    guest.exec(f"dd if=/dev/urandom of={node} bs=1M count=30 oflag=direct 2>/dev/null")
    log = tmp_path / "steps"
    with filesystem(directory, 120 * MIB) as scratch:
        held = run_module_process(
            "backup",
            env=points.killed_at("cut", log, how="stop"),
            domain=guest.name,
            repository=str(repository),
            scratch=str(scratch),
            compression="zstd",
            disks=["vdb"],
        )
        until(lambda: (log.exists() and "!cut" in log.read_text()) or not held.running(), "the backup reaching its cut")
        ballast = ["dd", "if=/dev/zero", f"of={scratch}/ballast", "bs=1M", "count=95"]
        subprocess.run(ballast, capture_output=True, check=False)
        os.kill(held.pid, signal.SIGCONT)
        while held.running():
            place = random.randrange(400)
            guest.exec(
                f"dd if=/dev/urandom of={node} bs=64k count=20 seek={place} oflag=direct conv=notrunc 2>/dev/null"
            )
        result = held.result()
        assert result["failed"]
        assert result["error"]["kind"] == "no_space", result["msg"]
        assert [path.name for path in scratch.iterdir() if path.name != "lost+found"] == ["ballast"]
    points.assert_nothing_left(guest, repository)
    assert guest.exec("dmesg | grep -ci 'I/O error' || true").text == "0"


# --- a repository that QEMU must not write to ----------------------------------------------------------


@pytest.fixture
def remote(directory: Path) -> Iterator[tuple[Path, subprocess.Popen]]:
    """A repository on a FUSE filesystem, and the process that serves it."""
    if not shutil.which("bindfs") or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs bindfs and /dev/fuse")
    (directory / "server").mkdir()
    where = directory / "remote"
    where.mkdir()
    server = subprocess.Popen(["bindfs", "-f", directory / "server", where])
    until(where.is_mount, "the mount")
    try:
        yield where, server
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "-l", where], check=False)
        server.kill()
        server.wait()


def test_a_repository_that_stalls_and_one_that_goes_away_are_waited_for_and_never_by_the_guest(
    guest: Guest, remote: tuple[Path, subprocess.Popen], tmp_path: Path
) -> None:
    repository, server = remote
    first = point(guest, repository, quiesce="required")
    points.fill(guest, "vdb", "far-away", 12, 9)
    expected = points.device_hash(guest, "vdb")
    log = tmp_path / "steps"
    stopped_at_store = points.killed_at("store", log, how="stop")
    arguments = {"domain": guest.name, "repository": str(repository), "quiesce": "required"}
    held = run_module_process("backup", env=stopped_at_store, **arguments)
    until(lambda: log.exists() and "!store" in log.read_text(), "the data being on this host")
    server.send_signal(signal.SIGSTOP)
    os.kill(held.pid, signal.SIGCONT)
    before = guest.gaps("vda").count
    until(lambda: guest.gaps("vda").count > before + 20, "the guest writing on while the server stalls")
    assert held.running()
    assert not points.has_job(guest)
    server.send_signal(signal.SIGCONT)
    made = held.result()["restore_point"]
    assert (made["type"], made["parent"]) == ("incremental", first["id"])
    assert points.content(directory_of(repository, made) / "vdb.qcow2") == expected
    assert points.scratch_files() == []
    points.assert_nothing_left(guest, repository)
    ok("backup_verify", repository=str(repository), id=made["id"])

    log.unlink()
    held = run_module_process("backup", env=stopped_at_store, **arguments)
    until(lambda: log.exists() and "!store" in log.read_text(), "the data being on this host")
    server.kill()
    server.wait()
    os.kill(held.pid, signal.SIGCONT)
    result = held.result()
    assert result["failed"]
    assert not points.has_job(guest)
    assert points.scratch_files() == [], "also without the repository"
    assert guest.writer_errors("vda") == []
    points.run("umount", "-l", repository)
    back = subprocess.Popen(["bindfs", "-f", repository.parent / "server", repository])
    try:
        until(repository.is_mount, "the mount")
        again = point(guest, repository)
        assert (again["type"], again["parent"]) == ("incremental", made["id"])
        points.assert_nothing_left(guest, repository)
    finally:
        points.run("umount", "-l", repository)
        back.wait()
