# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest whose profile lets it only read what it was started on: its layers are pulled, merged offline, or not at all.

The host has no AppArmor: the modules are shown the rules that libvirt would have written for this guest. That QEMU is
really denied what they say is tested by ``make test-nested``.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import ways
from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots.proof import alive, in_test_long, unwritable
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import MIB
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

PULLED_AT = ["begin", "mark", "commit", "relink", "verify", "commit#2", "checkpoints", "snapshots", "remove"]
#: What comes between is an offline commit, which test_blockcommit kills at every step.
RESTARTED_AT = ["begin", "shut-off", "start"]
if int(os.environ.get("VMK_SCALE", "1")) > 1:
    RESTARTED_AT.append("shutdown")  # half a minute of waiting for a guest that was not told to go down after all


@pytest.fixture(scope="module")
def guest(make_guest: Callable[..., Guest]) -> Guest:
    disks = (DiskSpec("vda", size=24 * MIB, writer=False), DiskSpec("vdb", size=16 * MIB, writer=False, format="raw"))
    return make_guest(GuestSpec("confined", disks=disks))


class Profile:
    """The rules of the guest as libvirt would write them now."""

    def __init__(self, guest: Guest, path: Path) -> None:
        self.guest = guest
        self.path = path
        self.environment = {"PYTHONPATH": str(tasks.KILLHOOK), "VMK_APPARMOR_RULES": str(path)}

    def written_anew(self) -> dict[str, str]:
        """Deny every layer below the active ones, as at each start of the guest; the environment that shows it."""
        lines = []
        for target in self.guest.images:
            active, *lower = self.guest.chain(target)
            lines.append(f'  "{active}" rwk,')
            lines += [f'  "{layer}" rk,\n  deny "{layer}" w,' for layer in lower]
        self.path.write_text("\n".join(lines) + "\n")
        return self.environment


@pytest.fixture
def profile(guest: Guest, tmp_path: Path) -> Profile:
    return Profile(guest, tmp_path / "rules")


@pytest.fixture(autouse=True)
def flat_and_running(guest: Guest) -> Iterator[None]:
    if not guest.is_running():
        guest.start()
    yield
    tasks.ok("recover_domain", domain=guest.name)
    for one in guest.domain().listAllCheckpoints():
        one.delete()
    for name in ways.snapshots(guest):
        tasks.ok("snapshot", domain=guest.name, name=name, state="absent")
    tasks.ok("blockcommit", domain=guest.name)
    if not guest.is_running():
        guest.start()


def history(guest: Guest, *names: str) -> None:
    """A snapshot of each name; before each the guest writes that name, and at last ``end``."""
    for name in names:
        ways.write(guest, name)
        tasks.ok("snapshot", domain=guest.name, name=name, quiesce="never")
    ways.write(guest, "end")


def digests(paths: list[Path]) -> list[str]:
    """What lies in these files."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def leave_only(guest: Guest) -> None:
    """The images that a pull has left are removed, and the disks' images are those that the guest stands on now."""
    for target, path in guest.active_paths().items():
        if guest.images[target] != path:
            guest.images[target].unlink(missing_ok=True)
            guest.images[target] = path


def test_a_denied_chain_is_pulled_and_its_base_is_not_touched(guest: Guest, profile: Profile) -> None:
    guest.domain().checkpointCreateXML(
        "<domaincheckpoint><name>vmk-12345678-x</name><disks><disk name='vda'/></disks></domaincheckpoint>"
    )
    history(guest, "one", "two")
    bases = list(guest.images.values())
    actives = guest.active_paths()
    env = profile.written_anew()
    before = digests(bases)
    foreseen = tasks.ok("blockcommit", domain=guest.name, env=env, check=True)
    answer = tasks.ok("blockcommit", domain=guest.name, env=env)
    assert digests(bases) == before
    assert [entry["method"] for entry in answer["disks"]] == ["pull", "pull"]
    assert all("AppArmor" in entry["why"] for entry in answer["disks"])
    assert [entry["chain_after"] for entry in foreseen["disks"]] == [entry["chain_after"] for entry in answer["disks"]]
    assert {target: guest.chain(target) for target in guest.images} == {
        target: [path] for target, path in actives.items()
    }
    assert ways.read(guest) == {"end"}
    assert ways.snapshots(guest) == {}
    assert guest.domain().listAllCheckpoints() == []
    assert sum("was left" in warning for warning in answer.warnings) == 2
    assert any("checkpoints" in warning for warning in answer.warnings)
    leave_only(guest)
    ways.assert_whole(guest)
    # The next time the base is an overlay of ours that an earlier pull has made stand on nothing: it goes.
    history(guest, "three")
    answer = tasks.ok("blockcommit", domain=guest.name, env=profile.written_anew())
    assert [entry["method"] for entry in answer["disks"]] == ["pull", "pull"]
    assert answer.warnings == []
    guest.images.update(guest.active_paths())
    ways.assert_whole(guest)
    guest.shutdown()
    guest.start()
    assert ways.read(guest) == {"end"}


def test_removing_the_newest_snapshot_pulls_only_its_layer(guest: Guest, profile: Profile) -> None:
    history(guest, "one", "two")
    chains = {target: guest.chain(target) for target in guest.images}
    answer = tasks.ok("snapshot", domain=guest.name, name="two", state="absent", env=profile.written_anew())
    assert [entry["method"] for entry in answer["snapshot"]["merged"]] == ["pull", "pull"]
    assert {target: guest.chain(target) for target in guest.images} == {
        target: [layers[0], layers[2]] for target, layers in chains.items()
    }
    assert ways.read(guest) == {"end"}
    assert ways.content_of(guest, "one") == {"one"}
    ways.assert_whole(guest)


def test_what_cannot_be_pulled_is_refused_or_merged_while_the_guest_is_off(guest: Guest, profile: Profile) -> None:
    history(guest, "one", "two")
    env = profile.written_anew()
    before = ways.files(guest)
    for refused in (
        tasks.run("blockcommit", domain=guest.name, keep=2, env=env),
        tasks.run("snapshot", domain=guest.name, name="one", state="absent", env=env),
    ):
        assert refused.failed
        assert "AppArmor" in refused.message
        assert "allow_restart" in refused.message
    guest.domain().checkpointCreateXML("<domaincheckpoint><name>other</name></domaincheckpoint>")
    refused = tasks.run("blockcommit", domain=guest.name, env=env)
    assert refused.failed
    assert "other" in refused.message
    guest.domain().checkpointLookupByName("other").delete()
    assert ways.files(guest) == before
    running = guest.domain().ID()
    answer = tasks.ok("blockcommit", domain=guest.name, keep=2, allow_restart=True, env=env)
    assert [entry["method"] for entry in answer["disks"]] == ["offline", "offline"]
    guest.wait_ready()
    assert guest.domain().ID() != running
    assert ways.read(guest) == {"end"}
    assert ways.snapshots(guest) == {"two": None}
    assert ways.content_of(guest, "two") == {"two"}
    ways.assert_whole(guest)


def test_a_cut_that_cannot_be_taken_back_is_kept_as_crash_consistent(
    guest: Guest, profile: Profile, tmp_path: Path
) -> None:
    ways.write(guest, "one")
    killed = tasks.finish(
        tasks.killed_at("cut-done", "snapshot", tmp_path / "steps", domain=guest.name, name="one", quiesce="required")
    )
    assert killed.killed
    env = profile.written_anew()
    found = tasks.ok("recover_domain", domain=guest.name, env=env)["findings"]
    assert any("kept as crash-consistent" in one["action"] for one in found), found
    assert not tasks.ok("recover_domain", domain=guest.name, env=env).changed
    alive(guest)
    ways.write(guest, "end")
    kept = tasks.ok("snapshot_info", domain=guest.name, name="one")["snapshot"]
    assert kept["consistency"] == "crash"
    assert ways.content_of(guest, "one") == {"one"}
    again = tasks.run("snapshot", domain=guest.name, name="one", quiesce="required", env=env)
    assert again.failed
    assert "crash" in again.message
    answer = tasks.ok("snapshot", domain=guest.name, name="one", state="absent", env=env)
    assert {entry["method"] for entry in answer["snapshot"]["merged"]} == {"pull"}
    assert ways.read(guest) == {"end"}
    leave_only(guest)
    ways.assert_whole(guest)


def test_a_pull_killed_at_any_step_is_finished_by_the_same_task(guest: Guest, profile: Profile, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    for step in PULLED_AT:
        guest.domain().checkpointCreateXML("<domaincheckpoint><name>vmk-12345678-x</name></domaincheckpoint>")
        history(guest, "one")
        env = {**profile.written_anew(), **tasks.kill_environment(log, step)}
        log.unlink(missing_ok=True)
        killed = tasks.run("blockcommit", domain=guest.name, env=env)
        assert killed.killed, (step, tasks.steps_in(log))
        assert ways.read(guest) == {"end"}, step
        assert tasks.ok("blockcommit", domain=guest.name, env=profile.written_anew()).changed, step
        assert ways.read(guest) == {"end"}, step
        assert ways.snapshots(guest) == {}, step
        leave_only(guest)
        ways.assert_whole(guest)


def test_a_pull_that_is_finished_once_the_guest_is_off_ends_the_checkpoints_too(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    disk = DiskSpec("vda", size=8 * MIB, fs=None, writer=False)
    off = make_guest(GuestSpec("off", disks=(disk,)), start="no")
    off.domain().createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    off.domain().checkpointCreateXML("<domaincheckpoint><name>vmk-12345678-x</name></domaincheckpoint>")
    tasks.ok("snapshot", domain=off.name, name="one", quiesce="never")
    rules = Profile(off, tmp_path / "rules").written_anew()
    env = {**rules, **tasks.kill_environment(tmp_path / "steps", "commit")}
    assert tasks.run("blockcommit", domain=off.name, env=env).killed
    off.destroy()
    tasks.ok("blockcommit", domain=off.name)
    assert off.domain().listAllCheckpoints() == [], "increments since it would lack what lay in the layer that went"
    leave_only(off)
    ways.assert_whole(off)
    off.cleanup()


def test_a_restart_killed_at_any_step_leaves_a_guest_that_runs_after_the_next_task(
    guest: Guest, profile: Profile, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    for step in RESTARTED_AT:
        history(guest, "one", "two")
        asked = {"domain": guest.name, "keep": 2, "allow_restart": True}
        env = {**profile.written_anew(), **tasks.kill_environment(log, step)}
        log.unlink(missing_ok=True)
        killed = tasks.run("blockcommit", **asked, env=env)
        assert killed.killed, (step, tasks.steps_in(log))
        if step in ("begin", "shutdown"):
            assert guest.is_running()
            found = tasks.ok("recover_domain", domain=guest.name)["findings"]
            assert [one["action"] for one in found] == ["taken back"], "nobody allowed recover_domain to shut it down"
            assert set(ways.snapshots(guest)) == {"one", "two"}
        if step == "shut-off":
            tasks.ok("recover_domain", domain=guest.name)
        else:
            tasks.ok("blockcommit", **asked, env=env | {"VMK_KILL_AT": ""})
        guest.wait_ready()
        assert ways.read(guest) == {"end"}, step
        assert ways.snapshots(guest) == {"two": None}, step
        assert ways.content_of(guest, "two") == {"two"}, step
        tasks.ok("blockcommit", domain=guest.name)
        ways.assert_whole(guest)


def test_a_guest_that_goes_down_late_for_a_commit_is_waited_for_and_the_commit_finished(
    guest: Guest, profile: Profile, tmp_path: Path
) -> None:
    history(guest, "one", "two")
    env = {**profile.written_anew(), **tasks.kill_environment(tmp_path / "steps", "shutdown")}
    assert tasks.run("blockcommit", domain=guest.name, keep=2, allow_restart=True, env=env).killed
    guest.exec("(sleep 3; poweroff -f) >/dev/null 2>&1 &")  # a slow guest, whose power button that run had pressed
    found = tasks.ok("recover_domain", domain=guest.name)["findings"]
    assert [one["action"] for one in found] == ["finished"]
    guest.wait_ready()
    assert ways.read(guest) == {"end"}
    assert ways.snapshots(guest) == {"two": None}
    assert ways.content_of(guest, "two") == {"two"}
    tasks.ok("blockcommit", domain=guest.name)
    ways.assert_whole(guest)


def test_libvirtd_that_goes_away_while_a_guest_is_off_for_a_commit_costs_nothing(
    guest: Guest, profile: Profile, host: TestHost, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    commit = ("blockcommit", {"domain": guest.name, "keep": 2, "allow_restart": True})
    removal = ("snapshot", {"domain": guest.name, "name": "one", "state": "absent", "allow_restart": True})
    # Going down; off, with the first disk committed, or both; about to run again.
    for step, (module, asked) in (("shutdown", commit), ("relink", commit), ("relink#2", removal), ("start", commit)):
        history(guest, "one", "two")
        env = {**profile.written_anew(), **tasks.kill_environment(log, step, "stop")}
        log.unlink(missing_ok=True)
        process = tasks.start(module, **asked, env=env)
        fatal = f"!{step.partition('#')[0]}"
        until(lambda fatal=fatal: fatal in tasks.steps_in(log), "the step")  # type: ignore[misc]
        host.kill_libvirtd()
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(2)  # in which the task finds nobody
        assert process.poll() is None, step
        host.start()
        outcome = tasks.finish(process)
        assert not outcome.failed, (step, outcome.message)
        assert outcome.changed
        merged = outcome["disks"] if module == "blockcommit" else outcome["snapshot"]["merged"]
        assert [entry["method"] for entry in merged] == ["offline", "offline"]
        guest.wait_ready()
        assert ways.read(guest) == {"end"}, step
        assert ways.snapshots(guest) == {"two": None}, step
        assert ways.content_of(guest, "two") == {"two"}, step
        assert not tasks.ok(module, **asked, env=profile.written_anew()).changed, step
        tasks.ok("blockcommit", domain=guest.name)
        ways.assert_whole(guest)


@in_test_long
def test_a_guest_that_was_shut_down_for_a_commit_runs_again_also_where_nothing_can_be_written_any_more(
    guest: Guest, profile: Profile, tmp_path: Path
) -> None:
    history(guest, "one", "two")
    log, asked = tmp_path / "steps", {"domain": guest.name, "keep": 2, "allow_restart": True}
    env = {**profile.written_anew(), **tasks.kill_environment(log, "shutdown", "stop")}
    process = tasks.start("blockcommit", **asked, env=env)
    until(lambda: "!shutdown" in tasks.steps_in(log), "the step")
    with unwritable(Path("/var/lib/vmkeeper.libvirt/journal")):
        os.kill(process.pid, signal.SIGCONT)
        outcome = tasks.finish(process)
        assert outcome.failed
        assert "cannot be written" in outcome.message
        assert guest.is_running()
    guest.wait_ready()
    assert ways.read(guest) == {"end"}
    tasks.ok("blockcommit", **asked, env=profile.written_anew())
    guest.wait_ready()
    assert ways.snapshots(guest) == {"two": None}
    tasks.ok("blockcommit", domain=guest.name)
    ways.assert_whole(guest)
