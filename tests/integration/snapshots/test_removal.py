# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Removing snapshots: its neighbours stay whole, live and offline, with children and with branches."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import ways
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import MIB
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

KILLED_AT = ["begin", "mark", "commit", "relink", "verify", "snapshots", "remove"]


@pytest.fixture(scope="module")
def guest(make_guest: Callable[..., Guest]) -> Guest:
    return make_guest(GuestSpec("removal", disks=(DiskSpec("vda", size=32 * MIB, writer=False),)))


@pytest.fixture
def stopped(make_guest: Callable[..., Guest]) -> Iterator[Guest]:
    guest = make_guest(GuestSpec("gone", disks=(DiskSpec("vda", size=8 * MIB, fs=None, writer=False),)), start="no")
    yield guest
    guest.cleanup()


@pytest.fixture(autouse=True)
def flat_and_running(guest: Guest) -> Iterator[None]:
    if not guest.is_running():
        guest.start()
    yield
    tasks.ok("recover_domain", domain=guest.name)
    for name in ways.snapshots(guest):
        tasks.ok("snapshot", domain=guest.name, name=name, state="absent")
    tasks.ok("blockcommit", domain=guest.name)
    ways.assert_whole(guest)


def take(guest: Guest, *names: str, memory: bool = False) -> None:
    """A snapshot of each name, of a guest that has just written that name."""
    for name in names:
        ways.write(guest, name)
        tasks.ok("snapshot", domain=guest.name, name=name, memory=memory, quiesce="never")


def remove(guest: Guest, name: str) -> tasks.Outcome:
    """Remove one."""
    return tasks.ok("snapshot", domain=guest.name, name=name, state="absent")


@pytest.mark.parametrize("running", [True, False], ids=["live", "offline"])
def test_first_middle_and_last_go_and_the_others_keep_their_content(guest: Guest, running: bool) -> None:
    take(guest, "one", "two", "three", "four")
    ways.write(guest, "end")
    if not running:
        guest.shutdown()
    left = ["one", "two", "three", "four"]
    for name in ("two", "four", "one"):
        left.remove(name)
        foreseen = tasks.ok("snapshot", domain=guest.name, name=name, state="absent", check=True)
        answer = remove(guest, name)
        assert foreseen["snapshot"]["removed"] == answer["snapshot"]["removed"]
        assert set(ways.snapshots(guest)) == set(left)
        for other in left:
            assert ways.content_of(guest, other) == {other}
        assert ways.read(guest) == {"end"}
        ways.assert_whole(guest)
    assert not remove(guest, "one").changed


def test_a_layer_that_two_branches_stand_on_stays_and_the_answer_says_for_whom(guest: Guest) -> None:
    take(guest, "one", memory=True)
    take(guest, "left", memory=True)
    tasks.ok("snapshot", domain=guest.name, name="one", state="reverted")
    guest.wait_ready()
    take(guest, "right")
    ways.write(guest, "end")
    answer = remove(guest, "one")
    kept = answer["snapshot"]["layer_kept_for"]
    assert {reader["name"] for reader in kept[0]["for"]} == {"left", "right", guest.name}
    assert ways.snapshots(guest) == {"left": None, "right": None}
    assert ways.content_of(guest, "left") == {"left"}
    assert ways.content_of(guest, "right") == {"right"}
    assert ways.read(guest) == {"end"}
    ways.assert_whole(guest)
    tasks.ok("snapshot", domain=guest.name, name="left", state="reverted")
    guest.wait_ready()
    assert ways.read(guest) == {"left"}
    ways.assert_whole(guest)


def test_a_snapshot_with_memory_takes_its_memory_along(guest: Guest) -> None:
    take(guest, "one", memory=True)
    assert any(name.endswith(".memory") for name in ways.files(guest))
    remove(guest, "one")
    assert ways.files(guest) == {"vda.qcow2"}


def test_a_removal_killed_at_any_step_is_finished_by_the_same_task(guest: Guest, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    take(guest, *(f"s{number}" for number in range(len(KILLED_AT) + 1)))
    ways.write(guest, "end")
    for number, step in enumerate(KILLED_AT):
        # Alternately from the bottom (a layer between others) and from the top (what the guest writes to).
        names = sorted(ways.snapshots(guest))
        name = names[0] if number % 2 else names[-1]
        killed = tasks.finish(tasks.killed_at(step, "snapshot", log, domain=guest.name, name=name, state="absent"))
        assert killed.killed, (step, tasks.steps_in(log))
        if step == "commit":
            back = tasks.run("snapshot", domain=guest.name, name=name, state="reverted", allow_restart=True, check=True)
            assert back.failed
            there = tasks.run("snapshot", domain=guest.name, name=name, check=True)
            assert there.failed
            assert "removal" in there.message, "it is no snapshot that anybody may rely on"
        assert remove(guest, name).changed, step
        assert name not in ways.snapshots(guest)
        assert ways.read(guest) == {"end"}
        ways.assert_whole(guest)
    for other in ways.snapshots(guest):
        assert ways.content_of(guest, other) == {other}


def test_an_offline_removal_killed_at_any_step_is_finished_by_the_same_task(stopped: Guest, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    for number in range(len(KILLED_AT) + 1):
        ways.write_stopped(stopped, f"s{number}")
        tasks.ok("snapshot", domain=stopped.name, name=f"s{number}")
    ways.write_stopped(stopped, "end")
    for number, step in enumerate(KILLED_AT):
        names = sorted(ways.snapshots(stopped))
        name = names[0] if number % 2 else names[-1]
        killed = tasks.finish(tasks.killed_at(step, "snapshot", log, domain=stopped.name, name=name, state="absent"))
        assert killed.killed, (step, tasks.steps_in(log))
        assert remove(stopped, name).changed, step
        assert name not in ways.snapshots(stopped)
        for other in ways.snapshots(stopped):
            assert ways.read_stopped(ways.bases(stopped, other).values()) == {other}, (step, name)
        assert ways.read_stopped(stopped.active_paths().values()) == {"end"}
        ways.assert_whole(stopped)


@pytest.mark.parametrize("state", ["absent", "reverted"])
def test_what_was_begun_on_a_domain_that_is_undefined_since_is_given_up_and_its_files_stay(
    stopped: Guest, tmp_path: Path, state: str
) -> None:
    for name in ("one", "two"):
        ways.write_stopped(stopped, name)
        tasks.ok("snapshot", domain=stopped.name, name=name)
    asked = {"domain": stopped.name, "name": "one", "state": state}
    assert tasks.finish(
        tasks.killed_at("mark" if state == "absent" else "stop", "snapshot", tmp_path / "log", **asked)
    ).killed
    before, definition = ways.files(stopped), stopped.xml_text(inactive=True)
    stopped.domain().undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    (found,) = tasks.ok("recover_domain")["findings"]
    assert (found["domain"], found["settled"]) == (stopped.name, True)
    assert "given up" in found["action"]
    assert ways.files(stopped) == before
    assert tasks.ok("recover_domain")["findings"] == []
    stopped.connection().defineXML(definition)
    assert ways.read_stopped(stopped.active_paths().values()) == {"two"}


def test_a_worker_removes_it_while_the_task_has_answered_and_can_be_cancelled(guest: Guest) -> None:
    take(guest, "one")
    guest.exec("dd if=/dev/urandom of=/disk/vda/load bs=1M count=12; sync", timeout=120)
    ways.write(guest, "end")
    before = guest.chain("vda")
    asked = {"domain": guest.name, "name": "one", "state": "absent", "bandwidth": "1M"}
    assert tasks.run("snapshot", domain=guest.name, name="two", wait=False).failed, "that would be ignored"
    late = tasks.run("snapshot", **asked, wait_timeout="1s")
    assert late.failed
    assert late["job"]["type"] == "active-commit"
    assert tasks.ok("domain_job", domain=guest.name, state="absent").changed
    assert guest.chain("vda") == before
    assert tasks.ok("snapshot", **asked, wait=False)["job"]["state"] == "pending"
    until(lambda: tasks.ok("domain_job", domain=guest.name)["block_jobs"], "the job of the worker")
    assert tasks.ok("domain_job", domain=guest.name, bandwidth="0").changed
    done = tasks.ok("domain_job", domain=guest.name, state="finished")["job"]
    assert done["state"] == "finished"
    assert [one["name"] for one in done["result"]["snapshots"]] == ["one"]
    assert guest.chain("vda") == [guest.images["vda"]]
    assert ways.read(guest) == {"end"}
    for wait in (True, False):
        assert not tasks.ok("snapshot", **asked, wait=wait).changed


def test_a_foreign_block_job_is_refused_and_the_commit_of_a_run_that_was_lost_is_taken_up(guest: Guest) -> None:
    take(guest, "one")
    guest.exec("dd if=/dev/urandom of=/disk/vda/load bs=1M count=2; sync", timeout=120)
    ways.write(guest, "end")
    (overlay, base), copy = guest.chain("vda"), guest.directory / "copy"
    domain, slow = guest.domain(), {"bandwidth": 1}
    xml = f"<disk type='file'><driver type='raw'/><source file='{copy}'/></disk>"
    for begin in (
        lambda: domain.blockCopy("vda", xml, slow, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB),
        lambda: domain.blockPull("vda", 1, libvirt.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES),
    ):
        begin()
        refused = tasks.run("snapshot", domain=guest.name, name="one", state="absent")
        assert refused.answer["error"]["kind"] == "busy", refused.message
        assert tasks.run("blockcommit", domain=guest.name).answer["error"]["kind"] == "busy"
        domain.blockJobAbort("vda", 0)
        copy.unlink(missing_ok=True)
        assert guest.chain("vda") == [overlay, base]
        tasks.ok("snapshot", domain=guest.name, name="one", state="reverted", allow_restart=True, check=True)
    # Without a journal, as after a libvirtd that was restarted meanwhile.
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    domain.blockCommit("vda", str(base), None, 4 * MIB, flags)
    answer = remove(guest, "one")
    assert answer["snapshot"]["layer_kept_for"] == []
    assert guest.chain("vda") == [base]
    assert ways.read(guest) == {"end"}


def test_a_commit_that_ends_just_as_it_is_cancelled_leaves_no_layer_behind(guest: Guest, tmp_path: Path) -> None:
    take(guest, "one")
    ways.write(guest, "end")
    asked = {"domain": guest.name, "name": "one", "state": "absent"}
    assert tasks.finish(tasks.killed_at("commit", "snapshot", tmp_path / "log", **asked)).killed
    domain, base = guest.domain(), guest.images["vda"]
    domain.blockCommit("vda", str(base), None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    until(lambda: "ready='yes'" in domain.XMLDesc(), "the commit being ready")
    domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    until(lambda: guest.chain("vda") == [base], "the pivot")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import journal\n"
        "from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import merging\n"
        "print(merging.abandon('qemu:///system', journal.unfinished(sys.argv[2])))\n"
    )
    subprocess.run([tasks.PYTHON, "-c", script, str(tasks.COLLECTIONS), domain.UUIDString()], check=True)
    assert ways.files(guest) == {base.name}
    remove(guest, "one")
    assert ways.snapshots(guest) == {}
    assert ways.read(guest) == {"end"}
    ways.assert_whole(guest)


def test_an_overlay_of_a_detached_disk_is_never_deleted(make_guest: Callable[..., Guest]) -> None:
    two = make_guest(
        GuestSpec(
            "detached",
            disks=(DiskSpec("vda", size=16 * MIB, writer=False), DiskSpec("vdb", size=16 * MIB, writer=False)),
        ),
        start="no",
    )
    tasks.ok("snapshot", domain=two.name, name="one")
    overlay = two.active_paths()["vdb"]
    xml = two.xml_text(inactive=True)
    start = xml.rindex("<disk ", 0, xml.index("<target dev='vdb'"))
    two.connection().defineXML(xml[:start] + xml[xml.index("</disk>", start) + len("</disk>") :])
    answer = tasks.ok("snapshot", domain=two.name, name="one", state="absent")
    kept = answer["snapshot"]["layer_kept_for"]
    assert [(one["disk"], one["for"][0]["kind"], one["for"][0]["name"]) for one in kept] == [
        ("vdb", "file", str(overlay))
    ]
    assert ways.chain(overlay) == [overlay, two.images["vdb"]]
    assert ways.chain(two.active_paths()["vda"]) == [two.images["vda"]]
    two.cleanup()
