# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""UEFI variables go with a snapshot: copied at the cut, back at a revert, away with its removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import ways
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import MIB

MARK_AT = 64
"""Counted from the end: a part of the flash that OVMF keeps as spare room."""


@pytest.fixture(scope="module")
def guest(make_guest: Callable[..., Guest]) -> Guest:
    """A UEFI guest that is shut off and has variables, since it was started once, without running."""
    spec = GuestSpec("nvram", disks=(DiskSpec("vda", size=16 * MIB, writer=False),), memory=256, firmware="uefi")
    made = make_guest(spec, start="no")
    made.domain().createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    made.destroy()
    return made


@pytest.fixture(autouse=True)
def flat_and_off(guest: Guest) -> Iterator[None]:
    yield
    tasks.ok("recover_domain", domain=guest.name)
    for name in ways.snapshots(guest):
        tasks.ok("snapshot", domain=guest.name, name=name, state="absent")
    tasks.ok("blockcommit", domain=guest.name)
    guest.destroy()
    assert ways.files(guest) == {path.name for path in guest.images.values()}


def variables(guest: Guest) -> Path:
    """The domain's file."""
    return Path(str(guest.xml(inactive=True).findtext("os/nvram")))


def mark(guest: Guest, text: str) -> None:
    """Let the variables of a guest that is off differ."""
    with variables(guest).open("r+b") as stream:
        stream.seek(-MARK_AT, 2)
        stream.write(text.encode().ljust(MARK_AT, b"\0"))


def marked(path: Path) -> str:
    """What :func:`mark` wrote."""
    return path.read_bytes()[-MARK_AT:].rstrip(b"\0").decode()


def test_the_variables_follow_a_revert_there_and_back_and_keep_their_owner(guest: Guest) -> None:
    mark(guest, "one")
    taken = tasks.ok("snapshot", domain=guest.name, name="one")["snapshot"]
    assert [part for part in taken["not_captured"] if part["kind"] == "nvram"] == []
    assert marked(Path(taken["nvram"])) == "one"
    assert Path(taken["nvram"]).stat().st_mode & 0o777 == 0o600
    mark(guest, "two")
    before = variables(guest).stat()
    answer = tasks.ok("snapshot", domain=guest.name, name="one", state="reverted", keep_present_as="two")
    assert answer["snapshot"]["nvram_restored"]
    assert answer.warnings == []
    assert marked(variables(guest)) == "one"
    after = variables(guest).stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    ways.assert_whole(guest)
    tasks.ok("snapshot", domain=guest.name, name="two", state="reverted")
    assert marked(variables(guest)) == "two"
    shown = tasks.ok("snapshot_info", domain=guest.name, name="one")["snapshot"]
    assert shown["nvram"] == taken["nvram"]
    assert taken["nvram"] in shown["depends_on"]
    Path(taken["nvram"]).rename(guest.directory / "hidden")
    assert not tasks.ok("snapshot_info", domain=guest.name, name="one")["snapshot"]["bootable"]
    refused = tasks.run("snapshot", domain=guest.name, name="one", state="reverted")
    assert refused.failed
    assert taken["nvram"] in refused.message
    (guest.directory / "hidden").rename(taken["nvram"])


def test_a_snapshot_without_a_copy_says_so_and_leaves_the_variables_as_they_are(guest: Guest) -> None:
    file = variables(guest)
    aside = file.with_suffix(".aside")
    file.rename(aside)
    taken = tasks.ok("snapshot", domain=guest.name, name="one")
    assert taken["snapshot"]["nvram"] is None
    assert [part["name"] for part in taken["snapshot"]["not_captured"] if part["kind"] == "nvram"] == [str(file)]
    aside.rename(file)
    mark(guest, "today")
    answer = tasks.ok("snapshot", domain=guest.name, name="one", state="reverted")
    assert not answer["snapshot"]["nvram_restored"]
    assert any("UEFI variables" in warning for warning in answer.warnings)
    assert marked(file) == "today"


def test_a_revert_killed_around_the_variables_is_finished_or_taken_back(guest: Guest, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    mark(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one")
    for step, action, content in (
        ("overlays", "taken back", "two"),
        ("define", "finished", "one"),
        ("nvram", "finished", "one"),
        ("current", "finished", "one"),
    ):
        mark(guest, "two")
        killed = tasks.finish(tasks.killed_at(step, "snapshot", log, domain=guest.name, name="one", state="reverted"))
        assert killed.killed, (step, tasks.steps_in(log))
        found = tasks.ok("recover_domain", domain=guest.name)["findings"]
        assert [one["action"] for one in found] == [action], step
        assert marked(variables(guest)) == content, step
        ways.assert_whole(guest)


def test_a_snapshot_killed_at_its_cut_leaves_no_copy_behind(guest: Guest, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    for step in ("overlays", "cut"):
        killed = tasks.finish(tasks.killed_at(step, "snapshot", log, domain=guest.name, name="one"))
        assert killed.killed, (step, tasks.steps_in(log))
        tasks.ok("recover_domain", domain=guest.name)
        assert ways.files(guest) == {path.name for path in guest.images.values()}


def test_a_running_guests_variables_are_those_of_the_cut(guest: Guest) -> None:
    guest.start()
    ways.write(guest, "one")
    taken = tasks.ok("snapshot", domain=guest.name, name="one", quiesce="required")["snapshot"]
    held = Path(taken["nvram"]).read_bytes()
    assert held == variables(guest).read_bytes()
    ways.write(guest, "two")
    guest.shutdown()
    mark(guest, "changed since")
    tasks.ok("snapshot", domain=guest.name, name="one", state="reverted")
    assert variables(guest).read_bytes() == held
    guest.start()
    assert ways.read(guest) == {"one"}
    # Resumed memory brings its variables along: QEMU writes them over the file.
    tasks.ok("snapshot", domain=guest.name, name="with-memory", memory=True)
    held = variables(guest).read_bytes()
    guest.shutdown()
    mark(guest, "changed since")
    tasks.ok("snapshot", domain=guest.name, name="with-memory", state="reverted")
    guest.wait_ready()
    assert variables(guest).read_bytes() == held
    guest.destroy()
