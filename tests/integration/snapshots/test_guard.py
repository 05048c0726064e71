# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""No guest stays frozen or paused, whoever dies and whatever its agent does; and the same task then finishes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import libvirt
import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import proof
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks

GUARDS = Path("/run/vmkeeper.libvirt/guards")
JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")

#: From the guard's arming to the end of the thaw; the "held" step carries the domain's UUID.
WINDOW = ("arm", "armed", "freeze", "frozen", "cut", "cut-done", "thaw", "held", "thawed")
GROUP_WINDOW = ("suspend", "suspended", "cut-done", "resume")
OUTSIDE = ("begin", "overlays", "label")

#: The guest's flushes need not wait for this machine's disk: no test here pulls the plug on the page cache.
CACHE = "unsafe"

_names = (f"s{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def guest(make_guest) -> Guest:
    return make_guest(
        GuestSpec(
            "guard",
            disks=(
                DiskSpec("vda", size=64 * MIB, cache=CACHE),
                DiskSpec("vdb", size=64 * MIB, cache=CACHE, format="raw"),
            ),
        )
    )


@pytest.fixture(scope="module")
def other(make_guest, guest) -> Guest:
    return make_guest(GuestSpec("guard2", disks=(DiskSpec("vda", size=64 * MIB, cache=CACHE),)))


@pytest.fixture(scope="module")
def third(make_guest, other) -> Guest:
    return make_guest(GuestSpec("guard3", disks=(DiskSpec("vda", size=64 * MIB, cache=CACHE),)))


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "steps"


def at(guest: Guest, step: str) -> str:
    return f"held:{guest.domain().UUIDString()}" if step == "held" else step


def wait_for_step(log: Path, step: str) -> None:
    until(lambda: f"!{step}" in tasks.steps_in(log), f"the module stopping at {step}")


def assert_quiet(guest: Guest) -> None:
    """Nothing of a task is left on the host: no guard, no journal."""
    until(lambda: not list(GUARDS.glob("*.json")), "the guard going home", 30)
    assert not list(JOURNAL.glob("*.json"))
    assert tasks.ok("domain_info", domains=[guest.name])["domain"]["unfinished"] is None


def assert_consistent(snapshot: dict) -> None:
    """The content of a quiesced snapshot, by what the guest wrote and what e2fsck says."""
    assert snapshot["consistency"] == "filesystem"
    ends = [proof.clean(disk["base"]).last.tick for disk in snapshot["disks"]]
    # The agent freezes one filesystem after the other; test_consistency.py holds it to two writes.
    assert (max(ends) - min(ends)) * 20 <= 40 + (snapshot["frozen_ms"] or 1000)


# --- the steps that there are ------------------------------------------------------------------------


def test_the_kill_tests_below_cover_every_step_of_a_task(guest, other, log):
    tasks.ok("snapshot", domains=[guest.name], name=next(_names), env=tasks.kill_environment(log))
    steps = [step.partition(":")[0] for step in tasks.steps_in(log)]
    assert sorted(steps) == sorted((*WINDOW, *OUTSIDE))
    tasks.ok("snapshot", domains=[guest.name, other.name], name=next(_names), env=tasks.kill_environment(log))
    more = {step.partition(":")[0].partition("#")[0] for step in tasks.steps_in(log)} - set(steps)
    assert more <= set(GROUP_WINDOW)
    assert_quiet(guest)


@pytest.mark.parametrize("step", [*OUTSIDE, *WINDOW])
def test_a_task_killed_at_any_step_leaves_a_running_guest_and_finishes_when_run_again(guest, log, step):
    name = next(_names)
    task = {"domains": [guest.name], "name": name, "quiesce": "required", "tags": {"step": step}, "deadline": "90s"}
    outcome = tasks.finish(tasks.killed_at(at(guest, step), "snapshot", log, **task))
    assert outcome.killed
    assert tasks.steps_in(log)[-1] == f"!{at(guest, step)}"
    # Long before the deadline: the guard sees that the task is dead.
    proof.alive(guest, timeout=45)
    assert not guest.frozen_filesystems()
    again = tasks.ok("snapshot", **task)
    assert again["snapshot"]["tags"] == {"step": step}
    assert_consistent(again["snapshot"])
    assert_quiet(guest)
    assert not tasks.ok("snapshot", **task).changed
    assert len([path for path in guest.directory.iterdir() if f".{name}." in path.name]) == len(guest.spec.disks)
    shorten(guest)


@pytest.mark.parametrize("step", GROUP_WINDOW)
def test_a_group_killed_while_its_guests_are_paused_is_resumed_and_finishes(guest, other, log, step):
    task = {"domains": [guest.name, other.name], "name": next(_names), "quiesce": "required", "deadline": "90s"}
    assert tasks.finish(tasks.killed_at(step, "snapshot", log, **task)).killed
    assert tasks.steps_in(log)[-1] == f"!{step}"
    proof.alive(guest, timeout=45)
    proof.alive(other, timeout=45)
    again = tasks.ok("snapshot", **task)
    for snapshot in again["snapshots"]:
        assert_consistent(snapshot)
    assert_quiet(guest)
    shorten(guest)


def shorten(guest: Guest) -> None:
    """Merge a chain that has grown long, by libvirt alone, and forget its snapshots."""
    if len(guest.chain("vda")) < 9:
        return
    domain = guest.domain()
    merged = [path for disk in guest.spec.disks for path in guest.chain(disk.target)[:-1]]
    for disk in guest.spec.disks:
        domain.blockCommit(disk.target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)

        def pivoted(target: str = disk.target) -> bool:
            with contextlib.suppress(libvirt.libvirtError):
                domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            return len(guest.chain(target)) == 1

        until(pivoted, f"{disk.target} being merged")
    for snapshot in domain.listAllSnapshots():
        snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    for path in merged:
        path.unlink()  # they would count as readers of the base


@pytest.mark.parametrize("step", ["shut-off", "start"])
def test_a_guest_that_was_shut_down_for_its_snapshot_runs_again_whatever_was_killed(other, log, step):
    task = {"domains": [other.name], "name": next(_names), "quiesce": "shutdown"}
    assert tasks.finish(tasks.killed_at(step, "snapshot", log, **task)).killed
    assert tasks.steps_in(log)[-1] == f"!{step}"
    assert not other.is_running()
    again = tasks.ok("snapshot", **task)
    assert again["snapshot"]["consistency"] == "offline"
    proof.clean(again["snapshot"]["disks"][0]["base"])
    assert other.is_running()
    other.wait_ready()
    assert_quiet(other)


def test_a_guest_that_goes_down_late_for_a_run_that_has_ended_is_waited_for_and_started_again(other, log):
    task = {"domains": [other.name], "name": next(_names), "quiesce": "shutdown"}
    assert tasks.finish(tasks.killed_at("shutdown", "snapshot", log, **task)).killed
    ran_as = other.domain().ID()
    other.exec("(sleep 3; poweroff -f) >/dev/null 2>&1 &")  # a slow guest, whose power button that run had pressed
    assert tasks.ok("recover_domain", domain=other.name).changed
    assert other.is_running()
    assert other.domain().ID() != ran_as, "it went down, and nobody but recover_domain can have started it"
    other.wait_ready()
    assert task["name"] not in snapshot_names(other)
    assert_quiet(other)


def test_a_guest_that_was_shut_down_runs_again_also_where_nothing_can_be_written_any_more(other, log):
    task = {"domains": [other.name], "name": next(_names), "quiesce": "shutdown"}
    process = tasks.killed_at("shutdown", "snapshot", log, how="stop", **task)
    wait_for_step(log, "shutdown")
    with proof.unwritable(JOURNAL):
        os.kill(process.pid, signal.SIGCONT)
        outcome = tasks.finish(process)
        assert outcome.failed
        assert "cannot be written" in outcome.message
        assert other.is_running()
    other.wait_ready()
    assert tasks.ok("snapshot", **task)["snapshot"]["consistency"] == "offline"
    other.wait_ready()
    assert_quiet(other)


@proof.in_test_long
def test_a_guest_that_was_shut_down_runs_again_also_where_its_snapshot_cannot_be_labelled(other, log):
    task = {"domains": [other.name], "name": next(_names), "quiesce": "shutdown"}
    process = tasks.killed_at("label", "snapshot", log, how="stop", **task)
    wait_for_step(log, "label")
    assert not other.is_running()
    other.domain().snapshotLookupByName(task["name"]).delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    os.kill(process.pid, signal.SIGCONT)
    assert tasks.finish(process).failed
    assert other.is_running()
    other.wait_ready()
    assert tasks.ok("snapshot", **task)["snapshot"]["consistency"] == "offline"
    other.wait_ready()
    assert_quiet(other)


# --- the deadline, and libvirtd in the window --------------------------------------------------------


@pytest.mark.parametrize(("quiesce", "level"), [("required", None), ("auto", "crash")])
def test_a_task_that_hangs_in_the_window_loses_its_freeze_at_the_deadline_and_says_so(guest, log, quiesce, level):
    task = {"domains": [guest.name], "name": next(_names), "quiesce": quiesce, "deadline": "4s"}
    began = time.monotonic()
    process = tasks.killed_at("frozen", "snapshot", log, how="stop", **task)
    wait_for_step(log, "frozen")
    proof.alive(guest, timeout=30)
    os.kill(process.pid, signal.SIGCONT)
    outcome = tasks.finish(process, began)
    if level is None:
        assert outcome.failed
        assert "did not stay frozen" in outcome.message
        assert guest.domain().listAllSnapshots() == [] or task["name"] not in snapshot_names(guest)
    else:
        assert outcome["snapshot"]["consistency"] == level
        assert "did not stay frozen" in " ".join(outcome.warnings)
    proof.alive(guest)
    assert_quiet(guest)


def snapshot_names(guest: Guest) -> list[str]:
    return [snapshot.getName() for snapshot in guest.domain().listAllSnapshots()]


@pytest.mark.parametrize("step", ["frozen", "cut-done"])
@pytest.mark.parametrize("how", ["restart", "kill"])
def test_libvirtd_may_be_restarted_or_killed_in_the_window(guest, host, log, step, how):
    task = {"domains": [guest.name], "name": next(_names), "quiesce": "required", "deadline": "60s"}
    process = tasks.killed_at(step, "snapshot", log, how="stop", **task)
    wait_for_step(log, step)
    host.restart_libvirtd() if how == "restart" else (host.kill_libvirtd(), host.start())
    os.kill(process.pid, signal.SIGCONT)
    tasks.finish(process)
    proof.alive(guest, timeout=90)
    again = tasks.ok("snapshot", **task)
    assert_consistent(again["snapshot"])
    assert_quiet(guest)
    shorten(guest)


def test_the_guard_waits_for_a_libvirtd_that_is_away_and_thaws_when_it_is_back(guest, host, log):
    task = {"domains": [guest.name], "name": next(_names), "deadline": "60s"}
    process = tasks.killed_at("frozen", "snapshot", log, how="stop", **task)
    wait_for_step(log, "frozen")
    host.kill_libvirtd()
    os.kill(process.pid, signal.SIGKILL)
    tasks.finish(process)
    time.sleep(2)  # so long that the guard has met the closed door: nothing to poll for, that is the point
    host.start()
    proof.alive(guest, timeout=60)
    assert tasks.ok("snapshot", **task)["snapshot"]["consistency"] == "filesystem"
    assert_quiet(guest)


class Monitor:
    """QEMU's own monitor, while no libvirtd holds it."""

    def __init__(self, guest: Guest) -> None:
        path = next(Path("/var/lib/libvirt/qemu").glob(f"domain-*-{guest.name}/monitor.sock"))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rw")
        self._stream.readline()
        self("qmp_capabilities")

    def __call__(self, execute: str, **arguments: object) -> object:
        self._stream.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
        self._stream.flush()
        while True:
            answer = json.loads(self._stream.readline())
            if "return" in answer or "error" in answer:
                assert "return" in answer, answer
                return answer["return"]

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


def test_overlays_that_qemu_writes_and_libvirt_does_not_know_are_never_deleted(guest, host, log):
    """libvirtd dies after QEMU switched layers and before it wrote that down."""
    shorten(guest)
    name = next(_names)
    task = {"domains": [guest.name], "name": name, "deadline": "60s"}
    process = tasks.killed_at("cut", "snapshot", log, how="stop", **task)
    wait_for_step(log, "cut")
    host.kill_libvirtd()
    os.kill(process.pid, signal.SIGKILL)
    tasks.finish(process)
    operation = json.loads(next(JOURNAL.glob("*.json")).read_text())
    overlays = next(iter(operation["plan"]["domains"].values()))["overlays"]
    # What libvirtd would have asked of QEMU before it died.
    monitor = Monitor(guest)
    actions = []
    for overlay in overlays:
        drive = next(
            block["inserted"]["node-name"]
            for block in monitor("query-block")
            if block.get("inserted", {}).get("file") == overlay["base"]
        )
        node = f"lost-{overlay['target']}"
        monitor(
            "blockdev-add",
            **{
                "node-name": node,
                "driver": "qcow2",
                "backing": None,
                "file": {"driver": "file", "filename": overlay["path"]},
            },
        )
        actions.append({"type": "blockdev-snapshot", "data": {"node": drive, "overlay": node}})
    monitor("transaction", actions=actions)
    monitor.close()
    host.start()
    proof.alive(guest, timeout=60)

    refused = tasks.run("snapshot", **task)
    assert refused.failed
    assert overlays[0]["path"] in refused.message
    assert "Shut the guest down" in refused.message
    assert all(Path(overlay["path"]).exists() for overlay in overlays)
    proof.alive(guest)

    guest.write_file("/disk/vda/precious", b"written where libvirt does not look")
    counts = {disk.target: guest.gaps(disk.target).count for disk in guest.spec.disks}
    guest.shutdown()
    done = tasks.ok("snapshot", **task)
    assert done["snapshot"]["consistency"] == "offline"
    for disk in done["snapshot"]["disks"]:
        found = proof.whole(evidence.writer_log(Path(disk["base"])))
        assert found.last.count >= counts[disk["target"]]
    assert (
        evidence.read_file(Path(done["snapshot"]["disks"][0]["base"]), "/precious")
        == b"written where libvirt does not look"
    )
    guest.start()
    proof.alive(guest)


# --- agents that misbehave ---------------------------------------------------------------------------


# What costs time here is waiting for limits to pass, and one guest's wait is nothing to another: each of three guests takes its
# share of the agents, at the same time. A test below waits for the end of its own, and tells what became of it.


def never_makes_sense(guest: Guest, mode: str) -> None:
    required = tasks.run("snapshot", domains=[guest.name], name="never", quiesce="required", deadline="10s")
    assert required.failed
    assert "Nothing was changed" in required.message
    automatic = tasks.ok("snapshot", domains=[guest.name], name=next(_names), quiesce="auto", deadline="10s")
    assert automatic["snapshot"]["consistency"] == "crash"
    assert automatic["snapshot"]["frozen_ms"] is None
    assert any("crash-consistent" in warning for warning in automatic.warnings)
    proof.alive(guest)


def is_slow_or_clumsy(guest: Guest, mode: str) -> None:
    done = tasks.ok("snapshot", domains=[guest.name], name=next(_names), quiesce="required", deadline="30s")
    assert_consistent(done["snapshot"])
    proof.alive(guest)


def does_not_freeze_or_not_answer(guest: Guest, mode: str) -> None:
    """hang-freeze froze nothing, the others did; libvirt's limit of 6 s (of the 10) ends the call."""
    began = time.monotonic()
    outcome = tasks.run("snapshot", domains=[guest.name], name="never", quiesce="required", deadline="10s")
    assert outcome.failed
    assert outcome.seconds < 60
    assert "frozen" in outcome.message
    proof.alive(guest, timeout=max(1.0, began + 45 - time.monotonic()))
    assert "never" not in snapshot_names(guest)
    shorten(guest)


def freezes_and_dies(guest: Guest, mode: str) -> None:
    outcome = tasks.run("snapshot", domains=[guest.name], name="never", quiesce="required", deadline="8s")
    assert outcome.failed
    assert "the guard on this host goes on" in outcome.message
    assert guest.frozen_filesystems()
    # The guest's own watchdog, or its admin, restarts the agent; nobody thaws by hand.
    guest.exec("killall -9 labagent")
    until(lambda: not guest.agent_connected(), "the dead agent disconnecting")
    guest.exec(f"setsid labagent {proof.PORT} normal >/dev/null 2>&1 </dev/null &")
    proof.alive(guest, timeout=60)


#: Agent -> what is done with it. The order is that of each guest's share.
FIRST_SHARE = {
    "hang-freeze": does_not_freeze_or_not_answer,
    "hang": never_makes_sense,
    "late-all:1": is_slow_or_clumsy,
}
SECOND_SHARE = {
    "freeze-then-dead": freezes_and_dies,
    "late:12": does_not_freeze_or_not_answer,
    "freeze-no-reply": does_not_freeze_or_not_answer,
    "thaw-fails:2": is_slow_or_clumsy,
}
THIRD_SHARE = {
    "garbage": never_makes_sense,
    "huge": never_makes_sense,
    "late:3": is_slow_or_clumsy,
    "freeze-fails": does_not_freeze_or_not_answer,
}


def has_guard(guest: Guest) -> bool:
    """Whether a guard still cares for this guest."""
    uuid = guest.domain().UUIDString()
    for ticket in GUARDS.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            if uuid in ticket.read_text():
                return True
    return False


@pytest.fixture(scope="module")
def trials(guest, other, third) -> Iterator[dict[str, Future[None]]]:
    """The trials of all agents, begun."""

    def under(one: Guest, mode: str, trial: Callable[[Guest, str], None]) -> None:
        with proof.agent(one, mode):
            trial(one, mode)
        until(lambda: not has_guard(one), f"the guard of {one.name} going home after {mode}", 60)

    shares = ((guest, FIRST_SHARE), (other, SECOND_SHARE), (third, THIRD_SHARE))
    with contextlib.ExitStack() as stack:
        begun = {}
        for one, share in shares:
            lane = stack.enter_context(ThreadPoolExecutor(1))
            begun.update({mode: lane.submit(under, one, mode, trial) for mode, trial in share.items()})
        yield begun


@pytest.mark.parametrize("mode", ["hang", "garbage", "huge"])
def test_an_agent_that_never_makes_sense_costs_the_level_and_nothing_else(trials, mode):
    trials[mode].result()


@pytest.mark.parametrize("mode", ["late:3", "late-all:1", "thaw-fails:2"])
def test_an_agent_that_is_slow_or_clumsy_still_gives_a_frozen_snapshot(trials, mode):
    trials[mode].result()


@pytest.mark.parametrize("mode", ["hang-freeze", "freeze-fails", "freeze-no-reply", "late:12"])
def test_a_freeze_that_fails_or_does_not_answer_is_thawed_all_the_same(trials, mode):
    trials[mode].result()


def test_an_agent_that_freezes_and_dies_is_thawed_by_the_guard_as_soon_as_one_answers(trials):
    trials["freeze-then-dead"].result()


def test_no_agent_has_left_a_guard_or_a_journal_behind(trials, guest, other, third):
    wait(trials.values())
    for one in (guest, other, third):
        assert_quiet(one)


# --- the guard itself --------------------------------------------------------------------------------


def test_the_guard_outlives_the_session_keeps_no_descriptor_and_thaws_in_time(guest):
    began = time.monotonic()
    # Through real Ansible, whose module archive is gone when the task ends.
    outcome = tasks.ad_hoc("fsfreeze", f"domain={guest.name} state=frozen deadline=30s", timeout=30 + tasks.TIMEOUT)
    assert outcome.rc == 0, outcome.stderr
    assert outcome["frozen"]
    assert outcome["deadline_at"]
    assert sorted(outcome["filesystems"]) == ["/disk/vda", "/disk/vdb"]
    pids = proof.guard_pids()
    assert len(pids) == 1
    assert os.getsid(pids[0]) == pids[0] or os.getsid(pids[0]) != os.getsid(0)
    assert Path(f"/proc/{pids[0]}/cwd").readlink() == Path("/")
    for descriptor in Path(f"/proc/{pids[0]}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(descriptor)
            assert target == "/dev/null" or target.startswith(("socket:", "anon_inode:", str(GUARDS), "pipe:")), target
            if target.startswith("pipe:"):  # libvirt's own wakeup pipe: both ends within the guard
                assert proof.holders_of_pipe(target) == {pids[0]}
    assert guest.frozen_filesystems() == ["/disk/vda", "/disk/vdb"]
    again = tasks.ok("fsfreeze", domains=[guest.name], state="frozen", deadline="30s")
    assert not again.changed
    assert again["deadline_at"] == outcome["deadline_at"]
    proof.alive(guest, timeout=90)
    assert time.monotonic() - began < 120
    assert not tasks.ok("fsfreeze", domains=[guest.name], state="thawed").changed
    assert_quiet(guest)
    until(lambda: not proof.guard_pids(), "the guard going home", 30)


def test_the_guard_survives_a_kill_of_the_whole_process_group(guest, log):
    process = tasks.killed_at("frozen", "snapshot", log, how="stop", domains=[guest.name], name="never", deadline="60s")
    wait_for_step(log, "frozen")
    os.killpg(process.pid, signal.SIGKILL)
    tasks.finish(process)
    proof.alive(guest, timeout=30)


def test_a_frozen_guest_is_snapshot_as_it_is_and_left_to_whoever_froze_it(guest):
    tasks.ok("fsfreeze", domains=[guest.name], state="frozen", deadline="120s")
    taken = tasks.ok("snapshot", domains=[guest.name], name=next(_names), quiesce="required")
    assert_consistent(taken["snapshot"])
    assert taken["snapshot"]["frozen_ms"] is None
    info = tasks.ok("domain_info", domains=[guest.name])["domain"]
    assert info["frozen"]
    assert info["freeze_deadline_at"]
    refused = tasks.run("snapshot", domains=[guest.name], name="ram", memory=True)
    assert refused.failed
    assert "Thaw it first" in refused.message
    thawed = tasks.ok("fsfreeze", domains=[guest.name], state="thawed")
    assert thawed.changed
    proof.alive(guest)
    assert_quiet(guest)


def test_one_mountpoint_can_be_frozen_and_an_unknown_one_is_named(guest):
    unknown = tasks.run("fsfreeze", domains=[guest.name], state="frozen", mountpoints=["/nowhere"])
    assert unknown.failed
    assert "/disk/vda, /disk/vdb" in unknown.message
    assert not guest.frozen_filesystems()
    predicted = tasks.ok("fsfreeze", domains=[guest.name], state="frozen", mountpoints=["/disk/vdb"], check=True)
    assert predicted.changed
    assert not guest.frozen_filesystems()
    tasks.ok("fsfreeze", domains=[guest.name], state="frozen", mountpoints=["/disk/vdb"])
    assert guest.frozen_filesystems() == ["/disk/vdb"]
    assert tasks.ok("fsfreeze", domains=[guest.name], state="thawed").changed
    proof.alive(guest)


def frozen_until(guest: Guest, deadline: str) -> Path:
    """Freeze the guest on request; the ticket of its guard."""
    assert tasks.ok("fsfreeze", domains=[guest.name], state="frozen", deadline=deadline).changed
    (ticket,) = GUARDS.glob("*.json")
    return ticket


def test_frozen_guests_that_were_saved_and_run_again_before_the_deadline_are_thawed_at_it(other, third, tmp_path):
    both = [other.name, third.name]
    ran_as = [one.domain().ID() for one in (other, third)]
    assert tasks.ok("fsfreeze", domains=both, state="frozen", deadline="40s").changed
    other.domain().managedSave()
    third.domain().save(str(tmp_path / "saved"))
    # Nobody can thaw them now, so nobody says that they are thawed; and who looks after them stays.
    for check in (True, False):
        refused = tasks.run("fsfreeze", domains=both, state="thawed", check=check)
        assert refused.failed
        assert all(f"{name!r} was saved to disk" in refused.message for name in both)
        assert "thaws it when it runs again" in refused.message
    assert len(list(GUARDS.glob("*.json"))) == 2
    other.domain().create()
    third.connection().restore(str(tmp_path / "saved"))
    assert all(one.domain().ID() not in ran_as for one in (other, third))
    for one in (other, third):
        proof.alive(one, timeout=150)
        assert one.frozen_filesystems() == []
        assert_quiet(one)


def test_a_guest_that_is_saved_beyond_its_deadline_is_thawed_when_it_runs_again(other, tmp_path):
    ticket = frozen_until(other, "15s")
    other.domain().save(str(tmp_path / "saved"))
    until(lambda: "fired" in ticket.with_suffix(".phase").read_text(), "the deadline passing", 60)
    time.sleep(2)  # so long that the guard has looked at it: that it stays is the point
    assert has_guard(other)
    other.connection().restore(str(tmp_path / "saved"))
    proof.alive(other)
    assert_quiet(other)


def test_a_saved_guest_can_be_thawed_as_soon_as_it_runs_again(other):
    ticket = frozen_until(other, "10m")
    other.domain().managedSave()
    other.domain().create()
    assert other.frozen_filesystems() == ["/disk/vda"]
    assert tasks.ok("fsfreeze", domains=[other.name], state="thawed").changed
    assert not ticket.exists()
    proof.alive(other)
    assert_quiet(other)


@proof.in_test_long
def test_a_guest_that_was_booted_anew_is_not_thawed_for_what_it_was_before(other):
    ticket = frozen_until(other, "40s")
    other.destroy()
    other.start()
    assert tasks.ok("domain_info", domains=[other.name])["domain"]["state_reason"] == "booted"
    # A freeze that nobody guards, of the new run: the guard of the old one has no business with it.
    other.agent_command("guest-fsfreeze-freeze")
    until(lambda: not ticket.exists(), "the guard going home", 90)
    assert other.frozen_filesystems() == ["/disk/vda"]
    other.agent_command("guest-fsfreeze-thaw")
    proof.alive(other)
    assert_quiet(other)


def test_a_guest_that_others_thawed_gets_its_whole_deadline_when_it_is_frozen_again(guest):
    began = time.monotonic()
    first = frozen_until(guest, "10s")
    guest.agent_command("guest-fsfreeze-thaw")
    proof.alive(guest)
    predicted = tasks.ok("fsfreeze", domains=[guest.name], state="frozen", deadline="5m", check=True)
    assert predicted.changed
    assert first.exists(), "check mode tears nothing up"
    second = frozen_until(guest, "5m")
    assert second != first
    until(lambda: len(proof.guard_pids()) == 1, "the first guard going home", 60)
    until(
        lambda: time.monotonic() - began > 14, "the first deadline passing: that nothing comes of it is the point", 60
    )
    assert guest.frozen_filesystems() == ["/disk/vda", "/disk/vdb"]
    assert tasks.ok("fsfreeze", domains=[guest.name], state="thawed").changed
    proof.alive(guest)
    assert_quiet(guest)


def test_a_freeze_of_somebody_else_s_gets_a_guard_and_proves_nothing(guest):
    guest.agent_command("guest-fsfreeze-freeze-list", {"mountpoints": ["/disk/vdb"]})
    adopted = tasks.ok("fsfreeze", domains=[guest.name], state="frozen", deadline="5m")
    assert adopted["deadline_at"]
    assert adopted["filesystems"] == []
    assert any("frozen by other means" in warning for warning in adopted.warnings)
    assert guest.frozen_filesystems() == ["/disk/vdb"]
    refused = tasks.run("snapshot", domains=[guest.name], name=next(_names), quiesce="required")
    assert refused.failed
    assert "perhaps not wholly" in refused.message
    taken = tasks.ok("snapshot", domains=[guest.name], name=next(_names), quiesce="auto")
    assert taken["snapshot"]["consistency"] == "crash"
    assert tasks.ok("fsfreeze", domains=[guest.name], state="thawed").changed
    proof.alive(guest)
    assert_quiet(guest)


def agent_timeout(guest: Guest) -> str:
    """How long libvirt waits for the agent, by its own record."""
    found = re.search(r"<agentTimeout>(-?\d+)</agentTimeout>", Path(f"/run/libvirt/qemu/{guest.name}.xml").read_text())
    assert found
    return found.group(1)


def test_a_freeze_that_fails_leaves_libvirt_s_time_limit_for_the_agent_as_it_was(guest):
    with proof.agent(guest, "freeze-fails"):
        guest.domain().agentSetResponseTimeout(37)
        failed = tasks.run("fsfreeze", domains=[guest.name], state="frozen", deadline="30s")
        assert failed.failed
        assert "Every guest was thawed" in failed.message
        assert agent_timeout(guest) == "37"
        guest.domain().agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)
    proof.alive(guest)
    assert_quiet(guest)


def test_a_host_that_loses_power_with_a_cut_unsettled_settles_it_after_the_boot(guest, host, log):
    """Last of the module: it ends every guest of the host."""
    name = next(_names)
    task = {"domains": [guest.name], "name": name}
    assert tasks.finish(tasks.killed_at("cut-done", "snapshot", log, **task)).killed
    count = guest.gaps("vda").count
    guest.sync()  # what was written by then is on the disk, and only that
    host.reboot()
    done = tasks.ok("snapshot", **task)
    # Started by nobody: the snapshot of before cannot be proved, so it was taken back and one of the dead guest is made.
    assert done["snapshot"]["consistency"] == "crash"
    assert snapshot_names(guest).count(name) == 1
    found = proof.whole(evidence.writer_log(Path(done["snapshot"]["disks"][0]["base"])))
    assert found.last.count >= count - 1
    assert_quiet(guest)
