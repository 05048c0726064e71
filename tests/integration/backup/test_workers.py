# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Backups and restores that a worker does: seen, waited for, limited, cancelled, killed; and what they keep to themselves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lab import evidence
from lab.ansible import run_module_process
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task

PASSPHRASE = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    """Its disk vdc holds more than is copied before a limit gets hold of it, however fast the host's disks are."""
    disks = (
        DiskSpec("vda", size=32 * MIB),
        DiskSpec("vdb", size=192 * MIB, fs=None, writer=False),
        DiskSpec("vdc", size=768 * MIB, fs=None, writer=False),
    )
    made: Guest = module_guest_factory(GuestSpec("worked", disks=disks), start=False)
    for target, size in (("vdb", 192), ("vdc", 768)):
        points.run("qemu-io", "-f", "qcow2", "-c", f"write -P 0x41 0 {size}M", made.images[target])
    made.start()
    return made


@pytest.fixture(scope="module")
def stopped(module_guest_factory) -> Guest:
    disk = DiskSpec("vda", size=8 * MIB, fs=None, writer=False)
    made: Guest = module_guest_factory(GuestSpec("worked-off", disks=(disk,)), start=False)
    return made


def made_in(repository: Path) -> list[str]:
    """The points that exist."""
    return sorted(path.parent.name for path in repository.glob("*/[0-9]*/manifest.json"))


def shown(name: str) -> dict[str, Any]:
    """What domain_job says of a domain."""
    found: dict[str, Any] = dict(ok("domain_job", domain=name))
    return found


def backup_jobs(name: str) -> list[dict[str, Any]]:
    """The disks that a backup job copies."""
    return [job for job in shown(name)["block_jobs"] if job["type"] == "backup"]


def started_by(answer: Any) -> int:
    """The process of a job."""
    state = points._json(points.WORKERS / answer["job"]["id"] / "state.json")
    return int(state["process"][0])


def test_a_backup_goes_on_without_its_task_and_can_be_limited_and_waited_for(guest: Guest, make_repository) -> None:
    repository = make_repository()
    slowly = {"domain": guest.name, "repository": str(repository), "quiesce": "required", "bandwidth": "256K"}
    late = task("backup", **slowly, wait_timeout="5s")
    assert late["failed"]
    assert late["error"]["kind"] == "timeout", late["msg"]
    assert late["job"]["state"] == "running"
    assert guest.frozen_filesystems() == []
    until(lambda: {job["bandwidth"] for job in backup_jobs(guest.name)} == {256 << 10}, "the limit")
    again = ok("backup", **slowly, wait=False)
    assert (again["job"]["id"], again["job"]["state"]) == (late["job"]["id"], "pending"), (
        "the same task, the same worker"
    )
    assert made_in(repository) == []
    expected = points.device_hash(guest, "vdb")
    points.fill(guest, "vdb", "later", 2500, 10)  # what comes after the instant, in what is not copied yet
    assert ok("domain_job", domain=guest.name, bandwidth="0")["changed"]
    joined = ok("backup", **slowly)
    assert made_in(repository) == [joined["restore_point"]["id"]]
    assert joined["restore_point"]["consistency"] == "filesystem"
    assert points.content(directory_of(repository, joined["restore_point"]) / "vdb.qcow2") == expected
    done = shown(guest.name)["job"]
    assert (done["operation"], done["state"]) == ("backup", "finished")
    assert done["result"]["restore_points"] == [joined["restore_point"]]
    points.assert_nothing_left(guest, repository)
    unchanged = ok("backup", **slowly, min_age="1h", wait=False)
    assert (unchanged["changed"], unchanged["restore_point"]["id"]) == (False, joined["restore_point"]["id"])


def test_a_cancelled_backup_leaves_nothing_of_any_domain_of_its_group(
    guest: Guest, stopped: Guest, make_repository
) -> None:
    repository = make_repository()
    before = point(guest, repository)
    checkpoints = points.checkpoints(guest)
    points.fill(guest, "vdb", "changed", 100, 200)
    asked = {"domains": [guest.name, stopped.name], "repository": str(repository), "bandwidth": "256K"}
    ok("backup", **asked, type="full", wait=False)
    until(lambda: backup_jobs(guest.name), "the job of the worker")
    assert ok("domain_job", domain=stopped.name, check=True, state="absent")["changed"]
    assert ok("domain_job", domain=guest.name, state="absent")["changed"]
    assert not ok("domain_job", domain=guest.name, state="absent")["changed"]
    points.assert_nothing_left(guest, repository)
    assert made_in(repository) == [before["id"]]
    assert points.checkpoints(guest) == checkpoints
    assert shown(stopped.name)["job"]["state"] == "cancelled"
    expected = points.device_hash(guest, "vdb")
    again = point(guest, repository)
    assert again["type"] == "incremental", again["reason"]
    assert points.content(directory_of(repository, again) / "vdb.qcow2") == expected
    # A task that waits sees its job end, and leaves everything in order itself.
    waiting = run_module_process("backup", **asked, type="full")
    until(lambda: backup_jobs(guest.name) or not waiting.running(), "the job of the task")
    assert ok("domain_job", domain=guest.name, state="absent")["changed"]
    assert waiting.result()["failed"]
    points.assert_nothing_left(guest, repository)
    assert made_in(repository) == [before["id"], again["id"]]


def test_a_killed_worker_is_made_up_for_by_the_same_task(guest: Guest, make_repository) -> None:
    repository = make_repository()
    asked = {"domain": guest.name, "repository": str(repository)}
    begun = ok("backup", **asked, bandwidth="256K", wait=False)
    until(lambda: backup_jobs(guest.name), "the job of the worker")
    os.kill(started_by(begun), signal.SIGKILL)
    until(lambda: shown(guest.name)["job"]["state"] == "interrupted", "its death being seen")
    failed = task("domain_job", domain=guest.name, state="finished")
    assert failed["failed"]
    assert "Run its task again" in failed["msg"]
    ok("backup", **asked, wait=False)
    done = ok("domain_job", domain=guest.name, state="finished")["job"]["result"]
    assert made_in(repository) == [done["restore_points"][0]["id"]]
    points.assert_nothing_left(guest, repository)
    ok("backup_verify", repository=str(repository), id=made_in(repository)[0])


def test_a_worker_that_never_came_up_keeps_no_backup_from_being_taken(
    stopped: Guest, make_repository, tmp_path: Path
) -> None:
    """The host loses power between the ticket of a worker and the worker."""
    repository = make_repository()
    asked = {"domain": stopped.name, "repository": str(repository), "wait": False}
    killed = run_module_process("backup", **asked, env=points.killed_at("launch-worker", tmp_path / "steps"))
    assert killed.wait() == -signal.SIGKILL
    lost = shown(stopped.name)["job"]
    assert lost["state"] == "pending", "a process that was started just then might still come up"
    ticket = points.WORKERS / lost["id"] / "ticket.json"
    ticket.write_text(json.dumps({**points._json(ticket), "boot": "the one before"}))
    assert shown(stopped.name)["job"]["state"] == "interrupted"
    failed = task("domain_job", domain=stopped.name, state="finished")
    assert failed["failed"]
    assert "Run its task again" in failed["msg"]
    assert not ok("domain_job", domain=stopped.name, state="absent")["changed"]
    assert ok("backup", **asked)["job"]["id"] != lost["id"]
    done = ok("domain_job", domain=stopped.name, state="finished")["job"]["result"]
    assert made_in(repository) == [done["restore_points"][0]["id"]]
    assert not ticket.parent.exists()


def test_a_worker_is_given_the_passphrase_and_keeps_it_nowhere(
    stopped: Guest, make_repository, directory: Path
) -> None:
    repository = make_repository()
    secret = {"passphrase": PASSPHRASE}
    ok("backup", domain=stopped.name, repository=str(repository), encryption=secret, wait=False)
    assert_nowhere(PASSPHRASE)
    made = ok("domain_job", domain=stopped.name, state="finished")["job"]["result"]["restore_points"][0]
    ok("backup_verify", repository=str(repository), id=made["id"], **secret)
    asked = {"repository": str(repository), "id": made["id"], "domain": "lab-worked-r", "directory": str(directory)}
    wrong = task("restore", **asked, passphrase="not-the-right-one", wait=False)
    assert wrong["failed"]
    ok("restore", **asked, **secret, wait=False)
    assert_nowhere(PASSPHRASE)
    done = ok("domain_job", domain="lab-worked-r", state="finished")["job"]["result"]
    assert done["domain"]["name"] == "lab-worked-r"
    assert_nowhere(PASSPHRASE)
    restored = directory / "lab-worked-r.vda.qcow2"
    assert points.content(restored) == points.content(stopped.images["vda"])
    points.forget_domain(stopped, "lab-worked-r")


def assert_nowhere(passphrase: str) -> None:
    """No file of ours holds it, and no process was told it by its command line or environment."""
    files = [path for path in Path("/var/lib/vmkeeper.libvirt").rglob("*") if path.is_file()]
    assert any(path.name == "ticket.json" for path in files)
    for path in [*files, *Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]:
        with contextlib.suppress(OSError):
            if path.name in ("cmdline", "environ") and int(path.parent.name) == os.getpid():
                continue
            assert passphrase.encode() not in path.read_bytes(), path


def test_a_restore_goes_on_without_its_task_and_leaves_nothing_when_it_is_cancelled(
    guest: Guest, make_repository, directory: Path
) -> None:
    repository = make_repository()
    made = point(guest, repository)
    before = evidence.host_state(guest.connection(), [directory])
    asked = {"repository": str(repository), "id": made["id"], "domain": "lab-worked-r", "directory": str(directory)}
    slowly = {**asked, "bandwidth": "256K"}
    part = directory / "lab-worked-r.vdb.qcow2.part"
    begun = ok("restore", **slowly, wait=False)
    until(part.exists, "the copy")
    assert shown("lab-worked-r")["job"]["operation"] == "restore", "it is found before it is defined"
    assert ok("restore", **slowly, wait=False)["job"]["id"] == begun["job"]["id"]
    assert ok("domain_job", domain="lab-worked-r", state="absent")["changed"]
    assert before.differences(evidence.host_state(guest.connection(), [directory])) == []
    assert list(points.JOURNALS.glob("*")) == []

    begun = ok("restore", **slowly, wait=False)
    until(part.exists, "the copy")
    os.kill(started_by(begun), signal.SIGKILL)
    until(lambda: shown("lab-worked-r")["job"]["state"] == "interrupted", "its death being seen")
    done = ok("restore", **asked, wait_timeout="10m")
    assert [one["target"] for one in done["restored"]] == ["vda", "vdb", "vdc"]
    assert sorted(path.name for path in directory.iterdir()) == [f"lab-worked-r.vd{one}.qcow2" for one in "abc"]
    expected = points.content(directory_of(repository, made) / "vdb.qcow2")
    assert points.content(directory / "lab-worked-r.vdb.qcow2") == expected
    assert list(points.JOURNALS.glob("*")) == []
    refused = task("restore", **asked, wait=False)
    assert refused["failed"]
    assert "There is a domain" in refused["msg"], "what can be refused is refused at once"
    points.forget_domain(guest, "lab-worked-r")
