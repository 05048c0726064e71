# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Full points, increments, restores and proofs of a running, writing guest."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest
from lab import evidence
from lab.ansible import CHECKOUT, run_module
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.docs_examples import examples_in
from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    """One ext4 disk with a writer, a bare qcow2 one and a raw one."""
    return module_guest_factory(
        GuestSpec(
            "points",
            disks=(
                DiskSpec("vda", size=64 * MIB),
                DiskSpec("vdb", size=32 * MIB, fs=None, writer=False),
                DiskSpec("vdc", size=8 * MIB, fs=None, writer=False, format="raw"),
            ),
        )
    )


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    return make_repository()


@pytest.fixture(scope="module")
def chain(guest: Guest, repository: Path) -> list[tuple[dict, str]]:
    """Three points, each with the hash of vdb at its instant as the guest computed it from its device."""
    made = []
    for number in range(3):
        points.fill(guest, "vdb", f"round-{number}", 40 * number, 60)
        before = points.device_hash(guest, "vdb")
        made.append((point(guest, repository, quiesce="required", tags={"round": str(number)}), before))
    return made


def test_a_first_point_is_full_and_the_next_are_increments(chain) -> None:
    types = [[disk["type"] for disk in made["disks"]] for made, _hash in chain]
    assert types == [["full"] * 3, ["incremental", "incremental", "full"], ["incremental", "incremental", "full"]]
    assert [made["consistency"] for made, _hash in chain] == ["filesystem"] * 3
    assert [made["parent"] for made, _hash in chain] == [None, chain[0][0]["id"], chain[1][0]["id"]]
    assert all(made["frozen_ms"] > 0 for made, _hash in chain)
    assert "raw" not in chain[0][0]["disks"][2]["reason"]
    assert "qcow2" in chain[0][0]["disks"][2]["reason"]


def test_every_point_holds_what_the_guest_saw_at_its_instant(chain, repository: Path) -> None:
    for made, before in chain:
        assert points.content(directory_of(repository, made) / "vdb.qcow2") == before
        image = directory_of(repository, made) / "vda.qcow2"
        checked = evidence.fsck(image)
        assert checked.clean
        assert not checked.needs_recovery, checked.output
        assert evidence.writer_log(image).is_intact


def test_one_live_checkpoint_is_kept_and_nothing_is_left(chain, guest: Guest, repository: Path) -> None:
    assert points.checkpoints(guest) == [chain[-1][0]["checkpoint"]]
    points.assert_nothing_left(guest, repository)


def test_points_are_private(chain, repository: Path) -> None:
    for made, _hash in chain:
        for path in directory_of(repository, made).iterdir():
            status = path.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, 0), path
        assert stat.S_IMODE(directory_of(repository, made).stat().st_mode) == 0o711


def test_the_repository_can_be_moved(chain, repository: Path, directory: Path) -> None:
    moved = directory / "moved"
    shutil.copytree(repository, moved)
    made, before = chain[-1]
    assert points.content(directory_of(moved, made) / "vdb.qcow2") == before
    assert ok("backup_verify", repository=str(moved), id=made["id"])["verified"]


def test_a_one_percent_increment_is_small(guest: Guest, repository: Path, chain) -> None:
    points.fill(guest, "vdb", "small", 100, 5)
    size = ok("backup", check=True, domain=guest.name, repository=str(repository))["restore_point"]["disks"][1]
    made = point(guest, repository, quiesce="never", disks=["vdb"])["disks"][0]
    dirty = 5 * 65536
    assert made["type"] == size["type"] == "incremental"
    assert made["changed_bytes"] == dirty
    data_and_tables = made["stored_bytes"]
    # Below some MiB an image's own four or five clusters weigh; the limit is on what grows with the data.
    assert data_and_tables - 5 * 65536 <= 1.2 * dirty, made


def test_info_shows_what_there_is(chain, guest: Guest, repository: Path) -> None:
    shown = ok("backup_info", repository=str(repository), domain=guest.name)
    ids = [one["id"] for one in shown["restore_points"]]
    assert ids[:3] == [made["id"] for made, _hash in chain]
    assert all(one["restorable"] for one in shown["restore_points"])
    assert shown["restore_points"][2]["chain"] == list(reversed(ids[:3]))
    assert shown["repository"]["stored_bytes"] == sum(one["stored_bytes"] for one in shown["restore_points"])
    assert [
        one["id"] for one in ok("backup_info", repository=str(repository), tags={"round": "1"})["restore_points"]
    ] == [ids[1]]
    assert ok("backup_info", repository=str(repository), before="2001-01-01T00:00:00Z")["restore_points"] == []
    assert task("backup_info", repository=str(repository), before="yesterday")["failed"]


def test_min_age_keeps_the_young_point(chain, guest: Guest, repository: Path) -> None:
    count = len(ok("backup_info", repository=str(repository))["restore_points"])
    again = ok("backup", domain=guest.name, repository=str(repository), min_age="1d")
    assert not again["changed"]
    assert len(ok("backup_info", repository=str(repository))["restore_points"]) == count


def test_check_mode_changes_nothing(chain, guest: Guest, repository: Path) -> None:
    before = evidence.host_state(guest.connection(), [repository])
    predicted = ok("backup", check=True, domain=guest.name, repository=str(repository))
    assert predicted["changed"]
    assert predicted["restore_point"]["id"] is None
    latest = {"repository": str(repository), "source_domain": guest.name, "domain": "lab-points-x"}
    assert ok("restore", check=True, **latest, latest=True)["id"] == ok("restore", check=True, **latest)["id"]
    assert "without id and before" in task("restore", **latest, latest=True, id="20200101T000000Z-0000")["msg"]
    assert "must be named" in task("restore", **latest, latest=False)["msg"]
    assert evidence.host_state(guest.connection(), [repository]).differences(before) == []


def test_restored_beside_the_original_it_is_another_machine_with_the_same_content(
    chain, guest: Guest, repository: Path, directory: Path
) -> None:
    made, before = chain[1]
    result = run_module(
        "restore",
        repository=str(repository),
        id=made["id"],
        domain="lab-points-r",
        directory=str(directory),
        network="disconnected",
    )
    assert not result["failed"], result["msg"]
    try:
        files = {one["target"]: Path(one["path"]) for one in result["restored"]}
        assert points.content(files["vdb"]) == before
        for target in ("vda", "vdb", "vdc"):
            assert evidence.same_content(files[target], directory_of(repository, made) / f"{target}.qcow2")
        assert files["vdc"].suffix == ".raw"
        xml = ElementTree.fromstring(guest.connection().lookupByName("lab-points-r").XMLDesc(0))
        assert xml.findtext("uuid") != made["domain_uuid"]
        domain = guest.connection().lookupByName("lab-points-r")
        domain.create()
        assert domain.isActive()
        assert guest.is_running()
        assert task("restore", repository=str(repository), id=made["id"], domain="lab-points-r")["failed"]
    finally:
        points.forget_domain(guest, "lab-points-r")


def test_restored_by_hand_with_qemu_img_and_virsh_alone(chain, guest: Guest, repository: Path, directory: Path) -> None:
    """The commands of docs/guides/backup.md, as they stand there."""
    made, before = chain[2]
    guide = CHECKOUT / "docs" / "guides" / "backup.md"
    script = next(example.text for example in examples_in(guide) if example.name == "restore-by-hand")
    variables = {"POINT": str(directory_of(repository, made)), "DEST": str(directory), "NAME": "lab-points-hand"}
    subprocess.run(["sh", "-eu", "-c", script], env={**os.environ, **variables}, check=True, capture_output=True)
    try:
        assert points.content(directory / "lab-points-hand.vdb.qcow2") == before
        domain = guest.connection().lookupByName("lab-points-hand")
        targets = ElementTree.fromstring(domain.XMLDesc(0)).iterfind("devices/disk/target")
        assert [target.get("dev") for target in targets] == ["vda", "vdb", "vdc"]
        guest.connection().defineXML(domain.XMLDesc(0).replace(str(guest.serial_log), str(directory / "serial.log")))
        points.run("virsh", "start", "lab-points-hand")
    finally:
        points.forget_domain(guest, "lab-points-hand")


@pytest.mark.parametrize("level", ["digest", "structure"])
def test_a_good_point_is_proved(chain, repository: Path, guest: Guest, level: str) -> None:
    result = ok("backup_verify", repository=str(repository), source_domain=guest.name, level=level)
    assert result["verified"]
    assert result["findings"] == []
    shown = ok("backup_info", repository=str(repository))["restore_points"][-1]
    assert shown["verified"]["verified"]
    assert shown["verified"]["level"] == level


def test_damage_fails_the_proof_and_the_restore(chain, repository: Path, directory: Path) -> None:
    made, _before = chain[2]
    first = chain[0][0]

    def flip(path: Path, offset: int) -> None:
        with path.open("r+b") as stream:
            stream.seek(offset)
            byte = stream.read(1)
            stream.seek(offset)
            stream.write(bytes([byte[0] ^ 0x40]))

    def damaged(name: str) -> Path:
        copy = directory / name
        shutil.copytree(repository, copy)
        return copy

    def findings(copy: Path, level: str) -> str:
        result = task("backup_verify", repository=str(copy), id=made["id"], level=level)
        assert result["failed"], (copy, level)
        return str(result.get("findings") or result["msg"])

    flipped = damaged("flipped")
    flip(directory_of(flipped, made) / "vdb.qcow2", (directory_of(flipped, made) / "vdb.qcow2").stat().st_size - 40000)
    assert "vdb" in findings(flipped, "digest")
    restored = task(
        "restore", repository=str(flipped), id=made["id"], domain="lab-points-bad", directory=str(directory)
    )
    assert restored["failed"]
    assert "damaged" in restored["msg"], restored["msg"]
    assert not list(directory.glob("lab-points-bad*"))

    missing = damaged("missing")
    (directory_of(missing, first) / "vdb.qcow2").unlink()
    assert "missing" in findings(missing, "digest")
    shown = task("restore", repository=str(missing), id=made["id"], domain="lab-points-bad", directory=str(directory))
    assert shown["failed"]
    assert first["id"] in shown["msg"], shown["msg"]

    broken = damaged("broken")
    image = directory_of(broken, made) / "vdb.qcow2"
    # Its refcount table says that nothing is in use: all content still reads well.
    with image.open("r+b") as stream:
        stream.seek(0x10000)
        stream.write(bytes(64))
    assert "vdb" in findings(broken, "structure")

    for name in ("manifest.json", "domain.xml"):
        other = damaged(name)
        flip(directory_of(other, made) / name, 100)
        assert findings(other, "digest")


def test_two_repositories_and_a_foreign_checkpoint_live_together(
    guest: Guest, repository: Path, chain, directory: Path
) -> None:
    theirs = (
        "<domaincheckpoint><name>theirs</name><disks><disk name='vdb' checkpoint='bitmap'/></disks></domaincheckpoint>"
    )
    guest.domain().checkpointCreateXML(theirs, 0)
    try:
        other = point(guest, directory)
        assert other["type"] == "full"
        points.fill(guest, "vdb", "both", 300, 8)
        before = points.device_hash(guest, "vdb")
        for place in (repository, directory):
            made = point(guest, place)
            assert made["type"] == "incremental", made["reason"]
            assert points.content(directory_of(place, made) / "vdb.qcow2") == before
        assert "theirs" in points.checkpoints(guest)
        assert len(points.checkpoints(guest)) == 3
    finally:
        guest.domain().checkpointLookupByName("theirs").delete(0)


def test_a_checkpoint_that_libvirt_forgot_is_put_back(guest: Guest, repository: Path, chain) -> None:
    last = point(guest, repository)
    guest.domain().checkpointLookupByName(last["checkpoint"]).delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    points.fill(guest, "vdb", "forgot", 200, 8)
    before = points.device_hash(guest, "vdb")
    made = point(guest, repository)
    assert made["type"] == "incremental", made["reason"]
    assert points.content(directory_of(repository, made) / "vdb.qcow2") == before


def test_a_deleted_checkpoint_means_a_full_that_says_so(guest: Guest, repository: Path, chain) -> None:
    last = point(guest, repository)
    guest.domain().checkpointLookupByName(last["checkpoint"]).delete(0)
    refused = task("backup", domain=guest.name, repository=str(repository), type="incremental")
    assert refused["failed"]
    assert "checkpoint" in refused["msg"]
    made = point(guest, repository)
    assert made["type"] == "full"
    assert "checkpoint" in made["reason"]


def test_removal_respects_protection_and_is_repeatable(guest: Guest, directory: Path) -> None:
    first = point(guest, directory, disks=["vdb"])
    second = point(guest, directory, disks=["vdb"], protected=True)
    arguments = {"domain": guest.name, "repository": str(directory), "state": "absent"}
    refused = task("backup", id=second["id"], **arguments)
    assert refused["failed"]
    assert "protected" in refused["msg"], refused["msg"]
    content = points.content(directory_of(directory, second) / "vdb.qcow2")
    for changed in (True, False):
        assert ok("backup", id=first["id"], **arguments)["changed"] is changed
    assert not directory_of(directory, first).exists()
    assert points.content(directory_of(directory, second) / "vdb.qcow2") == content
    assert points.manifest(directory, second)["type"] == "full"


def test_bad_input_is_refused_before_anything_is_changed(guest: Guest, directory: Path, tmp_path: Path) -> None:
    name = guest.name
    assert "not a directory" in task("backup", domain=name, repository=str(directory / "none"))["msg"]
    (directory / "something").write_text("x")
    assert "not empty" in task("backup", domain=name, repository=str(directory))["msg"]
    (directory / "repository.json").write_text('{"format": 99, "uuid": "x"}')
    assert "newer version" in task("backup", domain=name, repository=str(directory))["msg"]
    assert "newer version" in task("backup_info", repository=str(directory))["msg"]
    (directory / "repository.json").unlink()
    (directory / "something").unlink()
    os.chmod(tmp_path, 0o700)
    assert "cannot reach" in task("backup", domain=name, repository=str(tmp_path))["msg"]
    assert "not a repository" in task("restore", repository=str(directory), source_domain=name)["msg"]
    assert "vdz" in task("backup", domain=name, repository=str(directory), disks=["vdz"])["msg"]
    assert "incrementally" in task("backup", domain=name, repository=str(directory), type="incremental")["msg"]
    assert sorted(path.name for path in directory.iterdir() if path.name != "repository.json") in (
        [],
        [guest.domain().UUIDString()],
    )
    point(guest, directory, disks=["vdc"])
    unknown = task("restore", repository=str(directory), id="20200101T000000Z-0000")
    assert unknown["failed"]
    assert "backup_info" in unknown["msg"]
