# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What no trade takes along: left out with its reason and a warning, and refused in a sentence when a task names it.

The domain is defined, never started: nobody answers at its network disks' addresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.ansible import run_module
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.images import run
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.generations.task import ok
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory

RBD = "<source protocol='rbd' name='pool/image'><host name='127.0.0.1' port='6789'/></source>"
ISCSI = "<source protocol='iscsi' name='iqn.2026-01.org.example:disks/1'><host name='127.0.0.1' port='3260'/></source>"
NOTE = "left out with a warning; refused when named"


def network_disk(target: str, source: str) -> str:
    driver = "<driver name='qemu' type='raw'/>"
    return f"<disk type='network' device='disk'>{driver}{source}<target dev='{target}' bus='virtio'/></disk>"


@pytest.fixture(scope="module")
def guest(module_guest_factory: GuestFactory) -> Guest:
    """A machine with one disk that everything takes (``vda``), and ``vdb`` of ZFS, ``vdc`` of RBD and ``vdd`` of iSCSI."""
    disks = (
        DiskSpec("vda", size=8 * MIB, fs=None),
        DiskSpec("vdb", size=8 * MIB, fs=None, format="raw", kind="block"),
    )
    more = network_disk("vdc", RBD) + network_disk("vdd", ISCSI)
    return module_guest_factory(GuestSpec("unsupported", disks=disks, extra_devices=more), start=False)


@pytest.fixture(scope="module", autouse=True)
def called_as_zfs_calls_them(guest: Guest) -> Iterator[None]:
    """For the modules of this host, the kernel calls the guest's block device ``zd0``: all that tells a ZFS volume from others."""
    place = Path(os.environ.get("VMK_LAB_SYSTEM", "/")) / "sys/dev/block"
    device = os.stat(guest.active_paths()["vdb"]).st_rdev
    entries = guest.directory / "sys-dev-block"
    entries.mkdir()
    for entry in place.iterdir():
        (entries / entry.name).symlink_to(entry.readlink())
    volume = entries / f"{os.major(device)}:{os.minor(device)}"
    volume.unlink()
    volume.symlink_to("../../devices/virtual/block/zd0")
    run("mount", "--bind", entries, place)
    yield
    run("umount", place)


@pytest.fixture(scope="module")
def taken(guest: Guest, called_as_zfs_calls_them: None) -> list[tuple[set[tuple[str, str]], str]]:
    """Of a snapshot, a restore point and an image of the whole machine: ``(name, reason)`` of what they lack, and the warnings."""
    repository = guest.directory / "repository"
    repository.mkdir(mode=0o711)
    options = {"domain": guest.name, "quiesce": "never"}
    answers = (
        ("snapshot", ok("snapshot", name="parts", mode="external", **options)),
        ("restore_point", ok("backup", repository=str(repository), **options)),
        ("image", ok("export_image", dest=str(guest.directory), name="parts", **options)),
    )
    assert [[disk["target"] for disk in answer[made]["disks"]] for made, answer in answers] == [["vda"]] * 3
    return [
        ({(part["name"], part["reason"]) for part in answer[made]["not_captured"]}, " ".join(answer["warnings"]))
        for made, answer in answers
    ]


def assert_left_out(taken: list[tuple[set[tuple[str, str]], str]], name: str, reason: str) -> None:
    for parts, warnings in taken:
        assert (name, reason) in parts
        assert f"{name} ({reason})" in warnings


def assert_refused(guest: Guest, target: str, sentence: str) -> None:
    before = guest.xml_text()
    tasks: dict[str, dict[str, Any]] = {
        "snapshot": {"name": "named", "disks": [target]},
        "backup": {"repository": str(guest.directory / "repository"), "disks": [target]},
        "export_image": {"dest": str(guest.directory), "name": "named", "disks": [target]},
        "resize_domain": {"disks": [{"target": target, "size": "16M"}]},
    }
    for module, arguments in tasks.items():
        answer = run_module(module, domain=guest.name, **arguments)
        assert answer["failed"], module
        assert f"{target!r} of domain {guest.name!r} cannot be" in answer["msg"], module
        assert sentence in answer["msg"], module
    assert guest.xml_text() == before


def test_network_disks(guest: Guest, taken, note: Callable[[str], None]) -> None:
    """RBD and iSCSI disks: snapshot, backup, export, resize"""
    for target in ("vdc", "vdd"):
        assert_left_out(taken, target, "not-local")
        assert_refused(guest, target, "it is not a local file or block device")
    note(NOTE)


def test_zfs_volume(guest: Guest, taken, note: Callable[[str], None]) -> None:
    """ZFS volume: snapshot, backup, export, resize"""
    assert_left_out(taken, "vdb", "zfs")
    assert_refused(guest, "vdb", "it is a ZFS volume, which is not handled yet")
    note(NOTE)
