# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The counts that decide whether continuous integration is green."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.scripts import stages
from ansible_collections.vmkeeper.libvirt.scripts.stages import Check, Counts, Runner, Stage

SCRIPTS = Path(stages.__file__).parent


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "LOGS", tmp_path)
    return Runner()


def report(tmp_path, attributes):
    path = tmp_path / "report.xml"
    path.write_text(f"<testsuites><testsuite {attributes}/></testsuites>", encoding="utf-8")
    return path


def test_a_report_is_added_up(tmp_path):
    path = report(tmp_path, 'tests="9" failures="1" errors="2" skipped="3"')
    assert stages.junit_counts(path) == Counts(passed=3, failed=3, skipped=3)


def test_half_a_report_is_no_report(tmp_path):
    (tmp_path / "half.xml").write_text("<testsuites><testsuite tests='3'", encoding="utf-8")
    assert stages.junit_counts(tmp_path / "half.xml") is None
    assert stages.junit_counts(tmp_path / "none.xml") is None


@pytest.mark.parametrize(
    ("returncode", "reported", "expected"),
    [
        (0, None, Counts(passed=1)),
        (1, None, Counts(failed=1)),
        (1, Counts(passed=8, failed=2), Counts(passed=8, failed=2)),
        # pytest crashed, was killed or collected nothing: its report shows no failure
        (-9, Counts(passed=8), Counts(passed=8, failed=1)),
        (5, Counts(), Counts(failed=1)),
    ],
)
def test_a_command_that_failed_is_never_counted_as_success(returncode, reported, expected):
    assert stages.counts_of(returncode, reported) == expected


def test_a_failing_check_shows_the_end_of_its_output_and_fails(runner, capfd):
    stage = Stage("demo", [Check("good", ["true"]), Check("bad", ["sh", "-c", "echo the reason; exit 3"])])
    outcome = runner.run_stage(stage)
    assert outcome.counts == Counts(passed=1, failed=1)
    output = capfd.readouterr().out
    assert "    | the reason" in output
    assert "exit status 3" in output


def test_a_command_that_is_not_there_fails(runner):
    assert runner.run_stage(Stage("demo", [Check("gone", ["/nonexistent"])])).counts == Counts(failed=1)


def test_a_skipped_stage_says_so_and_is_counted(runner, capfd):
    assert runner.run_stage(Stage("demo", (), skipped="no lab")).counts == Counts(skipped=1)
    assert "SKIPPED: no lab" in capfd.readouterr().out


@pytest.fixture
def slow_stage(tmp_path):
    """A check that says when it runs and would go on for ten minutes, and one after it."""
    slow = Check("slow", ["sh", "-c", f"touch {tmp_path}/started; sleep 600; :"])
    return Stage("demo", [slow, Check("next", ["true"])])


def once_started(tmp_path, action):
    def wait_and_act():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_stopping_ends_a_check_with_its_children_and_starts_no_other(runner, slow_stage, tmp_path):
    stopper = once_started(tmp_path, lambda: runner.stop("the limit was reached"))
    outcome = runner.run_stage(slow_stage)
    stopper.join()
    assert outcome.counts == Counts(failed=2)


def test_an_interrupt_ends_the_checks_at_once(runner, slow_stage, tmp_path):
    def interrupted(*_):
        if not runner.stopping:
            raise KeyboardInterrupt

    def interrupt():
        # More than once: Python drops an exception that is raised while it happens to be tidying up an object.
        while not runner.stopping:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1)

    previous = signal.signal(signal.SIGUSR1, interrupted)
    try:
        stopper = once_started(tmp_path, interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run_stage(slow_stage)
        stopper.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert runner.stopping == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stage_that_is_ended_by_a_signal_ends_its_checks(monkeypatch, tmp_path, slow_stage, number):
    for name in ("LOGS", "RESULTS"):
        monkeypatch.setattr(stages, name, tmp_path)
    monkeypatch.setattr(stages, "environment", dict)
    monkeypatch.setitem(stages.STAGES, "demo", lambda: iter([slow_stage]))
    runner = Runner()
    monkeypatch.setattr(stages, "Runner", lambda: runner)
    previous = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGHUP)}

    def end():
        while not runner.stopping:
            os.kill(os.getpid(), number)
            time.sleep(1)

    try:
        sender = once_started(tmp_path, end)
        with pytest.raises(SystemExit) as ended:
            stages.main(["demo"])
        sender.join()
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
    assert ended.value.code == 128 + number
    assert runner.stopping == "interrupted"


def test_a_check_ends_with_a_run_that_is_killed(tmp_path):
    log = tmp_path / "log"
    script = "from stages import *; Runner()._execute(Check('slow', ['sh', '-c', 'echo $$; exec sleep 600']), 1)"
    with log.open("wb") as sink, subprocess.Popen([sys.executable, "-c", script], cwd=SCRIPTS, stdout=sink) as run:
        while not log.read_text(encoding="utf-8").endswith("\n"):
            assert run.poll() is None
            time.sleep(0.01)
        run.kill()
    state = Path("/proc", log.read_text(encoding="utf-8").strip(), "stat")
    with suppress(FileNotFoundError, ProcessLookupError):
        # A zombie has ended, too: whoever inherits it here may not wait for it.
        while state.read_text(encoding="utf-8").split()[2] != "Z":
            time.sleep(0.01)


def test_the_table_shows_the_common_budget_and_what_exceeds_it():
    outcomes = [stages.Outcome(Stage(name, ()), Counts(passed=1), 130) for name in stages.STATIC_STAGES]
    lines = list(stages.table(outcomes))
    assert any("6:30" in line and "6:00" in line and "OVER BUDGET" in line for line in lines)


@pytest.mark.parametrize("chosen", ["", "-k revert"])
def test_each_module_of_a_trade_runs_in_one_lane_and_a_choice_in_one_alone(monkeypatch, chosen):
    for trade, modules in stages.SECOND_LANES.items():
        for module in modules:
            assert (stages.ROOT / f"tests/integration/{trade}/{module}.py").exists()
    monkeypatch.setenv("TRADE", "snapshots")
    monkeypatch.setenv("PYTEST_ARGS", chosen)
    (stage,) = stages.integration()
    assert stage.workers == len(stage.checks) == (1 if chosen else 2)
    assert len({check.junit for check in stage.checks}) == len(stage.checks)
    commands = [" ".join(check.command) for check in stage.checks]
    guard = "tests/integration/snapshots/test_guard.py"
    left_out = [f"--ignore={guard}" in command for command in commands]
    assert left_out == ([False] if chosen else [True, False])
    assert all(f" {guard}" in command for command in commands[1:])
