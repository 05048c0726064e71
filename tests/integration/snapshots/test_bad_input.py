# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What cannot be done is refused in one sentence that says what to do, and nothing has changed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.lab import tasks

BINDING = Path("/usr/lib/python3/dist-packages/libvirt.py")
OURS = [Path("/var/lib/vmkeeper.libvirt")]


@pytest.fixture(scope="module")
def guest(make_guest) -> Guest:
    disks = (
        DiskSpec("vda", size=8 * MIB, fs=None, writer=False),
        DiskSpec("vdb", size=8 * MIB, fs=None, writer=False, format="raw"),
    )
    guest = make_guest(GuestSpec("bad", disks=disks), start="no")
    tasks.ok("snapshot", domains=[guest.name], name="taken", disks=["vda"])
    return guest


@contextlib.contextmanager
def unchanged(guest: Guest) -> Iterator[None]:
    before = evidence.host_state(guest.connection(), [guest.directory, *OURS])
    yield
    assert before.differences(evidence.host_state(guest.connection(), [guest.directory, *OURS])) == []


def assert_refused(outcome: tasks.Outcome, *words: str) -> None:
    """It failed by a sentence, not by a trace, and says that nothing changed."""
    assert outcome.failed
    assert not outcome.answer.get("changed")
    assert "Traceback" not in outcome.message
    assert "Unexpected" not in outcome.message
    assert "Nothing was changed." in outcome.message
    for word in words:
        assert word in outcome.message, outcome.message


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"domains": ["nobody"]}, ["no domain 'nobody'", "lab-bad"]),
        ({"disks": ["vdz"]}, ["no disk 'vdz'", "vda, vdb"]),
        ({"exclude_disks": ["sda"]}, ["no disk 'sda'", "vda, vdb"]),
        ({"disks": ["vda"], "exclude_disks": ["vda"]}, ["both name vda"]),
        ({"exclude_disks": ["vda", "vdb"]}, ["no disk that a snapshot can hold"]),
        ({"name": "../evil"}, ["not a safe name"]),
        ({"name": "-rf"}, ["not a safe name"]),
        ({"name": "a\nb"}, ["not a safe name"]),
        ({"name": "x" * 101}, ["not a safe name"]),
        ({"name": "taken", "disks": ["vdb"]}, ["other content", "holds vda and not vdb", "Choose another name"]),
        ({"name": "taken", "mode": "internal"}, ["other content", "it is external"]),
        ({"name": "taken", "quiesce": "required"}, ["other content", "quiesce is required"]),
        ({"quiesce": "required"}, ["not known to have been shut down cleanly"]),
        ({"mode": "internal"}, ["vdb is raw", "mode: external"]),
        ({"deadline": "soon"}, ["not a duration", "90s"]),
        ({"deadline": "0"}, ["too short"]),
        ({"deadline": "1e9"}, ["not a duration"]),
        ({"tags": "not json"}, ["not a dictionary"]),
        ({"tags": {"a": {"b": "c"}}}, ["not a text"]),
        ({"tags": {"../a": "b"}}, ["not a safe name"]),
        ({"description": "bell\x07"}, ["cannot be stored"]),
        ({"directory": "/does/not/exist"}, ["not a directory"]),
        ({"directory": "/etc/passwd"}, ["not a directory"]),
        ({"uri": "qemu+ssh://elsewhere/system"}, ["leads to another machine", "delegate_to"]),
        ({"uri": "qemu+tcp://127.0.0.1/system"}, ["leads to another machine"]),
        ({"uri": "nonsense"}, ["leads to another machine"]),
        ({"uri": "qemu:///wrong"}, ["libvirt"]),
    ],
)
def test_it_is_one_sentence_with_what_to_do_and_nothing_changes(guest, task, words, check):
    with unchanged(guest):
        outcome = tasks.run("snapshot", check=check, **{"domains": [guest.name], "name": "new", **task})
    assert_refused(outcome, *words)


def test_a_filesystem_without_room_is_found_before_anything_is_made(guest):
    small = guest.directory.parent / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "none", small], check=True)
    try:
        with unchanged(guest):
            outcome = tasks.run("snapshot", domains=[guest.name], name="new", directory=str(small))
            assert_refused(outcome, str(small), "16.0 MiB free", "Make room")
            assert not list(small.iterdir())
            assert_refused(
                tasks.run("snapshot", domains=[guest.name], name="new", directory=str(small), check=True), str(small)
            )
    finally:
        subprocess.run(["umount", small], check=True)
        small.rmdir()


def test_a_directory_that_qemu_cannot_reach_is_refused(guest, tmp_path):
    closed = tmp_path / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0o700)
    with unchanged(guest):
        outcome = tasks.run("snapshot", domains=[guest.name], name="new", directory=str(closed / "inner"))
    assert_refused(outcome, "cannot reach", str(closed))


def test_a_domain_that_is_off_cannot_be_frozen_and_is_thawed_already(guest):
    with unchanged(guest):
        outcome = tasks.run("fsfreeze", domains=[guest.name], state="frozen")
    assert_refused(outcome, "shut off")
    with unchanged(guest):
        assert not tasks.ok("fsfreeze", domains=[guest.name], state="thawed").changed


@contextlib.contextmanager
def without_the_binding(tmp_path: Path) -> Iterator[None]:
    """No interpreter of this host has libvirt's bindings."""
    broken = tmp_path / "libvirt.py"
    broken.write_text("raise ImportError('No module named libvirt')\n")
    subprocess.run(["mount", "--bind", broken, BINDING], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", BINDING], check=True)


@pytest.mark.parametrize("module", ["snapshot", "snapshot_info", "fsfreeze", "domain_info"])
def test_a_host_without_the_binding_is_told_what_to_install(guest, tmp_path, module):
    options = {"snapshot": {"name": "new"}, "fsfreeze": {"state": "frozen"}}.get(module, {})
    with unchanged(guest), without_the_binding(tmp_path):
        outcome = tasks.run(module, domains=[guest.name], env={"PYTHONDONTWRITEBYTECODE": "1"}, **options)
    assert_refused(outcome, "python3-libvirt")


def test_an_interpreter_without_the_binding_is_exchanged_for_one_that_has_it(guest, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([tasks.PYTHON, "-m", "venv", "--without-pip", bare], check=True)
    outcome = tasks.ad_hoc("domain_info", f"domain={guest.name}", interpreter=str(bare / "bin" / "python3"))
    assert outcome.rc == 0, outcome.stderr
    assert outcome["domain"]["name"] == guest.name


@pytest.mark.parametrize("module", ["snapshot", "snapshot_info"])
def test_a_host_without_libvirtd_is_told_to_start_it(guest, host, module):
    host.stop_libvirtd()
    try:
        outcome = tasks.run(module, domains=[guest.name], **({"name": "new"} if module == "snapshot" else {}))
    finally:
        host.start()
    assert_refused(outcome, "No libvirt daemon answers", "systemctl start libvirtd")


def test_a_change_without_root_is_refused_and_says_how(guest):
    with unchanged(guest):
        for module, options in (("snapshot", {"name": "new"}), ("fsfreeze", {"state": "frozen"})):
            outcome = tasks.run(module, domains=[guest.name], user=65534, **options)
            assert_refused(outcome, "root", "become: true")
