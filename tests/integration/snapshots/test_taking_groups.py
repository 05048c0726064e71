# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A snapshot of several domains is of one instant, and either all of them have it or none."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import proof
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks


@pytest.fixture(scope="module")
def pair(make_guest) -> tuple[Guest, Guest]:
    first, second = (
        make_guest(GuestSpec(name, disks=(DiskSpec("vda", size=64 * MIB, cache="unsafe"),)), start="async")
        for name in ("one", "two")
    )
    first.wait_ready()
    second.wait_ready()
    return first, second


class Sequencer:
    """Writes n to the first guest, waits until it is on disk, writes n to the second, and so on: an order across guests."""

    def __init__(self, pair: tuple[Guest, Guest]) -> None:
        self._pair = pair
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.written = 0

    def __enter__(self) -> Sequencer:
        self._thread.start()
        until(lambda: self.written > 1, "the sequencer's first numbers")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        for guest in self._pair:
            guest.exec("rm -f /disk/vda/order")
        while not self._over.is_set():
            for guest in self._pair:
                guest.exec(f"echo {self.written + 1} >>/disk/vda/order; sync /disk/vda/order")
            self.written += 1


def order_in(image: str) -> int:
    """The last number that an image holds."""
    return int(evidence.read_file(Path(image), "/order").split()[-1])


@pytest.mark.parametrize(("quiesce", "level"), [("required", "filesystem"), ("never", "crash")])
def test_what_is_in_the_second_is_in_the_first_and_nothing_more(pair, quiesce, level):
    with Sequencer(pair) as sequencer:
        for number in range(3):
            began = sequencer.written
            taken = tasks.ok(
                "snapshot", domains=[guest.name for guest in pair], name=f"{quiesce}{number}", quiesce=quiesce
            )
            first, second = taken["snapshots"]
            assert "snapshot" not in taken.answer
            assert {first["consistency"], second["consistency"]} == {level}
            assert first["paused_ms"] is not None
            a, b = (order_in(entry["disks"][0]["base"]) for entry in (first, second))
            assert began <= a
            assert b <= a <= b + 1
            if level == "filesystem":
                for entry in (first, second):
                    proof.clean(entry["disks"][0]["base"])
            until(lambda n=sequencer.written: sequencer.written > n, "the guests writing on")
    for guest in pair:
        proof.alive(guest)


def test_a_second_run_changes_nothing_and_half_a_group_is_a_conflict(pair):
    names = [guest.name for guest in pair]
    assert not tasks.ok("snapshot", domains=names, name="required0", quiesce="required").changed
    tasks.ok("snapshot", domains=names[:1], name="alone")
    refused = tasks.run("snapshot", domains=names, name="alone")
    assert refused.failed
    assert f"exists on {names[0]} and not on {names[1]}" in refused.message
    for option in ({"memory": True}, {"mode": "internal"}):
        assert tasks.run("snapshot", domains=names, name="new", **option).failed
    twice = tasks.ok("snapshot", domains=[names[0], pair[0].domain().UUIDString()], name="alone")
    assert len(twice["snapshots"]) == 1


@pytest.fixture
def small(pair) -> Iterator[Path]:
    """A filesystem that can be filled."""
    place = pair[1].directory / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m,mode=0755", "none", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_one_that_fails_leaves_no_snapshot_on_any(pair, tmp_path):
    """The second's overlay disappears between the freeze and the cut."""
    names = [guest.name for guest in pair]
    before = {guest.name: (guest.chain("vda"), snapshots(guest), files(guest)) for guest in pair}
    log = tmp_path / "steps"
    process = tasks.killed_at("cut", "snapshot", log, how="stop", domains=names, name="torn", quiesce="required")
    until(lambda: "!cut" in tasks.steps_in(log), "the module stopping at the cut")
    (pair[1].directory / f"{names[1]}.vda.torn.qcow2").unlink()
    os.kill(process.pid, signal.SIGCONT)
    outcome = tasks.finish(process)
    assert outcome.failed
    assert "'lab-two' failed" in outcome.message
    assert "No domain of the task has the snapshot" in outcome.message
    for guest in pair:
        assert (guest.chain("vda"), snapshots(guest), files(guest)) == before[guest.name]
        proof.alive(guest)
        assert proof.whole(guest.writer_log("vda")).last.count


def test_a_filesystem_that_is_full_for_one_stops_all_before_the_freeze(pair, small):
    names = [guest.name for guest in pair]
    (small / "ballast").write_bytes(bytes(30 * MIB))
    before = evidence.host_state(pair[0].connection()).parts
    outcome = tasks.run("snapshot", domains=names, name="full", directory=str(small))
    assert outcome.failed
    assert "128 MiB are needed" in outcome.message
    assert evidence.host_state(pair[0].connection()).parts == before
    assert list(small.iterdir()) == [small / "ballast"]


def snapshots(guest: Guest) -> list[str]:
    return sorted(snapshot.getName() for snapshot in guest.domain().listAllSnapshots())


def files(guest: Guest) -> list[str]:
    return sorted(path.name for path in guest.directory.iterdir())
