# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""``restore mode: instant`` of an encrypted point: the passphrase is nowhere but in memory, and asked for when that is lost."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lab.ansible import run_module_process
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.host import TestHost
from lab.secrecy import PLACES, Watch, holding
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import ok, point, task
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.test_instant import restored, write

__all__ = ["restored"]  # a fixture

PASSPHRASE = "eight-Wandering-otters-914"
SIZE = 24 * MIB


class Closed:
    """An encrypted repository with a chain of two points, and what the guest saw then."""

    def __init__(self, repository: Path, made: dict[str, Any], vdb: bytes) -> None:
        self.repository, self.id, self.vdb = repository, made["id"], bytearray(vdb)

    def write(self, guest: Guest, mark: str, offset: int, blocks: int) -> None:
        """Let the guest write, and note it."""
        write(guest, mark, offset, blocks)
        self.vdb[offset * 65536 : (offset + blocks) * 65536] = points.pattern(mark, blocks)

    def assert_read_by(self, guest: Guest) -> None:
        """A part of it: what the guest reads is local from then on, and a pull is to be seen at work."""
        found = guest.exec(
            "dd if=$(cat /run/disk/vdb) bs=65536 skip=240 count=40 2>/dev/null | sha256sum"
        ).text.split()[0]
        assert found == hashlib.sha256(self.vdb[240 * 65536 : 280 * 65536]).hexdigest()


@pytest.fixture
def closed(module_guest_factory, make_repository) -> Closed:
    origin = module_guest_factory(
        GuestSpec(
            "closed",
            disks=(DiskSpec("vda", size=24 * MIB, writer=False), DiskSpec("vdb", size=SIZE, fs=None, writer=False)),
        )
    )
    repository, content = make_repository(), bytearray(SIZE)
    for mark, offset, blocks in (("first", 0, 300), ("second", 200, 100)):
        points.fill(origin, "vdb", mark, offset, blocks)
        content[offset * 65536 : (offset + blocks) * 65536] = points.pattern(mark, blocks)
        made = point(origin, repository, encryption={"passphrase": PASSPHRASE})
    assert made["type"] == "incremental"
    origin.destroy()
    return Closed(repository, made, bytes(content))


def secrets(guest: Guest) -> list[str]:
    return list(guest.connection().listSecrets())


def assert_independent(guest: Guest, directory: Path) -> None:
    for path in directory.iterdir():
        info = json.loads(points.run("qemu-img", "info", "-U", "--output=json", path))
        assert "backing-filename" not in info
        assert not info.get("encrypted"), "it was not in the guest's own image"
    assert "encryption" not in guest.xml_text(inactive=True)
    assert secrets(guest) == []
    assert list(points.JOURNALS.glob("*")) == []


@pytest.mark.timeout(1200)
def test_an_encrypted_point_answers_at_once_and_asks_for_its_passphrase_when_that_is_forgotten(
    host: TestHost, closed: Closed, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    plain = {
        "repository": str(closed.repository), "id": closed.id, "domain": "lab-lent", "directory": str(directory),
        "mode": "instant",
    }  # fmt: skip
    known, slowly = {**plain, "passphrase": PASSPHRASE}, {"wait": False, "bandwidth": "128K"}
    for wrong in ({}, {"passphrase": PASSPHRASE + "x"}):
        refused = task("restore", **plain, **wrong)
        assert refused["failed"]
        assert "passphrase" in refused["msg"]
        assert list(directory.iterdir()) == []
    with Watch(PASSPHRASE, [], "/var/lib/vmkeeper.libvirt", "/run", directory) as watch:
        log = tmp_path / "steps"
        for step in ("overlay", "start", "pull"):
            killed = run_module_process("restore", env=points.killed_at(step, log), **known, bandwidth="128K")
            assert killed.wait() == -signal.SIGKILL, step
            log.unlink()
        ok("restore", **known, **slowly)
        restored.wait_ready()
        closed.assert_read_by(restored)
        closed.write(restored, "mine", 250, 20)
        assert len(secrets(restored)) == 1

        host.kill_libvirtd()
        host.start()
        os.kill(host.qemu_pids()["lab-lent"], signal.SIGKILL)
        restored.wait_shutoff()
        assert secrets(restored) == [], "they were in libvirtd's memory only"
        for module, arguments in (("recover_domain", {"domain": "lab-lent"}), ("restore", plain)):
            refused = task(module, **arguments)
            assert refused["failed"]
            assert "Run the restore again with its passphrase" in refused["msg"], refused["msg"]
        ok("restore", **known, **slowly)
        restored.wait_ready()
        closed.assert_read_by(restored)
        closed.write(restored, "again", 100, 10)

        # Shut down before all is local: the worker has no passphrase; who waits with it makes the guest whole as it lies.
        restored.shutdown()
        failed = task("domain_job", domain="lab-lent", state="finished")
        assert failed["failed"]
        assert "with its passphrase" in failed["msg"], failed["msg"]
        waiting = run_module_process("restore", **known, bandwidth="128K")
        until(lambda: restored.is_running() and restored.domain().blockJobInfo("vdb"), "a pull of vdb")
        restored.wait_ready()
        restored.shutdown()
        assert not waiting.result()["failed"], waiting.result()["msg"]
    assert watch.samples > 10
    assert watch.seen == set()
    assert holding([PASSPHRASE], *PLACES) == []
    assert_independent(restored, directory)
    assert points.content(directory / "lab-lent.vdb.qcow2") == hashlib.sha256(closed.vdb).hexdigest()
