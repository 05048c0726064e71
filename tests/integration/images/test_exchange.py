# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import DiskSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

from . import tasks

JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def agent_answers(domain: libvirt.virDomain) -> bool:
    try:
        libvirt_qemu.qemuAgentCommand(domain, '{"execute": "guest-ping"}', 10, 0)
    except libvirt.libvirtError:
        return False
    return True


def seen_by(domain: libvirt.virDomain) -> str:
    """What a launched guest has mounted, and what its kernel had to recover to do so."""
    script = "cat /proc/mounts; dmesg | grep -i -e recover -e 'fs error'"
    command = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}

    def ask(execute: str, arguments: dict[str, object]) -> dict[str, Any]:
        text = json.dumps({"execute": execute, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuAgentCommand(domain, text, 30, 0))["return"]

    pid = ask("guest-exec", command)["pid"]
    status: dict[str, Any] = {}

    def ended() -> bool:
        status.update(ask("guest-exec-status", {"pid": pid}))
        return bool(status["exited"])

    until(ended, "a command in the launched guest")
    return base64.b64decode(status.get("out-data", "")).decode(errors="replace")


def assert_private(bundle: Path) -> None:
    for path in [bundle, *bundle.iterdir()]:
        status = path.lstat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o700 if path == bundle else 0o600), path


def leftovers(library: Path) -> list[str]:
    return [path.name for path in library.iterdir() if path.name.startswith(".")]


def test_a_writing_guest_is_exported_and_its_launch_boots_clean(
    running: Guest, host: TestHost, library: Path, launched: list[str]
) -> None:
    before, written = running.xml_text(), running.gaps("vda").count
    image = tasks.ok("export_image", domain=running.name, dest=str(library), name="golden", quiesce="required")["image"]
    assert image["consistency"] == "filesystem"
    assert image["frozen_ms"] >= 0
    # The original never stopped, and its definition and chain are as before.
    assert running.xml_text() == before
    until(lambda: running.gaps("vda").count > written, "the writer going on")
    assert running.writer_errors("vda") == []
    bundle = library / "golden"
    assert_private(bundle)
    assert leftovers(library) == []
    for disk in image["disks"]:
        assert digest_of(bundle / disk["file"]) == disk["sha256"]
        assert (bundle / disk["file"]).stat().st_size == disk["stored_size"]
    logs = []
    for name, partition in (("vda.qcow2", 1), ("vdb.qcow2", None)):
        checked = evidence.fsck(bundle / name, partition)
        assert checked.clean, checked.output
        assert not checked.needs_recovery
        log = evidence.writer_log(bundle / name, partition)
        assert log.is_intact, log.problems
        logs.append(log)
    # One instant: whatever one disk's writer had completed well before, the other's had too.
    assert abs(logs[0].last.tick - logs[1].last.tick) < 200

    launched.append("lab-launched")
    options = {"src": str(bundle), "domain": "lab-launched", "virt_type": "qemu"}
    assert tasks.ok("import_image", check=True, **options).changed
    new = tasks.ok("import_image", **options)
    paths = {disk["target"]: Path(disk["path"]) for disk in new["domain"]["disks"]}
    for target, path in paths.items():
        assert evidence.same_content(bundle / f"{target}.qcow2", path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    connection = host.connect()
    domain = connection.lookupByName("lab-launched")
    assert domain.UUIDString() != running.domain().UUIDString()
    assert not tasks.ok("import_image", **options).changed
    assert tasks.ok("import_image", **options, state="running").changed
    until(lambda: agent_answers(domain), "the launched guest's agent answering", 600)
    seen = seen_by(domain)
    assert " /disk/vda " in seen
    assert " /disk/vdb " in seen
    assert "recover" not in seen.lower()
    assert not tasks.ok("import_image", **options, state="running").changed
    assert running.is_running()
    connection.close()


def test_linked_launches_share_a_base_that_no_guest_can_write(
    running: Guest, host: TestHost, library: Path, launched: list[str]
) -> None:
    tasks.ok("export_image", domain=running.name, dest=str(library), name="golden", compression="zstd")
    options = {"src": str(library / "golden"), "mode": "linked", "virt_type": "qemu", "memory": "200M", "vcpus": 2}
    for name in ("lab-linked1", "lab-linked2"):
        launched.append(name)
        assert tasks.ok("import_image", domain=name, **options).changed
    bases = sorted(Path("/var/lib/libvirt/images/.vmkeeper-bases").iterdir())
    assert len(bases) == 2
    before = [(path.stat().st_uid, path.stat().st_mode, digest_of(path)) for path in bases]
    assert {(uid, stat.S_IMODE(mode)) for uid, mode, _digest in before} == {(0, 0o440)}
    connection = host.connect()
    domain = connection.lookupByName("lab-linked1")
    domain.create()
    assert (domain.info()[1], domain.info()[3]) == (200 << 10, 2)
    until(lambda: agent_answers(domain), "the linked guest's agent answering", 600)
    # libvirt itself is asked to write into the base: QEMU's user may not.
    job_ended = False
    try:
        domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    except libvirt.libvirtError as error:
        job_ended = "ermission" in str(error) or "reopen" in str(error).lower() or "read-only" in str(error).lower()
    assert job_ended
    domain.destroy()
    assert [(path.stat().st_uid, path.stat().st_mode, digest_of(path)) for path in bases] == before

    # A base stays as long as anything stands on it, and is told of and removed when nothing does any more.
    def unused() -> set[Path]:
        found = tasks.ok("recover_domain", check=True)["findings"]
        return {Path(path) for one in found if "base" in one["what"] for path in one["left"]}

    assert unused() == set(), "both are defined"
    for name in ("lab-linked1", "lab-linked2"):
        connection.lookupByName(name).undefine()
    overlays = sorted(Path("/var/lib/libvirt/images").glob("lab-linked*.qcow2"))
    assert len(overlays) == 4
    assert unused() == set(), "their disks are there, without a definition"
    for overlay in overlays:
        overlay.unlink()
    with bases[0].open("rb"):
        assert unused() == {bases[1]}, "somebody has the other open"
        assert tasks.ok("recover_domain").changed
    assert not bases[1].exists()
    assert unused() == {bases[0]}
    assert bases[0].exists(), "check mode removes nothing"
    assert tasks.ok("recover_domain").changed
    assert not bases[0].parent.exists()
    assert tasks.ok("recover_domain")["findings"] == []
    assert tasks.ok("import_image", domain="lab-linked1", **options).changed
    assert len(list(bases[0].parent.iterdir())) == 2
    connection.close()


def test_a_snapshot_is_exported_as_it_was_while_the_guest_goes_on(running: Guest, library: Path) -> None:
    running.write_file("/disk/vdb/when", b"before")
    tasks.ok("snapshot", domains=[running.name], name="then", quiesce="required")
    try:
        running.write_file("/disk/vdb/when", b"after")
        chain = running.xml_text()
        image = tasks.ok(
            "export_image", domain=running.name, snapshot="then", dest=str(library), name="past", quiesce="required"
        )
        assert image["image"]["consistency"] in ("filesystem", "application")
        assert evidence.read_file(library / "past" / "vdb.qcow2", "/when") == b"before"
        assert running.xml_text() == chain
        again = tasks.ok("export_image", domain=running.name, snapshot="then", dest=str(library), name="past")
        assert not again.changed
    finally:
        for target in ("vda", "vdb"):
            running.domain().blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
            until(lambda target=target: running.domain().blockJobInfo(target).get("cur") is not None, "the commit")
            until(lambda target=target: pivots(running, target), f"the commit of {target}")
        running.domain().snapshotLookupByName("then").delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


def pivots(guest: Guest, target: str) -> bool:
    try:
        guest.domain().blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    except libvirt.libvirtError:
        return False
    return True


@pytest.mark.parametrize(
    ("image_format", "compression"),
    [
        ("qcow2", "none"),
        ("qcow2", "zlib"),
        ("qcow2", "zstd"),
        ("raw", "none"),
        ("vmdk", "none"),
        ("vmdk", "zlib"),
        ("vhdx", "none"),
    ],
)
def test_every_format_holds_the_same_content_and_comes_back(
    still: Guest, library: Path, launched: list[str], image_format: str, compression: str
) -> None:
    options = {
        "domain": still.name,
        "dest": str(library),
        "name": "all",
        "format": image_format,
        "compression": compression,
    }
    image = tasks.ok("export_image", **options)["image"]
    bundle = library / "all"
    assert_private(bundle)
    for disk in image["disks"]:
        assert evidence.same_content(still.images[disk["target"]], bundle / disk["file"])
    # Idempotent by content, not by time.
    for path in still.images.values():
        os.utime(path)
    assert not tasks.ok("export_image", **options).changed
    launched.append("lab-back")
    new = tasks.ok("import_image", src=str(bundle), domain="lab-back", virt_type="qemu")
    for disk in new["domain"]["disks"]:
        assert evidence.same_content(still.images[disk["target"]], Path(disk["path"]))
        evidence.check(Path(disk["path"]))


def test_a_machine_is_launched_into_a_pool(still: Guest, library: Path, launched: list[str]) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="one", disks=["vdb"])
    connection = still.connection()
    place = Path("/var/lib/libvirt/images/lab-pool")
    place.mkdir(mode=0o711)
    pool = connection.storagePoolDefineXML(
        f"<pool type='dir'><name>lab-launches</name><target><path>{place}</path></target></pool>"
    )
    launch = {"src": str(library / "one"), "domain": "lab-pooled", "virt_type": "qemu"}
    launched.append("lab-pooled")
    try:
        tasks.refused("import_image", "exclude each other", pool="lab-launches", directory=str(place), **launch)
        tasks.refused("import_image", "no-such-pool", pool="no-such-pool", **launch)
        new = tasks.ok("import_image", pool="lab-launches", **launch)["domain"]
        assert [Path(disk["path"]).parent for disk in new["disks"]] == [place]
        assert not tasks.ok("import_image", pool="lab-launches", **launch).changed
    finally:
        pool.undefine()
        shutil.rmtree(place)


def test_a_snapshot_inside_the_images_is_exported_whether_the_domain_runs_or_not(
    guest_factory: Callable[..., Guest], library: Path, tmp_path: Path
) -> None:
    guest = guest_factory(GuestSpec("inside", disks=(DiskSpec("vda", size=24 << 20, writer=False),)), start=False)
    tasks.ok("snapshot", domains=[guest.name], name="then", mode="internal")
    then = guest.directory / "then"
    shutil.copy(guest.images["vda"], then)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 20M 1M", guest.images["vda"]], check=True)
    export = {"domain": guest.name, "dest": str(library), "snapshot": "then"}
    foreseen = tasks.ok("export_image", name="past", check=True, **export)["image"]
    made = tasks.ok("export_image", name="past", **export)["image"]
    assert made["consistency"] == foreseen["consistency"]
    assert evidence.same_content(library / "past" / "vda.qcow2", then)
    again = tasks.run("export_image", name="past", **export)
    assert again.failed
    assert again["image"]["digest"] == made["digest"], "who only hands it over is told what it is"
    then.unlink()

    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -z 20M 1M", guest.images["vda"]], check=True)
    guest.start()
    guest.write_file("/disk/vda/mark", b"then" * 5000)
    tasks.ok("snapshot", domains=[guest.name], name="live-then", mode="internal", memory=True)
    guest.write_file("/disk/vda/mark", b"now" * 5000)
    running = {**export, "snapshot": "live-then", "name": "running", "compression": "zstd"}
    ran_as, definition = guest.domain().ID(), guest.xml_text()
    for step in ("copy", "write", "sealed"):
        tasks.kill_at(step, "export_image", tmp_path / "log", **running)
    tasks.ok("export_image", **running)
    assert evidence.read_file(library / "running" / "vda.qcow2", "/mark") == b"then" * 5000
    assert guest.read_file("/disk/vda/mark") == b"now" * 5000
    assert (guest.domain().ID(), guest.xml_text()) == (ran_as, definition)
    assert sorted(path.name for path in library.iterdir()) == ["past", "running"]
    assert not list(JOURNAL.iterdir())
    guest.shutdown()
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", guest.images["vda"]], check=True)


def test_what_cannot_be_kept_is_refused_before_anything_changes(still: Guest, library: Path) -> None:
    base = {"domain": still.name, "dest": str(library), "name": "one"}
    tasks.refused("export_image", "quiesce is required", **base, quiesce="required")
    tasks.refused("export_image", "does not exist for format", **base, format="raw", compression="zstd")
    tasks.refused("export_image", "has no disk", **base, disks=["vdz"])
    tasks.refused("export_image", "not a safe name", **{**base, "name": "../one"})
    tasks.refused("export_image", "no snapshot", **base, snapshot="none")
    assert list(library.iterdir()) == []
    image = tasks.ok("export_image", **base, disks=["vdb"], tags={"app": "web"})["image"]
    assert [disk["target"] for disk in image["disks"]] == ["vdb"]
    assert {"vda"} == {part["name"] for part in image["not_captured"] if part["kind"] == "disk"}
    tasks.refused("export_image", "differs in", **base)
    with (library / "one" / "vdb.qcow2").open("r+b") as damaged:
        damaged.seek(-1, os.SEEK_END)
        damaged.write(b"\xff")
    tasks.refused("export_image", "damaged", **base, disks=["vdb"], tags={"app": "web"})


def test_a_name_or_a_file_that_is_taken_stays_as_it_is(still: Guest, library: Path) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="one")
    tasks.refused("import_image", "not launched from", src=str(library / "one"), domain=still.name, virt_type="qemu")
    precious = Path("/var/lib/libvirt/images/lab-taken.vda.qcow2")
    precious.write_text("precious")
    try:
        tasks.refused("import_image", "exists already", src=str(library / "one"), domain="lab-taken", virt_type="qemu")
        assert precious.read_text() == "precious"
    finally:
        precious.unlink()
    tasks.refused(
        "import_image", "no network", src=str(library / "one"), domain="lab-n", network="nowhere", virt_type="qemu"
    )


def test_an_export_that_is_killed_at_any_step_is_finished_by_the_same_task(
    running: Guest, library: Path, tmp_path: Path
) -> None:
    options = {
        "domain": running.name, "dest": str(library), "name": "kept",
        "disks": ["vdb"], "compression": "zlib", "quiesce": "required", "deadline": "20s",
    }  # fmt: skip
    chain = running.xml_text()
    steps = tasks.steps_of("export_image", tmp_path / "log", **options)
    assert {"begin", "stage", "targets", "frozen", "cut", "cut-done", "copy", "write", "seal", "sealed"} <= set(steps)
    for step in steps:
        remove(library / "kept")
        tasks.kill_at(step, "export_image", tmp_path / "log", **options)
        assert tasks.ok("export_image", **options).changed, step
        assert leftovers(library) == [], step
        assert not list(JOURNAL.iterdir()), step
        assert running.frozen_filesystems() == [], step
        assert running.is_running(), step
    assert running.xml_text() == chain
    with pytest.raises(libvirt.libvirtError):
        running.domain().backupGetXMLDesc(0)
    checked = evidence.fsck(library / "kept" / "vdb.qcow2")
    assert checked.clean, checked.output
    assert not checked.needs_recovery


def remove(bundle: Path) -> None:
    for path in bundle.iterdir():
        path.unlink()
    bundle.rmdir()


@pytest.mark.parametrize("mode", ["copy", "linked"])
def test_an_import_that_is_killed_at_any_step_is_finished_by_the_same_task(
    still: Guest, host: TestHost, library: Path, launched: list[str], tmp_path: Path, mode: str
) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="one")
    images = Path("/var/lib/libvirt/images")
    options = {"src": str(library / "one"), "virt_type": "qemu", "mode": mode}
    launched.append("lab-k")
    steps = tasks.steps_of("import_image", tmp_path / "log", domain="lab-k", **options)
    assert {"begin", "stage", "copy", "convert", "place", "define", "defined"} <= set(steps) | {"copy", "convert"}
    for number, step in enumerate(steps):
        name = f"lab-k{number}"
        launched.append(name)
        if mode == "linked":
            for base in (images / ".vmkeeper-bases").iterdir():
                base.unlink()
        tasks.kill_at(step, "import_image", tmp_path / "log", domain=name, **options)
        new = tasks.ok("import_image", domain=name, **options)["domain"]
        for disk in new["disks"]:
            assert evidence.same_content(still.images[disk["target"]], Path(disk["path"])), step
        assert leftovers(images) in ([], [".vmkeeper-bases"]), step
        assert not list(JOURNAL.iterdir()), step
    if mode == "linked":
        # A definition whose disk is somewhere else now still counts.
        (images / "lab-k.vda.qcow2").rename(images / "library" / "moved")
        (images / "lab-k.vdb.qcow2").rename(images / "library" / "moved-too")
        connection = host.connect()
        for name in launched[1:]:
            connection.lookupByName(name).undefine()
            for path in images.glob(f"{name}.*"):
                path.unlink()
        connection.close()
        assert tasks.ok("recover_domain", check=True)["findings"] == []


def test_a_launched_machine_that_was_resized_since_is_left_alone(
    still: Guest, library: Path, launched: list[str]
) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="one", disks=["vdb"])
    options = {"src": str(library / "one"), "domain": "lab-grown", "virt_type": "qemu"}
    launched.append("lab-grown")
    assert tasks.ok("import_image", **options, vcpus=1, memory="128M").changed
    assert tasks.ok("resize_domain", domain="lab-grown", vcpus=2, memory="192M").changed
    assert not tasks.ok("import_image", **options, vcpus=1, memory="128M").changed
    kept = tasks.ok("import_image", **options, vcpus=2, memory="192M")
    assert not kept.changed
    assert (kept["domain"]["vcpus"], kept["domain"]["memory"]) == (2, 192 << 20)
    tasks.refused("import_image", "with vcpus 1 and not 3", **options, vcpus=3)


def test_a_uefi_machine_takes_its_variables_along(
    guest_factory: Callable[..., Guest], host: TestHost, library: Path, launched: list[str]
) -> None:
    spec = GuestSpec("uefi", disks=(DiskSpec("vda", size=24 << 20),), firmware="uefi", agent="absent", memory=256)
    guest = guest_factory(spec, start=False)
    guest.start(wait=False)  # libvirt makes the variables at the first start
    variables = Path(guest.xml().findtext("os/nvram", ""))
    guest.destroy()
    content = variables.read_bytes()
    image = tasks.ok("export_image", domain=guest.name, dest=str(library), name="one")["image"]
    assert "nvram" not in [part["kind"] for part in image["not_captured"]]
    assert (library / "one" / "nvram.fd").read_bytes() == content
    assert not tasks.ok("export_image", domain=guest.name, dest=str(library), name="one").changed
    launched.append("lab-efi")
    tasks.ok("import_image", src=str(library / "one"), domain="lab-efi", virt_type="qemu")
    connection = host.connect()
    domain = connection.lookupByName("lab-efi")
    path = Path(ElementTree.fromstring(domain.XMLDesc()).findtext("os/nvram", ""))
    try:
        assert path.parent == Path("/var/lib/libvirt/images")
        assert path.read_bytes() == content
        domain.create()
        assert domain.isActive()
        domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    finally:
        path.unlink(missing_ok=True)
    connection.close()
