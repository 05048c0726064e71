# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Encrypted points: exact, closed to whoever lacks the passphrase, and no trace of it or of the guest's data anywhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from lab import evidence
from lab.ansible import CHECKOUT, run_module_process, run_playbook
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.secrecy import PLACES, Watch, holding
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.docs_examples import examples_in
from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.test_instant import without_kernel

PASSPHRASE = "eight-Wandering-otters-914"
OTHER = "another-Passphrase-entirely"
ENCRYPTION = {"passphrase": PASSPHRASE}

#: What the guest writes, and nothing but an unencrypted copy of its disk can hold.
MARK = "vmk-plaintext-of-the-guest"


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(
        GuestSpec(
            "secret", disks=(DiskSpec("vda", size=64 * MIB), DiskSpec("vdb", size=16 * MIB, fs=None, writer=False))
        )
    )


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    return make_repository()


def watching() -> Watch:
    """For the passphrase in every process, and for the guest's data, too, in our places."""
    return Watch(PASSPHRASE, [MARK], "/var/lib/vmkeeper.libvirt", "/run")


@contextlib.contextmanager
def key_file(passphrase: str = PASSPHRASE) -> Iterator[Path]:
    """A passphrase in a file in memory, for programs that are not ours."""
    path = Path(f"/dev/shm/vmk-test-key-{os.getpid()}")
    path.touch(0o600)
    path.write_text(passphrase)
    try:
        yield path
    finally:
        path.unlink()


def decoded(image: Path, passphrase: str = PASSPHRASE) -> str:
    """SHA-256 of what one encrypted image holds that stands on nothing."""
    raw = image.with_suffix(".raw")
    with key_file(passphrase) as key:
        node = {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "key"}}
        name = "json:" + json.dumps({**node, "file": {"driver": "file", "filename": str(image)}})
        points.run("qemu-img", "convert", "--object", f"secret,id=key,file={key}", "-O", "raw", name, raw)
    try:
        return points.sha256(raw)
    finally:
        raw.unlink()


def by_hand(directory: Path, repository: Path, made: dict, name: str, passphrase: str = PASSPHRASE) -> Path:
    """Copy a point's images as the guide tells people to; the directory with the copies."""
    example = next(
        one for one in examples_in(CHECKOUT / "docs/guides/backup.md") if one.name == "restore-encrypted-by-hand"
    )
    with key_file(passphrase) as key:
        variables = {"POINT": directory_of(repository, made), "DEST": directory, "NAME": name, "KEY": key}
        subprocess.run(
            ["sh", "-euc", example.text],
            check=True,
            env={"PATH": os.environ["PATH"], **{name: str(value) for name, value in variables.items()}},
        )
    return directory


@pytest.fixture(scope="module")
def chain(guest: Guest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, str]]:
    """An encrypted full and two increments of vdb, made and proved under watch, the last with vda and by the role with -vvv.

    Each with the hash of vdb as the guest read it just before.
    """
    made = []
    variables = tmp_path_factory.mktemp("vault") / "variables.json"
    settings = {
        "consistent_backup_repository": str(repository),
        "consistent_backup_domains": [guest.name],
        "consistent_backup_quiesce": "required",
        "consistent_backup_verify": "structure",
        "consistent_backup_passphrase": PASSPHRASE,
    }
    variables.write_text(json.dumps(settings))
    with watching() as watch:
        for number in range(3):
            points.fill(guest, "vdb", MARK, 30 * number, 40)
            if number:
                guest.exec(
                    f"dd if=/dev/zero of=$(cat /run/disk/vdb) bs=65536 seek={30 * number - 9} count=4 oflag=direct"
                )
            before = points.device_hash(guest, "vdb")
            if number < 2:
                made.append((point(guest, repository, disks=["vdb"], encryption=ENCRYPTION), before))
                continue
            run = run_playbook(
                "vmkeeper.libvirt.backup",
                arguments=["-vvv", "-e", f"@{variables}"],
                env={"ANSIBLE_STDOUT_CALLBACK": "default"},
            )
            assert run.rc == 0, run.stdout
            assert "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in run.stdout, "the options were shown, without the passphrase"
            assert PASSPHRASE not in run.stdout + run.stderr
            latest = ok("backup_info", repository=str(repository))["restore_points"][-1]
            assert latest["verified"]["verified"]
            made.append((latest, before))
    assert watch.samples > 10
    assert {"qemu-img", "qemu-nbd"} <= watch.programs, "the watch saw QEMU's programs at work"
    assert watch.seen == set()
    return made


def test_an_encrypted_chain_holds_what_the_guest_saw(chain, repository: Path, directory: Path, guest: Guest) -> None:
    assert [made["type"] for made, _hash in chain] == ["full", "incremental", "incremental"]
    for number, (made, before) in enumerate(chain):
        assert all(disk["encryption"] == {"format": "luks"} for disk in made["disks"])
        copies = by_hand(directory, repository, made, f"copy{number}")
        assert points.content(copies / f"copy{number}.vdb.qcow2") == before
    assert evidence.fsck(directory / "copy2.vda.qcow2").clean
    assert evidence.writer_log(directory / "copy2.vda.qcow2").is_intact
    points.assert_nothing_left(guest, repository)


def test_nothing_tells_the_passphrase_or_the_data(chain, guest: Guest, repository: Path) -> None:
    assert holding([PASSPHRASE], *PLACES) == []
    assert holding([PASSPHRASE, MARK], "/var/lib/vmkeeper.libvirt", "/run", repository) == []
    assert points.scratch_files() == []
    assert guest.connection().listSecrets() == []


def test_a_passphrase_that_is_wrong_missing_or_useless_changes_nothing(
    chain, guest: Guest, repository: Path, directory: Path
) -> None:
    newest, _before = chain[-1]
    before = evidence.host_state(guest.connection(), [repository])
    backup = {"domain": guest.name, "repository": str(repository)}
    point_of = {"repository": str(repository), "id": newest["id"]}
    restore = {**point_of, "domain": "lab-secret-w", "directory": str(directory)}
    refusals = [
        ("backup", {**backup, "state": "absent", "id": chain[0][0]["id"]}, "no passphrase is given"),
        ("backup", {**backup, "encryption": {"passphrase": OTHER}}, "does not open"),
        ("backup", {**backup, "encryption": {"passphrase": "brief"}}, "shorter"),
        ("backup", {**backup, "encryption": {"passphrase": f"{PASSPHRASE}\n"}}, "line break"),
        ("backup", {**backup, "encryption": ENCRYPTION, "compression": "zstd"}, "exclude each other"),
        ("restore", restore, "encrypted"),
        ("restore", {**restore, "passphrase": OTHER}, "does not open"),
        ("backup_verify", {**point_of, "passphrase": OTHER}, "does not open"),
    ]
    for module, arguments, word in refusals:
        refused = task(module, **arguments)
        assert refused["failed"], (module, word)
        assert word in refused["msg"], refused["msg"]
        assert "Nothing was changed" in refused["msg"], refused["msg"]
    assert evidence.host_state(guest.connection(), [repository]).differences(before) == []
    assert list(directory.iterdir()) == []


def test_an_encrypted_point_is_restored_and_a_flipped_byte_is_found_without_the_passphrase(
    chain, guest: Guest, repository: Path, directory: Path
) -> None:
    newest, before = chain[-1]
    where = {"repository": str(repository), "id": newest["id"]}
    ok("restore", **where, domain="lab-secret-r", directory=str(directory), passphrase=PASSPHRASE)
    try:
        assert points.content(directory / "lab-secret-r.vdb.qcow2") == before
    finally:
        points.forget_domain(guest, "lab-secret-r")
    closed = ok("backup_verify", **where)
    assert [sentence[:8] for sentence in closed["not_checked"]] == ["disk vda", "disk vdb"]
    image = directory_of(repository, chain[0][0]) / "vdb.qcow2"
    good = image.read_bytes()
    image.write_bytes(good[:-70000] + bytes([good[-70000] ^ 1]) + good[-69999:])
    try:
        found = task("backup_verify", **where)
        assert found["failed"]
        assert chain[0][0]["id"] in found["msg"]
    finally:
        image.write_bytes(good)


def test_encryption_that_comes_or_goes_begins_a_new_chain_and_says_so(chain, guest: Guest, directory: Path) -> None:
    arguments = {"domain": guest.name, "repository": str(directory), "disks": ["vdb"]}
    plain = ok("backup", **arguments)["restore_point"]
    closed = ok("backup", **arguments, encryption=ENCRYPTION)["restore_point"]
    other = ok("backup", **arguments, encryption={"passphrase": OTHER}, type="full")["restore_point"]
    opened = ok("backup", **arguments)
    assert [one["type"] for one in (plain, closed, other)] == ["full", "full", "full"]
    assert "encrypted" in closed["reason"]
    assert opened["restore_point"]["type"] == "full"
    assert any("in the clear" in warning for warning in opened["warnings"]), opened["warnings"]


def _encrypted_by_way_of(scratch: Path, guest: Guest, repository: Path) -> dict[str, Any]:
    """An encrypted backup of one disk, with the scratch images where the test looks for them."""
    return {
        "domain": guest.name,
        "repository": str(repository),
        "encryption": ENCRYPTION,
        "scratch": str(scratch),
        "disks": ["vdb"],
    }


#: Steps at which the data is on its way between the guest's disk and the repository.
_ON_ITS_WAY = ("copy", "store", "describe")


@pytest.mark.timeout(1800)
def test_killed_with_the_data_on_its_way_nothing_readable_lies_anywhere(
    chain, guest: Guest, repository: Path, directory: Path, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    arguments = _encrypted_by_way_of(directory, guest, repository)
    for number, step in enumerate(_ON_ITS_WAY):
        points.fill(guest, "vdb", f"{MARK}-{number}", number, 3)
        expected = points.device_hash(guest, "vdb")
        log.unlink(missing_ok=True)
        killed = run_module_process("backup", env=points.killed_at(step, log), **arguments)
        assert killed.wait() == -signal.SIGKILL, step
        assert log.read_text().split()[-1].startswith("!"), "the kill landed"
        assert list(directory.iterdir()), "the scratch was in use"
        assert holding([PASSPHRASE, MARK], directory, repository, "/var/lib/vmkeeper.libvirt") == [], step
        settled = ok("recover_domain", domain=guest.name)
        assert settled["findings"], "an interrupted backup was found"
        assert list(directory.iterdir()) == [], step
        assert guest.connection().listSecrets() == [], step
        points.assert_nothing_left(guest, repository)
    again = ok("backup", **arguments)["restore_point"]
    assert again["type"] == "incremental", again["reason"]
    assert points.content(by_hand(tmp_path, repository, again, "again") / "again.vdb.qcow2") == expected


@pytest.mark.skipif(points.SCALE == 1, reason="runs in make test-long; test_compression kills the same steps")
@pytest.mark.timeout(3600)
def test_killed_at_every_step_the_next_encrypted_point_is_right_and_nothing_readable_lies_anywhere(
    chain, guest: Guest, repository: Path, directory: Path, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    arguments = _encrypted_by_way_of(directory, guest, repository)
    assert not run_module_process("backup", env=points.killed_at("", log), **arguments).result()["failed"]
    steps = list(dict.fromkeys(log.read_text().split()))
    assert {*_ON_ITS_WAY, "targets", "cut", "publish", "retire"} <= set(steps), steps
    for number, step in enumerate(steps):
        points.fill(guest, "vdb", f"{MARK}-every-{number}", number, 3)
        log.unlink()
        killed = run_module_process("backup", env=points.killed_at(step, log), **arguments)
        assert killed.wait() == -signal.SIGKILL, step
        assert log.read_text().split()[-1].startswith("!"), "the kill landed"
        assert holding([PASSPHRASE, MARK], directory, repository, "/var/lib/vmkeeper.libvirt") == [], step
        again = ok("backup", **arguments)["restore_point"]
        assert list(directory.iterdir()) == [], step
        assert guest.connection().listSecrets() == [], step
        found = points.content(by_hand(tmp_path, repository, again, f"every-{number}") / f"every-{number}.vdb.qcow2")
        assert found == points.device_hash(guest, "vdb"), step
    points.assert_nothing_left(guest, repository)


# --- a guest whose own disk is encrypted ---------------------------------------------------------------

SECRET = "0b7e5f3c-8d21-4c6e-9a51-5ad1d4c0ffee"

#: Its value, as ``echo passphrase | base64`` makes it.
VALUE = f"{PASSPHRASE}\n"


def define_secret(guest: Guest, *, private: bool) -> None:
    connection = guest.connection()
    if SECRET in connection.listSecrets():
        connection.secretLookupByUUIDString(SECRET).undefine()
    xml = f"<secret ephemeral='no' private='{'yes' if private else 'no'}'><uuid>{SECRET}</uuid></secret>"
    connection.secretDefineXML(xml).setValue(VALUE.encode())


@pytest.fixture(scope="module")
def locked(module_guest_factory) -> Iterator[Guest]:
    """A guest whose only disk is a LUKS-encrypted qcow2."""
    size = 12 * MIB
    guest = module_guest_factory(
        GuestSpec("locked", disks=(DiskSpec("vda", size=size, fs=None, writer=False),)), start=False
    )
    define_secret(guest, private=False)
    image = guest.images["vda"]
    with key_file(VALUE) as key:
        options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=50"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", f"secret,id=key,file={key}", "-o", options]
        until(lambda: subprocess.run([*create, image, str(size)], check=False).returncode == 0, "an accurate CPU usage")
    root = guest.xml(inactive=True)
    source = root.find("devices/disk/source")
    assert source is not None
    encryption = ElementTree.SubElement(source, "encryption", format="luks")
    ElementTree.SubElement(encryption, "secret", type="passphrase", uuid=SECRET)
    guest.connection().defineXML(ElementTree.tostring(root, encoding="unicode"))
    try:
        yield guest.start()
    finally:
        for secret in guest.connection().listSecrets():
            guest.connection().secretLookupByUUIDString(secret).undefine()


def test_an_encrypted_disk_stays_encrypted_in_the_repository_and_in_what_is_restored(
    locked: Guest, directory: Path
) -> None:
    repository = directory / "repository"
    repository.mkdir()
    made = []
    with watching() as watch:
        for number in range(2):
            points.fill(locked, "vda", MARK, 40 * number, 50)
            before = points.device_hash(locked, "vda")
            result = ok("backup", domain=locked.name, repository=str(repository), compression="zstd")
            assert any("uncompressed" in warning for warning in result["warnings"]), result["warnings"]
            made.append((result["restore_point"], before))
    assert watch.seen == set()
    assert holding([PASSPHRASE, MARK], repository, "/var/lib/vmkeeper.libvirt") == []
    assert [one["type"] for one, _hash in made] == ["full", "incremental"]
    newest, expected = made[-1]
    assert points.content(by_hand(directory, repository, newest, "hand", VALUE) / "hand.vda.qcow2") == expected
    where = {"repository": str(repository), "id": newest["id"]}
    ok("backup_verify", **where, passphrase=VALUE)

    arguments = {**where, "domain": "lab-locked-r", "directory": str(directory), "network": "disconnected"}
    assert "no passphrase" in task("restore", **arguments)["msg"]
    back = ok("restore", **arguments, passphrase=VALUE, state="running")
    secret = back["restored"][0]["secret"]
    try:
        assert locked.connection().lookupByName("lab-locked-r").isActive(), "QEMU opened it with the new secret"
        locked.connection().lookupByName("lab-locked-r").destroy()
        assert decoded(directory / "lab-locked-r.vda.qcow2", VALUE) == expected
        assert sorted(locked.connection().listSecrets()) == sorted([SECRET, secret])
        assert holding([MARK], directory / "lab-locked-r.vda.qcow2") == []
    finally:
        points.forget_domain(locked, "lab-locked-r")
        locked.connection().secretLookupByUUIDString(secret).undefine()


def test_an_encrypted_disk_is_restored_at_once_and_stays_encrypted(locked: Guest, directory: Path) -> None:
    repository, place = directory / "repository", directory / "place"
    repository.mkdir()
    place.mkdir()
    points.fill(locked, "vda", MARK, 10, 20)
    expected = points.device_hash(locked, "vda")
    made = ok("backup", domain=locked.name, repository=str(repository))["restore_point"]
    arguments = {
        "repository": str(repository), "id": made["id"], "domain": "lab-locked-r", "directory": str(place),
        "network": "disconnected", "mode": "instant", "passphrase": VALUE,
    }  # fmt: skip
    with without_kernel(directory_of(repository, made)):
        failed = task("restore", **arguments)
    assert "Starting the restored domain" in failed["msg"], failed["msg"]
    assert list(place.iterdir()) == [], "it was never started, and needs no key to say so"
    assert [one.name() for one in locked.connection().listAllDomains() if "locked" in one.name()] == [locked.name]
    assert locked.connection().listSecrets() == [SECRET]
    assert list(points.JOURNALS.glob("*")) == []
    back = ok("restore", **arguments)
    secret = back["restored"][0]["secret"]
    try:
        assert sorted(locked.connection().listSecrets()) == sorted([SECRET, secret]), "that of the point is gone"
        domain = locked.connection().lookupByName("lab-locked-r")
        domain.destroy()
        assert secret in domain.XMLDesc()
        assert decoded(place / "lab-locked-r.vda.qcow2", VALUE) == expected
        assert holding([MARK], place) == []
        domain.create()
        domain.destroy()
    finally:
        points.forget_domain(locked, "lab-locked-r")
        locked.connection().secretLookupByUUIDString(secret).undefine()


def test_a_private_secret_is_not_read_and_nothing_is_written_in_the_clear(locked: Guest, directory: Path) -> None:
    define_secret(locked, private=True)
    try:
        arguments = {"domain": locked.name, "repository": str(directory)}
        refused = task("backup", **arguments)
        assert refused["failed"]
        assert "encryption.passphrase" in refused["msg"], refused["msg"]
        assert list(directory.glob("*/*")) == []
        before = points.device_hash(locked, "vda")
        made = ok("backup", **arguments, encryption=ENCRYPTION)["restore_point"]
        assert decoded(directory_of(directory, made) / "vda.qcow2") == before
    finally:
        define_secret(locked, private=False)


def test_an_encrypted_disk_of_a_stopped_domain_is_copied_and_put_back(locked: Guest, directory: Path) -> None:
    expected = points.device_hash(locked, "vda")
    locked.shutdown()
    made = ok("backup", domain=locked.name, repository=str(directory))["restore_point"]
    assert decoded(directory_of(directory, made) / "vda.qcow2", VALUE) == expected
    image = locked.images["vda"]
    broken = image.read_bytes()
    image.write_bytes(b"gone" + broken[4:])
    arguments = {"repository": str(directory), "id": made["id"], "in_place": True, "confirm": locked.name}
    ok("restore", **arguments, passphrase=VALUE)
    assert decoded(image, VALUE) == expected
    locked.start()
    assert points.device_hash(locked, "vda") == expected


def test_an_encrypted_restore_killed_at_every_step_keeps_the_keys_that_are_used_and_no_other(
    locked: Guest, directory: Path, tmp_path: Path
) -> None:
    if locked.is_running():
        locked.shutdown()
    made = ok("backup", domain=locked.name, repository=str(directory))["restore_point"]
    image, log = locked.images["vda"], tmp_path / "steps"
    expected = decoded(image, VALUE)
    where = {"repository": str(directory), "id": made["id"], "passphrase": VALUE}
    in_place = {**where, "in_place": True, "confirm": locked.name}
    listed = run_module_process("restore", env=points.killed_at("", log), **in_place).result()
    assert not listed["failed"], listed["msg"]
    steps = log.read_text().split()
    assert "secrets" in steps
    for number, step in enumerate(steps if points.SCALE > 1 else ["secrets", "copy"]):
        log.unlink(missing_ok=True)
        killed = run_module_process("restore", env=points.killed_at(step, log), **in_place)
        assert killed.wait() == -signal.SIGKILL, step
        if number % 2:
            ok("recover_domain", domain=locked.name)
            assert secret_of(locked) in locked.connection().listSecrets(), step
            assert decoded(image, VALUE) == expected, step
        ok("restore", **in_place)
        assert secret_of(locked) in locked.connection().listSecrets(), step
        assert decoded(image, VALUE) == expected, step
        assert [path.name for path in image.parent.glob("vda.qcow2*")] == [image.name], step
    known = sorted(locked.connection().listSecrets())
    (directory / "new").mkdir()
    log.unlink(missing_ok=True)
    anew = {**where, "domain": "lab-locked-r", "directory": str(directory / "new")}
    killed = run_module_process("restore", env=points.killed_at("copy", log), **anew)
    assert killed.wait() == -signal.SIGKILL
    assert len(locked.connection().listSecrets()) == len(known) + 1
    ok("recover_domain")
    assert sorted(locked.connection().listSecrets()) == known
    assert list((directory / "new").iterdir()) == []


def secret_of(guest: Guest) -> str:
    """The libvirt secret that opens the disk at the next start."""
    found = guest.xml(inactive=True).find("devices/disk/source/encryption/secret")
    assert found is not None
    return found.attrib["uuid"]
