# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Compressed points, points that take the way over a scratch directory, and repositories that QEMU must not write to."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(
        GuestSpec(
            "pressed", disks=(DiskSpec("vda", size=64 * MIB), DiskSpec("vdb", size=32 * MIB, fs=None, writer=False))
        )
    )


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    return make_repository()


@pytest.fixture(scope="module")
def chain(guest: Guest, repository: Path) -> list[tuple[dict, str]]:
    """A zstd full, a zstd increment, a zlib one and a plain one; each with what the guest read from vdb just before."""
    made = []
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
