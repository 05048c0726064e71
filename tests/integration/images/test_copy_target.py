# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""While QEMU copies a running guest's disks, the guest depends on the target: it must be reachable, and a full one must not fail writes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.images import filesystem
from ansible_collections.vmkeeper.libvirt.tests.lab.tasks import kill_environment, steps_in
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

from . import tasks

JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")
WORKERS = Path("/var/lib/vmkeeper.libvirt/workers")


@pytest.fixture
def small(library: Path) -> Iterator[Path]:
    """A filesystem of 160 MiB that cannot set blocks aside. A guest that was started before does not see it."""
    with filesystem(library, 160 << 20) as where:
        yield where


@pytest.fixture
def roomy(library: Path) -> Iterator[Path]:
    """Another, with room for the copy of a disk that outlasts the first moment, in which no limit holds yet."""
    with filesystem(library, 1536 << 20) as where:
        yield where


def has_job(guest: Guest) -> bool:
    """Whether libvirt has a backup job for the domain."""
    try:
        guest.domain().backupGetXMLDesc(0)
    except libvirt.libvirtError:
        return False
    return True


def fill(ballast: Path) -> None:
    """Until nothing more fits."""
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=1M"], capture_output=True, check=False)


def assert_writes_on(guest: Guest) -> None:
    """It runs, and none of its writes fails, nor waits."""
    written = guest.gaps("vda").count
    until(lambda: guest.gaps("vda").count > written + 20, "the guest writing on")
    assert guest.writer_errors("vda") == []
    assert guest.exec("dmesg | grep -ci 'I/O error' || true").text == "0"
    assert guest.state()[0] == libvirt.VIR_DOMAIN_RUNNING


def test_a_scratch_directory_that_qemu_cannot_reach_is_refused_before_the_freeze(
    running: Guest, library: Path, tmp_path: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    options = {"domain": running.name, "dest": str(library), "name": "one", "scratch": str(private)}
    for check in (True, False):
        tasks.refused("export_image", "cannot reach the scratch directory", "choose another", check=check, **options)
    assert list(library.iterdir()) == list(private.iterdir()) == list(JOURNAL.glob("*")) == []


def test_a_guest_writes_on_when_the_target_of_its_export_fills_up_and_nobody_else_is_there_to_see(
    guest_factory: Callable[..., Guest], roomy: Path, tmp_path: Path
) -> None:
    disks = (DiskSpec("vda", size=64 << 20), DiskSpec("vdb", size=768 << 20, fs=None, writer=False))
    guest = guest_factory(GuestSpec("filling", disks=disks), start=False)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x41 0 768M", str(guest.images["vdb"])]
    subprocess.run(write, capture_output=True, check=True)
    guest.start()
    options = {"domain": guest.name, "dest": str(roomy), "name": "one", "quiesce": "never"}
    slow = {**options, "bandwidth": "256K"}
    # A guest that may be frozen is not left alone with a copy of many minutes, and the guard goes on.
    guest.replace_agent("fake:thaw-fails:6")
    log = tmp_path / "log"
    tasks.refused("export_image", "not confirmed", env=kill_environment(log), **{**slow, "quiesce": "required"})
    assert "thawed" in steps_in(log)
    assert "copy" not in steps_in(log)
    assert not has_job(guest)
    until(lambda: guest.frozen_filesystems() == [], "the guard thawing")

    ballast = roomy / "ballast"
    tasks.kill_at("copy", "export_image", log, **slow)
    fill(ballast)
    assert_writes_on(guest)
    until(lambda: not has_job(guest), "the sentry ending the job of a run that is dead", 30)
    ballast.unlink()

    export = tasks.start("export_image", **slow)
    until(lambda: has_job(guest) or export.poll() is not None, "the copy beginning")
    fill(ballast)
    ended = tasks.finish(export)
    assert ended.answer.get("error", {}).get("kind") == "no_space", ended
    assert not has_job(guest)
    assert_writes_on(guest)
    assert not list(JOURNAL.iterdir())
    ballast.unlink()

    assert tasks.ok("export_image", **options).changed
    assert sorted(path.name for path in roomy.iterdir()) == ["lost+found", "one"]
    until(lambda: not list(WORKERS.glob("sentry-*")), "the sentry going home", 60)


def test_a_disk_on_a_block_device_needs_the_room_of_all_of_it(guest_factory: Callable[..., Guest], small: Path) -> None:
    disks = (
        DiskSpec("vda", size=16 << 20),
        DiskSpec("vdb", size=256 << 20, format="raw", kind="block", fs=None, writer=False),
    )
    guest = guest_factory(GuestSpec("device", disks=disks))
    options = {"domain": guest.name, "dest": str(small), "name": "one", "quiesce": "never"}
    for check in (True, False):
        refused = tasks.refused("export_image", "are needed", check=check, **options)
        assert refused["error"]["kind"] == "no_space", refused
        assert refused["error"]["needed"] > 272 << 20
    assert not list(JOURNAL.glob("*"))
    assert_writes_on(guest)


def test_an_export_outlives_libvirtd(guest_factory: Callable[..., Guest], library: Path, tmp_path: Path) -> None:
    size = 768 << 20  # a fast disk copies much until the limit takes hold
    disks = (DiskSpec("vda", size=16 << 20), DiskSpec("vdb", size=size, format="raw", fs=None, writer=False))
    guest = guest_factory(GuestSpec("enduring", disks=disks), start=False)
    content = os.urandom(size)
    guest.images["vdb"].write_bytes(content)
    guest.start()
    options = {"domain": guest.name, "dest": str(library), "name": "one", "quiesce": "required", "bandwidth": "48M"}
    log = tmp_path / "log"
    export = tasks.start("export_image", env=kill_environment(log), **options)
    until(lambda: "copy" in steps_in(log) or export.poll() is not None, "the copy beginning")
    time.sleep(1)  # the limit is set, and the task waits
    guest.host.kill_libvirtd()
    guest.host.start()
    assert has_job(guest), "the copy goes on without libvirtd"
    ended = tasks.finish(export)
    assert ended.rc == 0, ended
    assert ended.changed
    with evidence.flattened(library / "one" / "vdb.qcow2") as copy:
        same = copy.read_bytes() == content  # most of a gigabyte, which is not to be shown
    assert same
    assert evidence.writer_log(library / "one" / "vda.qcow2").is_intact
    assert_writes_on(guest)
    assert guest.frozen_filesystems() == []
    assert not has_job(guest)
    assert [path.name for path in library.iterdir()] == ["one"]
    assert not list(JOURNAL.iterdir())
    until(lambda: not list(WORKERS.glob("sentry-*")), "the sentry going home", 60)
    again = tasks.refused("export_image", "runs: its content is another one now", **options)
    assert again["image"]["path"] == str(library / "one")
