# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Everything once, on whichever libvirt and QEMU this host has: `tests/lab/enter --generation trixie -- ... tests/generations`.

The tests follow one another on one guest. What is true is read from outside: what the guest has on its disk, and images at rest.
"""

from __future__ import annotations

import base64
import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from lab import evidence
from lab.ansible import run_module
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.host import TestHost
from lab.images import run
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.generations.task import ok
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory

MARK = "/disk/vda/mark"
#: The boot loader of the lab's disks did not come up under QEMU 11.1: there the guest boots from a kernel of the host.
BOOTS_FROM_DISK = os.environ.get("VMK_LAB_GENERATION") != "sid"
PARTITION = 2 if BOOTS_FROM_DISK else None


@pytest.fixture(scope="module")
def guest(module_guest_factory: GuestFactory) -> Guest:
    """One machine that boots from its own disk, where it can."""
    return module_guest_factory(
        GuestSpec("smoke", memory=224, max_vcpus=2, disks=(DiskSpec("vda", size=128 * MIB, boot=BOOTS_FROM_DISK),))
    )


@pytest.fixture(scope="module")
def repository(guest: Guest) -> Path:
    """Where restore points go."""
    path = guest.directory / "repository"
    path.mkdir(mode=0o711)
    return path


@pytest.fixture(scope="module")
def points() -> dict[str, dict[str, Any]]:
    """The restore points made so far."""
    return {}


@pytest.fixture
def launched(host: TestHost) -> Iterator[Callable[[str], Guest]]:
    """Looks up a domain that a module made, ``lab-`` and the name; it goes after the test."""
    made = []

    def look_up(name: str) -> Guest:
        made.append(Guest(host, GuestSpec(name)))
        return made[-1]

    yield look_up
    for guest in made:
        guest.destroy()
        with contextlib.suppress(libvirt.libvirtError):
            guest.domain().undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


def mark_after_boot(machine: Guest) -> bytes:
    """The marked file of a machine that was just started, from its agent: whoever has no system to boot has none."""
    machine.wait_agent(600)
    handle = machine.agent_command("guest-file-open", {"path": MARK})
    return base64.b64decode(machine.agent_command("guest-file-read", {"handle": handle})["buf-b64"])


def test_external_snapshot(guest: Guest) -> None:
    """external snapshot of a running guest, frozen by its agent"""
    guest.write_file(MARK, b"one")
    taken = ok("snapshot", domain=guest.name, name="one", mode="external", quiesce="required")["snapshot"]
    assert taken["consistency"] == "filesystem"
    assert len(guest.chain("vda")) == 2
    assert guest.frozen_filesystems() == []


def test_overlays_are_private(guest: Guest) -> None:
    """overlays nobody else can read"""
    for path in guest.chain("vda")[:-1]:
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0, path


def test_external_revert(guest: Guest) -> None:
    """revert to an external snapshot"""
    guest.write_file(MARK, b"two")
    ok("snapshot", domain=guest.name, name="one", state="reverted", allow_restart=True)
    guest.wait_ready()
    assert guest.read_file(MARK) == b"one"


def test_flatten_after_a_revert(guest: Guest) -> None:
    """flatten the running guest after a revert"""
    guest.write_file(MARK, b"three")
    ok("blockcommit", domain=guest.name)
    assert len(guest.chain("vda")) == 1
    assert guest.read_file(MARK) == b"three"


def test_memory_snapshot(guest: Guest) -> None:
    """external snapshot with memory, revert to it"""
    guest.exec("echo in-memory >/tmp/mark")
    ok("snapshot", domain=guest.name, name="ram", memory=True)
    guest.exec("echo later >/tmp/mark")
    ok("snapshot", domain=guest.name, name="ram", state="reverted", allow_restart=True)
    guest.wait_ready()
    assert guest.exec("cat /tmp/mark").text.strip() == "in-memory"
    ok("snapshot", domain=guest.name, name="ram", state="absent")
    assert len(guest.chain("vda")) == 1


def test_internal_snapshot(guest: Guest) -> None:
    """internal snapshot with memory, revert to it"""
    guest.write_file(MARK, b"inside")
    ok("snapshot", domain=guest.name, name="in", mode="internal", memory=True)
    guest.write_file(MARK, b"outside")
    ok("snapshot", domain=guest.name, name="in", state="reverted", allow_restart=True)
    guest.wait_ready()
    guest.exec("echo 3 >/proc/sys/vm/drop_caches")
    assert guest.read_file(MARK) == b"inside"
    ok("snapshot", domain=guest.name, name="in", state="absent")
    assert guest.domain().listAllSnapshots() == []


def test_twelve_overlays(guest: Guest) -> None:
    """a guest with 12 overlays is flattened while it runs"""
    for number in range(12):
        ok("snapshot", domain=guest.name, name=f"s{number}", mode="external", quiesce="never")
    assert len(guest.chain("vda")) == 13
    guest.write_file(MARK, b"on top")
    ok("blockcommit", domain=guest.name)
    assert len(guest.chain("vda")) == 1
    assert guest.read_file(MARK) == b"on top"


@pytest.mark.timeout(3600)
def test_many_overlays(guest: Guest, note: Callable[[str], None]) -> None:
    """more than 25 overlays: the guest always starts again, and can be flattened"""
    number, refused = 0, ""
    while number < 28 and not refused:
        taken = run_module("snapshot", domain=guest.name, name=f"m{number}", mode="external", quiesce="never")
        refused = taken["msg"] if taken["failed"] else ""
        number += not refused
    assert number == 28 or "could not start the guest again" in refused, refused
    assert len(guest.chain("vda")) == number + 1
    guest.write_file(MARK, b"far up")
    guest.destroy()
    guest.start()
    assert guest.read_file(MARK) == b"far up"
    ok("blockcommit", domain=guest.name)
    assert len(guest.chain("vda")) == 1
    assert guest.read_file(MARK) == b"far up"
    if refused:
        note(f"layer {number + 2} is refused: libvirt could not start the guest again; {number + 1} work")


def test_full_backup(guest: Guest, repository: Path, points: dict[str, dict[str, Any]]) -> None:
    """full backup of the running guest"""
    guest.write_file(MARK, b"full")
    points["full"] = ok("backup", domain=guest.name, repository=str(repository), quiesce="required")["restore_point"]
    assert (points["full"]["type"], points["full"]["consistency"]) == ("full", "filesystem")
    assert mark_in(repository, points["full"]) == b"full"


def test_increment(guest: Guest, repository: Path, points: dict[str, dict[str, Any]]) -> None:
    """incremental backup across a snapshot and its merge"""
    ok("snapshot", domain=guest.name, name="between", mode="external", quiesce="never")
    guest.write_file(MARK, b"increment")
    ok("snapshot", domain=guest.name, name="between", state="absent")
    made = ok("backup", domain=guest.name, repository=str(repository), quiesce="required")["restore_point"]
    points["increment"] = made
    assert made["type"] == "incremental", made["reason"]
    assert mark_in(repository, made) == b"increment"
    assert mark_in(repository, points["full"]) == b"full"


def test_restore(guest: Guest, repository: Path, points: dict[str, dict[str, Any]], launched) -> None:
    """restore beside the original; it boots"""
    arguments = {"repository": str(repository), "id": points["increment"]["id"], "directory": str(guest.directory)}
    ok("restore", **arguments, domain="lab-smoke-restored", state="defined")
    again = launched("smoke-restored")
    assert (
        evidence.read_file(guest.directory / "lab-smoke-restored.vda.qcow2", "/mark", partition=PARTITION)
        == b"increment"
    )
    again.domain().create()
    assert mark_after_boot(again) == b"increment"


def test_instant_restore(guest: Guest, repository: Path, points: dict[str, dict[str, Any]], launched) -> None:
    """instant restore: it runs on the repository, is pulled local, and the repository stays as it was"""
    place = guest.directory / "instant"
    place.mkdir(mode=0o711)
    before = files_of(repository)
    arguments = {"repository": str(repository), "id": points["increment"]["id"], "directory": str(place)}
    ok("restore", **arguments, domain="lab-smoke-instant", mode="instant")
    instant = launched("smoke-instant")
    assert mark_after_boot(instant) == b"increment"
    assert str(repository) not in instant.xml_text()
    instant.destroy()
    image = place / "lab-smoke-instant.vda.qcow2"
    assert "backing file:" not in run("qemu-img", "info", image)
    assert evidence.read_file(image, "/mark", partition=PARTITION) == b"increment"
    assert files_of(repository) == before


def test_resize(guest: Guest) -> None:
    """vCPUs, a disk and its file system grow while the guest runs"""
    blocks = "stat -f -c %b /disk/vda"
    before = int(guest.exec(blocks).text)
    result = ok(
        "resize_domain",
        domain=guest.name,
        vcpus=2,
        disks=[{"target": "vda", "size": "160M", "grow_filesystem": True}],
        overcommit=True,
    )
    assert {change["applied"] for change in result["changes"]} == {"live"}
    assert guest.exec("nproc").text.strip() == "2"
    assert guest.domain().blockInfo("vda")[0] == 160 * MIB
    assert int(guest.exec(blocks).text) > before


def test_full_after_resize(guest: Guest, repository: Path) -> None:
    """backup after the resize"""
    guest.write_file(MARK, b"resized")
    made = ok("backup", domain=guest.name, repository=str(repository), quiesce="required")["restore_point"]
    assert mark_in(repository, made) == b"resized"


def test_export_and_import(guest: Guest, launched, note: Callable[[str], None]) -> None:
    """export the running guest, import the image; it boots"""
    guest.write_file(MARK, b"exported")
    ok("export_image", domain=guest.name, dest=str(guest.directory), name="golden", quiesce="required")
    ok(
        "import_image",
        src=str(guest.directory / "golden"),
        domain="lab-smoke-imported",
        directory=str(guest.directory),
        state="defined",
        virt_type="qemu",
    )
    imported = launched("smoke-imported")
    (image,) = guest.directory.glob("lab-smoke-imported*vda*")
    assert evidence.read_file(image, "/mark", partition=PARTITION) == b"exported"
    if not BOOTS_FROM_DISK:
        boot_like(guest, imported)
        note("works; the imported machine was booted from a kernel of the host, too")
    imported.domain().create()
    assert mark_after_boot(imported) == b"exported"


def test_nothing_is_left(guest: Guest) -> None:
    """the guest runs, is not frozen, and nothing is unfinished"""
    assert guest.is_running()
    assert guest.frozen_filesystems() == []
    assert guest.writer_log("vda").is_intact
    assert not ok("recover_domain", domain=guest.name)["changed"]


def boot_like(guest: Guest, machine: Guest) -> None:
    """Have a machine that is off boot from the kernel that the guest boots from, which no image holds."""
    definition = machine.xml(inactive=True)
    system, model = definition.find("os"), guest.xml(inactive=True).find("os")
    system.extend(model.find(part) for part in ("kernel", "initrd", "cmdline"))
    machine.connection().defineXML(ElementTree.tostring(definition, encoding="unicode"))


def files_of(directory: Path) -> dict[str, tuple[int, ...]]:
    """Owner, mode, size and times of every file below a directory."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.stat()
        found[str(path)] = (
            status.st_uid,
            status.st_gid,
            status.st_mode,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    return found


def mark_in(repository: Path, point: dict[str, Any]) -> bytes:
    """What a restore point's disk has in the marked file."""
    image = repository / point["domain_uuid"] / point["id"] / "vda.qcow2"
    return evidence.read_file(image, "/mark", partition=PARTITION)
