# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Every kind of disk that is tested at all goes through everything once; the contents are compared by qemu-img."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest
from lab import evidence, kernel
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.host import TestHost
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.generations.task import ok
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory

TARGETS = ("vda", "vdb", "vdc", "vdd")
#: Of the UEFI variables: the end, a part of the flash that OVMF keeps as spare room.
MARK_LENGTH = 64


def bare(target: str, **options: object) -> DiskSpec:
    return DiskSpec(target, size=8 * MIB, fs=None, writer=False, **options)


@pytest.fixture(scope="module")
def guest(module_guest_factory: GuestFactory) -> Guest:
    """A machine with UEFI firmware and a disk of each kind."""
    disks = (
        bare("vda"),
        bare("vdb", format="raw"),
        bare("vdc", format="raw", kind="block"),
        bare("vdd", kind="volume"),
    )
    return module_guest_factory(GuestSpec("storage", disks=disks, firmware="uefi", memory=256))


@pytest.fixture
def forgotten(host: TestHost) -> Iterator[list[str]]:
    """Names of domains that go after the test."""
    names: list[str] = []
    yield names
    for name in names:
        with contextlib.suppress(libvirt.libvirtError):
            host.connect().lookupByName(name).undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)


def fill(guest: Guest, letter: str) -> None:
    """Have the guest write a megabyte of the letter to each disk, each at a place of its own."""
    for number, target in enumerate(TARGETS):
        write = f"head -c 1048576 /dev/zero | tr '\\0' {letter} | dd of=/dev/$d bs=64k seek={number * 16} conv=fsync"
        # the guest names disks in the order of its bus: the serial number says which is which
        find = (
            f'for d in $(ls /sys/block); do [ "$(cat /sys/block/$d/serial 2>/dev/null)" = lab-{target} ] && break; done'
        )
        guest.exec(f"{find}; {write}")


def as_the_guest_sees_it(guest: Guest, target: str) -> bytes:
    """The first five megabytes of the disk, read by the guest past its cache."""
    find = f'for d in $(ls /sys/block); do [ "$(cat /sys/block/$d/serial 2>/dev/null)" = lab-{target} ] && break; done'
    return guest.exec(f"{find}; echo 3 >/proc/sys/vm/drop_caches; head -c 5242880 /dev/$d | sha256sum").stdout


def variables(guest: Guest, name: str) -> Path:
    """The file with a domain's UEFI variables."""
    definition = guest.connection().lookupByName(name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    return Path(ElementTree.fromstring(definition).findtext("os/nvram"))


def mark_variables(guest: Guest, text: str) -> bytes:
    """Let the guest's UEFI variables differ from its firmware's template, and from before; all of them."""
    path = variables(guest, guest.name)
    with path.open("r+b") as stream:
        stream.seek(-MARK_LENGTH, os.SEEK_END)
        stream.write(text.encode().ljust(MARK_LENGTH, b"\0"))
    return path.read_bytes()


def digest(image: Path) -> bytes:
    """The same of an image at rest."""
    with evidence.flattened(image) as raw, open(raw, "rb") as stream:
        return (hashlib.sha256(stream.read(5242880)).hexdigest() + "  -\n").encode()


def test_snapshot_revert_flatten(guest: Guest) -> None:
    """file, raw file, block device, volume, UEFI variables: snapshot, revert, flatten"""
    fill(guest, "a")
    held = mark_variables(guest, "snapshot")
    before = [as_the_guest_sees_it(guest, target) for target in TARGETS]
    taken = ok("snapshot", domain=guest.name, name="kinds", quiesce="never")["snapshot"]
    assert {disk["target"] for disk in taken["disks"]} == set(TARGETS)
    assert Path(taken["nvram"]).read_bytes() == held
    fill(guest, "b")
    mark_variables(guest, "later")
    ok("snapshot", domain=guest.name, name="kinds", state="reverted", allow_restart=True)
    guest.wait_ready()
    # not all of them: the firmware has written to its own by now
    assert variables(guest, guest.name).read_bytes()[-MARK_LENGTH:] == held[-MARK_LENGTH:]
    assert [as_the_guest_sees_it(guest, target) for target in TARGETS] == before
    ok("snapshot", domain=guest.name, name="kinds", state="absent")
    assert [len(guest.chain(target)) for target in TARGETS] == [1, 1, 1, 1]
    assert [as_the_guest_sees_it(guest, target) for target in TARGETS] == before


def test_backup_and_restore(guest: Guest, forgotten: list[str]) -> None:
    """file, raw file, block device, volume, UEFI variables: backup, restore"""
    repository = guest.directory / "repository"
    repository.mkdir(mode=0o711)
    fill(guest, "c")
    seen = [as_the_guest_sees_it(guest, target) for target in TARGETS]
    held = mark_variables(guest, "backup")
    made = ok("backup", domain=guest.name, repository=str(repository), quiesce="never")["restore_point"]
    fill(guest, "d")
    mark_variables(guest, "later")
    forgotten.append("lab-storage-again")
    place = guest.directory / "again"
    place.mkdir(mode=0o711)
    arguments = {"repository": str(repository), "id": made["id"], "directory": str(place)}
    ok("restore", **arguments, domain="lab-storage-again", state="defined")
    for target, there in zip(TARGETS, seen):
        (image,) = place.glob(f"*.{target}.*")
        assert digest(image) == there, target
    assert variables(guest, "lab-storage-again") != variables(guest, guest.name)
    assert variables(guest, "lab-storage-again").read_bytes() == held


def test_export_and_import(guest: Guest, forgotten: list[str]) -> None:
    """file, raw file, block device, volume, UEFI variables: export, import"""
    seen = [as_the_guest_sees_it(guest, target) for target in TARGETS]
    held = mark_variables(guest, "image")
    ok("export_image", domain=guest.name, dest=str(guest.directory), name="kinds", quiesce="never")
    mark_variables(guest, "later")
    forgotten.append("lab-storage-copy")
    place = guest.directory / "copy"
    place.mkdir(mode=0o711)
    ok(
        "import_image",
        src=str(guest.directory / "kinds"),
        domain="lab-storage-copy",
        directory=str(place),
        state="defined",
    )
    for target, there in zip(TARGETS, seen):
        (image,) = place.glob(f"*{target}*")
        assert digest(image) == there, target
    assert variables(guest, "lab-storage-copy").parent == place
    assert variables(guest, "lab-storage-copy").read_bytes() == held


def test_resize(guest: Guest) -> None:
    """file, raw file, extended block device, volume: grow while the guest runs"""
    backing = guest.images["vdc"]
    with backing.open("r+b") as file:
        file.truncate(16 * MIB)
    for node in kernel.loop_devices_backed_below(guest.directory):
        assert os.system(f"losetup --set-capacity {node}") == 0
    disks = [{"target": target, "size": "16M"} for target in TARGETS]
    ok("resize_domain", domain=guest.name, disks=disks)
    assert [guest.domain().blockInfo(target)[0] for target in TARGETS] == [16 * MIB] * 4
