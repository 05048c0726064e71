# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Random histories: whatever happens to a disk between two backups, every point ever kept holds its instant's content.

The test keeps a model of the disk in its own memory; the product never sees it. A failing seed is printed and can be
replayed with VMK_SEED.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import time
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point

BLOCK = 65536
CYCLES = 10 * points.SCALE
SIZE = 16 * MIB
_NAMES = itertools.count(1)


class History:
    """A guest's disk vda, its model, and the operations on it, all through libvirt directly."""

    def __init__(self, guest: Guest, rng: random.Random) -> None:
        self.guest = guest
        self.rng = rng
        self.model = bytearray(SIZE)
        self.snapshots: list[tuple[str, Path, bytearray]] = []
        self.count = 0

    def write(self) -> None:
        for _time in range(self.rng.randint(1, 3)):
            self.count += 1
            blocks = self.rng.randint(1, 12)
            offset = self.rng.randrange(0, len(self.model) // BLOCK - blocks)
            mark = f"w{self.count}-{self.rng.randrange(10**6)}"
            points.fill(self.guest, "vda", mark, offset, blocks)
            self.model[offset * BLOCK : (offset + blocks) * BLOCK] = points.pattern(mark, blocks)

    def snapshot(self) -> None:
        if len(self.snapshots) > 3:
            self.commit()
        name = f"s{next(_NAMES)}"
        overlay = self.guest.directory / f"{name}.qcow2"
        base = self.guest.active_paths()["vda"]
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        self.guest.domain().snapshotCreateXML(
            f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{overlay}'/></disk></disks></domainsnapshot>",
            flags,
        )
        self.snapshots.append((name, base, bytearray(self.model)))

    def commit(self) -> None:
        if not self.snapshots:
            return
        _name, base, _content = self.snapshots.pop()
        domain = self.guest.domain()
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        domain.blockCommit("vda", str(base), None, 0, flags)

        def pivoted() -> bool:
            if self.guest.active_paths()["vda"] == base:
                return True
            with contextlib.suppress(libvirt.libvirtError):
                domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            return False

        until(pivoted, "the commit pivoting")

    def pull(self) -> None:
        if not self.snapshots:
            return
        domain = self.guest.domain()
        domain.blockPull("vda", 0, 0)
        until(lambda: not domain.blockJobInfo("vda", 0), "the pull ending")
        self.snapshots.clear()

    def resize(self) -> None:
        if len(self.model) >= 2 * SIZE:
            return
        grown = MIB * self.rng.randint(1, 3) + BLOCK * self.rng.randint(0, 3)
        self.guest.domain().blockResize("vda", len(self.model) + grown, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        self.model += bytes(grown)
        until(
            lambda: int(self.guest.exec("cat /sys/block/vda/size").text) * 512 == len(self.model),
            "the guest seeing the new size",
        )

    def revert(self) -> None:
        if not self.snapshots:
            return
        number = self.rng.randrange(len(self.snapshots))
        _name, base, content = self.snapshots[number]
        del self.snapshots[number:]
        self.guest.destroy()
        overlay = self.guest.directory / f"r{next(_NAMES)}.qcow2"
        points.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay)
        definition = self.guest.xml(inactive=True)
        (disk,) = (one for one in definition.iter("disk") if one.find("target[@dev='vda']") is not None)
        disk.find("source").set("file", str(overlay))
        # libvirt may have recorded the chain, and would start the guest on that, whatever the overlay says.
        for recorded in disk.findall("backingStore"):
            disk.remove(recorded)
        self.guest.connection().defineXML(ElementTree.tostring(definition, encoding="unicode"))
        self.model = bytearray(content)
        self.guest.start()
        # What it stands on now is one layer further down than the snapshots that remain.

    def restart_libvirtd(self) -> None:
        self.guest.host.restart_libvirtd()

    def destroy(self) -> None:
        self.guest.destroy()
        self.guest.start()


def test_every_point_of_a_random_history_restores_exactly(
    module_guest_factory, make_repository, directory: Path
) -> None:
    seed = int(os.environ.get("VMK_SEED", str(time.time_ns() % 10**9)))
    print(f"VMK_SEED={seed}")
    rng = random.Random(seed)
    guest = module_guest_factory(GuestSpec("cycles", disks=(DiskSpec("vda", size=SIZE, fs=None, writer=False),)))
    repositories = [make_repository(), make_repository()]
    history = History(guest, rng)
    kept: list[tuple[Path, dict, str, str]] = []
    told: list[str] = []
    operations = ["snapshot", "snapshot", "commit", "pull", "resize", "restart_libvirtd", "destroy", "revert"]
    deck: list[str] = []
    for _number in range(CYCLES):
        history.write()
        if not deck:
            deck = rng.sample(operations, len(operations))
        for name in [deck.pop() for _time in range(min(len(deck), rng.randint(1, 2)))]:
            told.append(name)
            getattr(history, name)()
            history.write()
        repository = rng.choice(repositories)
        made = point(guest, repository, quiesce=rng.choice(["auto", "never"]))
        told.append(f"backup {made['type']} ({made['reason']})")
        kept.append((repository, made, hashlib.sha256(history.model).hexdigest(), f"seed {seed}: {told}"))
    # The model is itself checked once, by the guest.
    assert points.device_hash(guest, "vda") == kept[-1][2], f"seed {seed}: {told}"
    assert sum(made["type"] == "incremental" for _repository, made, _hash, _told in kept) > 0, told
    for repository, made, expected, story in kept:
        assert points.content(directory_of(repository, made) / "vda.qcow2") == expected, story
    for repository, made, expected, story in rng.sample(kept, min(3, len(kept))):
        ok("restore", repository=str(repository), id=made["id"], domain="lab-cycles-r", directory=str(directory))
        image = directory / "lab-cycles-r.vda.qcow2"
        assert points.content(image) == expected, story
        points.forget_domain(guest, "lab-cycles-r")
        image.unlink()
        ok("backup_verify", repository=str(repository), id=made["id"])


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        (("snapshot", "write", "commit"), "incremental"),
        (("snapshot", "write", "snapshot", "write"), "incremental"),
        (("write", "snapshot", "resize", "pull"), "full"),
        (("snapshot", "resize", "write"), "full"),
        (("snapshot", "revert"), "full"),
        (("resize", "write"), "incremental"),
    ],
)
def test_what_happened_between_decides_between_increment_and_full(
    module_guest_factory, make_repository, between: tuple[str, ...], kind: str
) -> None:
    guest = _shared_guest(module_guest_factory)
    history = History(guest, random.Random(1))
    history.model = bytearray(_current(guest))
    repository = make_repository()
    point(guest, repository)
    for name in between:
        getattr(history, name)()
    made = point(guest, repository)
    assert made["type"] == kind, made["reason"]
    assert points.content(directory_of(repository, made) / "vda.qcow2") == points.device_hash(guest, "vda")
    while history.snapshots:
        history.commit()


_GUESTS: list[Guest] = []


def _shared_guest(factory) -> Guest:
    if not _GUESTS:
        _GUESTS.append(factory(GuestSpec("between", disks=(DiskSpec("vda", size=SIZE, fs=None, writer=False),))))
    return _GUESTS[0]


def _current(guest: Guest) -> bytes:
    """Only its length matters here: the guest's own hash is what is compared."""
    return bytes(guest.domain().blockInfo("vda")[0])
