# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run stages of the test suite: `.venv/bin/python scripts/stages.py lint sanity units integration`.

`nested-quick`, `nested` and `generations` build and boot whole Debian machines; the last two are not part of `make test`.

All stages run, whatever fails before them. Each check writes its whole output to `.cache/logs/`; the
end of it is shown when the check fails. A table of times follows, then `N passed, N failed`, where a
pytest run counts its tests and every other check counts as one. Over budget is said, but no failure:
machines differ.

Environment: `TRADE` limits `integration` to one directory, `PYTEST_ARGS` is passed on to pytest there,
`TEST_LIMIT` is a number of seconds after which everything still running is stopped and has failed,
`VMK_SCALE` sizes the randomised tests.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
LOGS = CACHE / "logs"
RESULTS = CACHE / "results"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LAB = ROOT / "tests" / "lab" / "enter"
WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")
"""What a check is told by where nothing here can stop it any more: the kernel ends it with the thread that waits for it."""
TAIL_LINES = 60
STOP_GRACE_SECONDS = 30

GENERATIONS = ("trixie", "sid")
"""Debian releases whose libvirt and QEMU run the scenario of tests/generations."""

# Minutes on two cores. The first three stages share one budget.
STATIC_STAGES = ("lint", "sanity", "units")
STATIC_BUDGET = 6
NESTED_BUDGET = 10
TRADE_BUDGETS = {"snapshots": 12, "backup": 15, "sizing": 8, "images": 8, "as_used": 3}

SECOND_LANES = {
    "snapshots": ("test_confined", "test_guard", "test_histories"),
    "backup": (
        "test_boot_proof",
        "test_compression",
        "test_cycles",
        "test_instant",
        "test_instant_encrypted",
        "test_secrecy",
    ),
    "images": ("test_encryption", "test_sealing"),
}
"""Modules of a trade that run beside its others, in a test host of their own: one guest leaves a core of two idle, or waits."""

IN_NESTED_LAB = (str(LAB), "--name", "nested", "--")

QUICK_SCENARIOS = ("ad_hoc", "vertical_scale")
"""Those of molecule's that run in `make test`: every login, a merge under AppArmor, a role. The rest takes an hour."""


@dataclass(frozen=True)
class Check:
    """One command, which succeeds or fails."""

    name: str
    command: Sequence[str]
    junit: Path | None = None  # pytest's report, when the command is pytest
    stream: bool = False  # long enough that its output is shown as it comes


@dataclass(frozen=True)
class Stage:
    """Checks under one name; with `workers` > 1 they run side by side."""

    name: str
    checks: Sequence[Check]
    workers: int = 1
    budget: int | None = None  # minutes
    skipped: str = ""  # why there is nothing to run


@dataclass(frozen=True)
class Counts:
    """Test results that can be added up."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.failed} failed"
        return f"{text}, {self.skipped} skipped" if self.skipped else text


@dataclass(frozen=True)
class Outcome:
    """How a stage went."""

    stage: Stage
    counts: Counts
    seconds: float


def pytest_check(name: str, arguments: Sequence[str], prefix: Sequence[str] = (), stream: bool = False) -> Check:
    """Return a pytest run whose tests are counted one by one."""
    junit = RESULTS / f"{name.replace('/', '-')}.xml"
    command = [*prefix, str(ROOT / ".venv/bin/python"), "-m", "pytest", f"--junit-xml={junit}", *arguments]
    return Check(name, command, junit=junit, stream=stream)


def shell_scripts() -> list[str]:
    """Return the tracked files that a shell runs."""
    listing = subprocess.run(
        ["git", "grep", "--untracked", "-lIE", "^#!.*(/| )(ba)?sh( |$)"],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    # A guide may show a script: only a first line makes one.
    return [name for name in listing.split() if (ROOT / name).open("rb").read(2) == b"#!"]


def lint() -> Iterator[Stage]:
    """Read the sources: style, types, documentation, change log."""
    collection = "ansible_collections.vmkeeper.libvirt"
    packages = [f"{collection}.{part}" for part in ("plugins", "scripts", "tests") if any((ROOT / part).rglob("*.py"))]
    checks = [
        Check("ansible-lint", ["ansible-lint", "--profile", "production", "--offline"]),
        Check("ruff check", ["ruff", "check", "."]),
        Check("ruff format", ["ruff", "format", "--check", "--diff", "."]),
        Check("mypy", ["mypy", *(f"--package={package}" for package in packages)]),
        Check("yamllint", ["yamllint", "--strict", "."]),
        Check("shellcheck", ["shellcheck", "--severity=warning", *shell_scripts()]),
        Check("change log", ["antsibull-changelog", "lint"]),
        Check(
            "documentation",
            ["make", "--no-print-directory", "docs"],
        ),
        Check("licences and examples", [sys.executable, "scripts/check_sources.py"]),
    ]
    if any((ROOT / "plugins").rglob("*.py")):
        checks.append(Check("python 3.9", ["vermin", "--target=3.9-", "--no-tips", "--violations", "plugins"]))
    yield Stage("lint", checks, workers=os.cpu_count() or 1)


def in_copy(*command: str) -> list[str]:
    """Return the command that runs `command` in a copy of the collection."""
    return [sys.executable, "scripts/in_copy.py", *command]


def ansible_test(command: str) -> list[str]:
    """Return an ansible-test run for this Python alone: others that are installed here are not the subject."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return in_copy("ansible-test", command, "--color", "no", "--python", version)


def sanity() -> Iterator[Stage]:
    """Apply Ansible's own rules to the sources and Galaxy's to the artifact."""
    checks = [
        Check("ansible-test sanity", ansible_test("sanity")),
        Check("galaxy importer", ["make", "--no-print-directory", "importer"]),
    ]
    yield Stage("sanity", checks, workers=os.cpu_count() or 1)


def units() -> Iterator[Stage]:
    """Run the unit tests: by pytest, and as ansible-test runs them for users of the collection's sources."""
    checks = [
        pytest_check("units", ["--timeout=60", "--quiet", "tests/unit"]),
        Check("ansible-test units", ansible_test("units")),
    ]
    yield Stage("units", checks)


def trades() -> list[str]:
    """Return the directories of tests/integration that hold tests, in the order of the budgets."""
    found = sorted({path.parent.name for path in (ROOT / "tests/integration").glob("*/test_*.py")})
    order = list(TRADE_BUDGETS)
    return sorted(found, key=lambda trade: (order.index(trade) if trade in order else -1, trade))


def integration() -> Iterator[Stage]:
    """Run each trade's tests against real guests, as a test host of its own."""
    wanted = os.environ.get("TRADE", "")
    chosen = [trade for trade in trades() if wanted in ("", trade)]
    if wanted and not chosen:
        sys.exit(f"TRADE={wanted}: tests/integration has no such tests, only: {' '.join(trades())}")
    if not chosen:
        yield Stage("integration", (), skipped="there are no tests in tests/integration/*/")
    for trade in chosen:
        name = f"integration/{trade}"
        if not LAB.exists():
            yield Stage(name, (), skipped="tests/lab/enter is not there")
            continue
        # Whoever says what pytest is to run gets one run of it: a choice may be empty in one of two lanes.
        chosen_by_user = shlex.split(os.environ.get("PYTEST_ARGS", ""))
        beside = [f"tests/{name}/{module}.py" for module in SECOND_LANES.get(trade, ()) if not chosen_by_user]
        lanes = {name: [f"tests/{name}", *chosen_by_user, *(f"--ignore={path}" for path in beside)]}
        if beside:
            lanes[f"{name}/beside"] = beside
        checks = [
            pytest_check(lane, ["--quiet", *arguments], prefix=[str(LAB), "--"], stream=True)
            for lane, arguments in lanes.items()
        ]
        yield Stage(name, checks, workers=len(checks), budget=TRADE_BUDGETS.get(trade))


def generations() -> Iterator[Stage]:
    """Run one scenario on this machine's libvirt and QEMU, and on those of newer Debian releases."""
    for suite in ("", *GENERATIONS):
        release = ["--generation", suite] if suite else []
        arguments = ["--quiet", "tests/generations"]
        name = f"generations/{suite or 'machine'}"
        yield Stage(name, (pytest_check(name, arguments, prefix=[str(LAB), *release, "--"], stream=True),))


def nested() -> Iterator[Stage]:
    """Run what needs whole machines with systemd and AppArmor: tests of their own, and molecule's scenarios.

    In a private test host: whatever ends this, the machines end with it.
    """
    yield Stage("nested", (pytest_check("nested", ["--quiet", "tests/nested"], prefix=IN_NESTED_LAB, stream=True),))
    yield Stage("molecule", (scenarios("--all"),))


def nested_quick() -> Iterator[Stage]:
    """Run what an operator does most, on nested hypervisors."""
    chosen = [word for name in QUICK_SCENARIOS for word in ("--scenario-name", name)]
    yield Stage("nested-quick", (scenarios(*chosen),), budget=NESTED_BUDGET)


def scenarios(*chosen: str) -> Check:
    """Return a run of molecule's scenarios."""
    python = ("env", f"PYTHONPATH={ROOT / 'tests'}", str(ROOT / ".venv/bin/python"))
    command = [*IN_NESTED_LAB, *python, "-m", "nested", "scenarios", "--", *chosen]
    return Check("scenarios", command, stream=True)


STAGES = {
    "lint": lint,
    "sanity": sanity,
    "units": units,
    "integration": integration,
    "generations": generations,
    "nested": nested,
    "nested-quick": nested_quick,
}


def junit_counts(report: Path) -> Counts | None:
    """Add up a JUnit report; None when there is none, or half of one."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    tests, failures, errors, skipped = (
        sum(int(suite.get(attribute, "0")) for suite in suites)
        for attribute in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    # A test may pass and then fail in its teardown: pytest counts it once as a test, twice as a result.
    return Counts(max(tests - failed - skipped, 0), failed, skipped)


def counts_of(returncode: int, reported: Counts | None) -> Counts:
    """Return a check's counts: its report's, if any, but never success for a command that failed."""
    counts = reported or Counts(passed=1 if returncode == 0 else 0)
    if returncode != 0 and counts.failed == 0:
        counts += Counts(failed=1)
    return counts


@dataclass
class Runner:
    """Runs checks, and can stop all that are running."""

    stopping: str = ""  # why everything is being stopped
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self, why: str) -> None:
        """Terminate all running checks with their children; kill what is left after a grace period."""
        with self._lock:
            self.stopping = why
            running = set(self._running)
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for process in running:
                # The group outlives a leader that left its children behind.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_number)
            until = time.monotonic() + STOP_GRACE_SECONDS
            while time.monotonic() < until and any(process.poll() is None for process in running):
                time.sleep(0.1)

    def run(self, check: Check, stage: str) -> Counts:
        """Run one check, report it on stdout, return its counts."""
        started = time.monotonic()
        log = LOGS / f"{stage}-{check.name}.log".replace("/", "-").replace(" ", "-")
        if check.junit:
            check.junit.unlink(missing_ok=True)
        with log.open("wb") as sink:
            returncode = self._execute(check, sink.fileno())
        counts = counts_of(returncode, junit_counts(check.junit) if check.junit else None)
        seconds = time.monotonic() - started
        lines = [f"  {'FAIL' if counts.failed else 'ok':<5} {check.name:<24} {clock(seconds):>6}"]
        if check.junit:
            lines[0] += f"  {counts}"
        if counts.failed:
            reason = self.stopping or f"exit status {returncode}"
            lines[0] += f"  ({reason}; all of its output: {log.relative_to(ROOT)})"
            if not check.stream:
                text = log.read_text(encoding="utf-8", errors="replace").splitlines()
                lines += ["    | " + line for line in text[-TAIL_LINES:]]
        print("\n".join(lines), flush=True)
        return counts

    def _execute(self, check: Check, sink: int) -> int:
        with self._lock:
            if self.stopping:
                return -signal.SIGTERM
            try:
                process = subprocess.Popen(
                    [*WITH_US, *check.command],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if check.stream else sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                os.write(sink, f"{shlex.join(check.command)}: {error}\n".encode())
                return 127
            self._running.add(process)
        if process.stdout is not None:
            last = b"\n"
            while chunk := os.read(process.stdout.fileno(), 65536):
                os.write(sink, chunk)
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
                last = chunk[-1:]
            if last != b"\n":  # cut off in the middle of a line
                print(flush=True)
        returncode = process.wait()
        with self._lock:
            self._running.discard(process)
        return returncode

    def run_stage(self, stage: Stage) -> Outcome:
        """Run a stage's checks."""
        print(f"== {stage.name}", flush=True)
        if stage.skipped:
            print(f"  SKIPPED: {stage.skipped}", flush=True)
            return Outcome(stage, Counts(skipped=1), 0.0)
        started = time.monotonic()
        with ThreadPoolExecutor(stage.workers) as pool:
            try:
                results = list(pool.map(lambda check: self.run(check, stage.name), stage.checks))
            except BaseException:  # leaving `with` waits for the checks: end them first
                self.stop("interrupted")
                raise
        return Outcome(stage, sum(results, Counts()), time.monotonic() - started)


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def row(name: str, counts: Counts | None, seconds: float, budget: int | None) -> str:
    """Return one line of the table."""
    result = "" if counts is None else str(counts)
    text = f"{name:<24} {clock(seconds):>7} {clock(budget * 60) if budget else '-':>7}  {result}"
    return f"{text}  OVER BUDGET" if budget and seconds > budget * 60 else text


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the lines of the closing table."""
    yield f"{'stage':<24} {'time':>7} {'budget':>7}  result"
    for outcome in outcomes:
        line = row(outcome.stage.name, outcome.counts, outcome.seconds, outcome.stage.budget)
        yield f"{line}  SKIPPED: {outcome.stage.skipped}" if outcome.stage.skipped else line
    static = [outcome.seconds for outcome in outcomes if outcome.stage.name in STATIC_STAGES]
    if len(static) == len(STATIC_STAGES):
        yield row(" + ".join(STATIC_STAGES), None, sum(static), STATIC_BUDGET)
    yield row("all", None, sum(outcome.seconds for outcome in outcomes), None)


def environment() -> dict[str, str]:
    """Return the variables in which every check runs alike, whoever runs it."""
    return {
        # no pyenv shims: a Python without libvirt's bindings would be found first
        "PATH": f"{ROOT / '.venv/bin'}:{SYSTEM_PATH}",
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",  # Ansible refuses any other encoding
        "NO_COLOR": "1",
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".ansible/collections"),
        "VMK_SCALE": os.environ.get("VMK_SCALE", "1"),
    }


def main(names: Sequence[str]) -> int:
    """Run the named stages; 0 if nothing failed."""
    unknown = set(names) - set(STAGES)
    if unknown or not names:
        sys.exit(f"usage: stages.py STAGE..., of: {' '.join(STAGES)}")
    os.environ.update(environment())
    LOGS.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)

    runner = Runner()
    limit = int(os.environ.get("TEST_LIMIT", "0"))
    timer = threading.Timer(limit, runner.stop, [f"the limit of {clock(limit)} was reached"])
    timer.daemon = True
    if limit:
        timer.start()

    def interrupted(number: int, _frame: object) -> None:
        if not runner.stopping:  # everything ends already: a lost session sends more than one
            sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, interrupted)
    outcomes = []
    try:
        for name in names:
            outcomes += [runner.run_stage(stage) for stage in STAGES[name]()]
    finally:
        timer.cancel()

    total = sum((outcome.counts for outcome in outcomes), Counts())
    print("\n" + "\n".join(table(outcomes)) + f"\n\n{total}", flush=True)
    (RESULTS / "summary").write_text(f"{total}\n", encoding="utf-8")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
