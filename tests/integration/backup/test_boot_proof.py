# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""``backup_verify level: boot``: what boots is proved, what does not is not, and nothing is left of the attempt."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from lab.ansible import run_module_process, run_playbook
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.secrecy import PLACES, Watch, holding
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.test_interrupted import steps_of

PASSPHRASE = "eight-Wandering-otters-914"
PRIVATE = Path("/var/lib/libvirt/vmkeeper")


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    """It has a disk that it shares with others, as machines of a cluster do, and that no point holds."""
    guest = module_guest_factory(
        GuestSpec("proved", disks=(DiskSpec("vda", size=96 * MIB, boot=True, writer=False),), memory=160), start=False
    )
    quorum = guest.directory / "quorum.img"
    quorum.write_bytes(bytes(MIB))
    guest.domain().attachDeviceFlags(
        f"<disk type='file'><driver name='qemu' type='raw'/><source file='{quorum}'/><target dev='vdb' bus='virtio'/><shareable/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    return guest.start()


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    return make_repository()


@pytest.fixture(scope="module")
def made(guest: Guest, repository: Path) -> dict[str, Any]:
    point(guest, repository)
    guest.write_file("/disk/vda/present", b"yes")
    return point(guest, repository)


def files(repository: Path) -> dict[str, Any]:
    """Owner, mode, times and content of every file but the outcome of a proof."""
    found = {}
    for path in sorted(repository.rglob("*")):
        if path.is_file() and path.name not in ("verify.json", "screenshot.png"):
            status = path.stat()
            facts = (status.st_uid, status.st_gid, status.st_mode, status.st_mtime_ns, status.st_ctime_ns)
            found[str(path)] = (facts, points.sha256(path))
    return found


def assert_nothing_left(guest: Guest) -> None:
    """No domain, file, mount, key, journal or process of a proof."""
    assert guest.connection().listAllSecrets() == []
    assert [one.name() for one in guest.connection().listAllDomains()] == [guest.name]
    assert list(guest.host.qemu_pids()) in ([guest.name], [])
    assert [str(path) for path in PRIVATE.glob("*/*")] == []
    assert str(PRIVATE) not in Path("/proc/self/mountinfo").read_text()
    assert list(points.JOURNALS.glob("*")) == []


def picture(path: Path) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk and pixel is there."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, pixels, size = 8, b"", (0, 0)
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0]
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        elif kind == b"IDAT":
            pixels += body
        position += 12 + length
    assert len(zlib.decompress(pixels)) >= size[0] * size[1]
    return size


def arguments(repository: Path, made: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The task."""
    return {"repository": str(repository), "id": made["id"], "level": "boot", **more}


def test_a_point_that_boots_is_proved_apart_from_everything(
    guest: Guest, repository: Path, made: dict[str, Any]
) -> None:
    before = files(repository)
    proving = run_module_process("backup_verify", **arguments(repository, made))
    names = [guest.name]

    def proof_runs() -> bool:
        names[:] = [one.name() for one in guest.connection().listAllDomains(1) if one.name() != guest.name]
        return bool(names) or not proving.running()

    until(proof_runs, "the guest of the proof")
    definition = ElementTree.fromstring(guest.connection().lookupByName(names[0]).XMLDesc())
    proved = proving.result()
    assert not proved["failed"], proved["msg"]
    assert proved["verified"] is True
    assert not proved["changed"]
    assert 0 < proved["boot_seconds"] < 300
    outcome = json.loads((directory_of(repository, made) / "verify.json").read_text())
    assert (outcome["level"], outcome["verified"]) == ("boot", True)
    assert outcome["boot_seconds"] == proved["boot_seconds"]
    screenshot = Path(proved["screenshot"])
    assert screenshot == directory_of(repository, made) / outcome["screenshot"]
    assert min(picture(screenshot)) > 100
    assert screenshot.stat().st_mode & 0o777 == 0o600
    # It was somebody else, and reached nothing.
    own = guest.xml()
    assert definition.findtext("uuid") != own.findtext("uuid")
    for tag in ("interface", "hostdev", "filesystem", "graphics"):
        assert definition.find(f"devices/{tag}") is None
    written = {source.get("file") for source in definition.iterfind("devices/disk/source")}
    assert all(str(path).startswith(str(PRIVATE / "proofs")) for path in written), written
    assert "vdb" not in {disk.get("dev") for disk in definition.iterfind("devices/disk/target")}, (
        "others may be writing"
    )
    assert files(repository) == before
    assert_nothing_left(guest)
    listed = ok("backup_info", repository=str(repository))["restore_points"]
    assert next(one for one in listed if one["id"] == made["id"])["verified"]["level"] == "boot"


def test_the_users_check_decides(guest: Guest, repository: Path, made: dict[str, Any]) -> None:
    good = run_playbook(
        "vmkeeper.libvirt.verify",
        extra_vars={
            "target": "localhost",
            "repository": str(repository),
            "level": "boot",
            "boot_check": ["grep", "-q", "yes", "/disk/vda/present"],
        },
    )
    assert good.rc == 0, good.stdout + str(good.tasks)
    outcome = json.loads((directory_of(repository, made) / "verify.json").read_text())
    assert (outcome["level"], outcome["verified"]) == ("boot", True)
    assert f"{made['id']:24} {'boot':10} {'proved':10} {outcome['boot_seconds']:.1f} s" in str(good.tasks)
    # Long enough for it to boot also on a machine that has become busier.
    patience = f"{15 + int(4 * outcome['boot_seconds'])}s"
    failed = task("backup_verify", **arguments(repository, made, boot_check=["false"], boot_timeout=patience))
    assert failed["failed"]
    assert failed["error"]["kind"] == "not_proved"
    assert "boot_check ended with status 1" in failed["msg"], failed["msg"]
    assert failed["verified"] is False
    picture(Path(failed["screenshot"]))
    outcome = json.loads((directory_of(repository, made) / "verify.json").read_text())
    assert outcome["verified"] is False
    assert_nothing_left(guest)
    foreseen = task("backup_verify", check=True, **arguments(repository, made))
    assert not foreseen["failed"], foreseen["msg"]
    assert foreseen["verified"] is None
    assert json.loads((directory_of(repository, made) / "verify.json").read_text()) == outcome
    refused = task("backup_verify", **{**arguments(repository, made, boot_check=["true"]), "level": "digest"})
    assert refused["failed"]


def test_a_damaged_boot_block_is_not_proved(
    guest: Guest, repository: Path, made: dict[str, Any], directory: Path
) -> None:
    """In the repository the digests find it; in the guest itself, only the boot does."""
    copy = directory / "copy"
    shutil.copytree(repository, copy)
    points.run("chmod", "-R", "go+X", copy)
    full = next(path for path in copy.rglob("vda.qcow2") if path.parent.name != made["id"])
    points.run("qemu-io", "-f", "qcow2", "-c", "write -P 0 0 64k", full)
    failed = task("backup_verify", **arguments(copy, made))
    assert failed["failed"]
    assert failed["error"]["kind"] == "not_proved"
    assert failed.get("screenshot") is None

    boot_block = guest.exec("dd if=$(cat /run/disk/vda) bs=440 count=1 2>/dev/null | sha256sum").text
    guest.exec("dd if=$(cat /run/disk/vda) of=/run/boot bs=512 count=1 2>/dev/null")
    guest.exec("dd if=/dev/zero of=$(cat /run/disk/vda) bs=440 count=1 conv=notrunc,fsync 2>/dev/null")
    try:
        broken = point(guest, repository)
    finally:
        guest.exec("dd if=/run/boot of=$(cat /run/disk/vda) bs=512 count=1 conv=notrunc,fsync 2>/dev/null")
    assert guest.exec("dd if=$(cat /run/disk/vda) bs=440 count=1 2>/dev/null | sha256sum").text == boot_block
    ok("backup_verify", repository=str(repository), id=broken["id"], level="structure")
    failed = task("backup_verify", **arguments(repository, broken, boot_timeout="15s"))
    assert failed["failed"]
    assert failed["error"]["kind"] == "not_proved"
    assert "did not answer" in failed["msg"], failed["msg"]
    picture(Path(failed["screenshot"]))
    assert_nothing_left(guest)


@pytest.mark.timeout(1200)
def test_killed_at_every_step_nothing_is_left(
    guest: Guest, repository: Path, made: dict[str, Any], tmp_path: Path
) -> None:
    before = files(repository)
    log = tmp_path / "steps"
    short = arguments(repository, made, boot_check=["false"], boot_timeout="1s")
    run_module_process("backup_verify", env=points.killed_at("", log), **short).result()
    steps = steps_of(log)
    assert {"scratch", "lend", "overlay", "boot", "wait", "look", "clear"} <= set(steps), steps
    for number, step in enumerate(steps):
        log.unlink()
        killed = run_module_process("backup_verify", env=points.killed_at(step, log), **short)
        assert killed.wait() == -signal.SIGKILL, step
        until(
            lambda: [one.name() for one in guest.connection().listAllDomains()] == [guest.name],
            f"libvirt destroying the guest of a proof killed at {step}",
            60,
        )
        if number % 2:
            found = ok("recover_domain")["findings"]
            assert [one["what"] for one in found] == [f"an interrupted boot proof of {made['id']}"], step
        else:
            assert task("backup_verify", **short)["error"]["kind"] == "not_proved"
        assert_nothing_left(guest)
        assert files(repository) == before, step


def test_an_encrypted_point_boots_with_its_passphrase_and_the_guest_tells_nobody_what_it_holds(
    guest: Guest, make_repository: Callable[[], Path], tmp_path: Path
) -> None:
    repository, mark = make_repository(), "vmk-plaintext-of-the-guest"
    point(guest, repository, encryption={"passphrase": PASSPHRASE})
    guest.write_file("/disk/vda/secret", (mark * 400).encode())
    made = point(guest, repository, encryption={"passphrase": PASSPHRASE})
    assert made["type"] == "incremental"
    before, log = files(repository), tmp_path / "steps"
    opened = arguments(repository, made, passphrase=PASSPHRASE)
    for wrong in ({}, {"passphrase": PASSPHRASE + "x"}):
        for check in (True, False):
            refused = task("backup_verify", check=check, **arguments(repository, made, **wrong))
            assert refused["failed"]
            assert "passphrase" in refused["msg"]
    with Watch(PASSPHRASE, [mark], "/var/lib/vmkeeper.libvirt", PRIVATE / "proofs", "/run") as watch:
        # What it reads it writes again, where an overlay that is not encrypted would show it.
        copies = ["sh", "-c", "cp /disk/vda/secret /disk/vda/again && sync"]
        proved = ok("backup_verify", **opened, boot_check=copies)
        assert proved["verified"] is True
        assert_nothing_left(guest)
        for step in ("overlay", "boot", "wait", "clear") if points.SCALE > 1 else ("wait",):
            killed = run_module_process("backup_verify", env=points.killed_at(step, log), **opened)
            assert killed.wait() == -signal.SIGKILL, step
            assert ok("recover_domain")["findings"], step
            assert_nothing_left(guest)
    assert watch.samples > 10
    assert watch.seen == set()
    assert holding([PASSPHRASE], *PLACES) == []
    assert files(repository) == before


def test_what_cannot_be_proved_is_refused(
    module_guest_factory, guest: Guest, repository: Path, directory: Path
) -> None:
    silent = module_guest_factory(
        GuestSpec("silent", disks=(DiskSpec("vda", size=16 * MIB, fs=None, writer=False),), agent="absent"), start=False
    )
    made = point(silent, directory)
    refused = task("backup_verify", **arguments(directory, made))
    assert refused["failed"]
    assert refused["error"]["kind"] == "unsupported"
    assert "no guest agent channel" in refused["msg"]
    assert not (directory_of(directory, made) / "verify.json").exists()
    silent.cleanup()
