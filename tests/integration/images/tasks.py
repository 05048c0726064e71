# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one of the image modules: its own code, in a process of its own, with what Ansible would give it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from ansible_collections.vmkeeper.libvirt.tests.lab.tasks import (
    PYTHON,
    ROOT,
    TIMEOUT,
    Outcome,
    finish,
    kill_environment,
    ok,
    run,
    start,
    steps_in,
)
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

SCALE = int(os.environ.get("VMK_SCALE", "1"))

__all__ = [
    "PYTHON",
    "ROOT",
    "TIMEOUT",
    "Outcome",
    "finish",
    "kill_at",
    "kill_with",
    "of_its_own",
    "ok",
    "refused",
    "run",
    "start",
    "steps_of",
]


def refused(module: str, *words: str, **options: Any) -> Outcome:
    """Run it; it must fail with an error of ours that contains the words."""
    result = run(module, **options)
    assert result.rc == 1, result
    assert result.answer.get("error", {}).get("kind"), (result.message, result.stderr[-2000:])
    for word in words:
        assert word in result.message, result.message
    return result


def steps_of(module: str, log: Path, *, env: dict[str, str] | None = None, **options: Any) -> list[str]:
    """The steps that a whole run goes through, the second time of one as ``step#2``."""
    log.unlink(missing_ok=True)
    ok(module, env={**(env or {}), **kill_environment(log)}, **options)
    return steps_in(log)


def of_its_own(steps: list[str], *own: str) -> list[str]:
    """Those steps, where others stand for the rest: plain exports are killed at every step. All in ``make test-long``."""
    return [step for step in steps if SCALE > 1 or step.partition("#")[0] in own]


def kill_at(step: str, module: str, log: Path, *, env: dict[str, str] | None = None, **options: Any) -> None:
    """Run it and kill it when it has recorded the step; asserts that the kill landed there."""
    log.unlink(missing_ok=True)
    result = run(module, env={**(env or {}), **kill_environment(log, step)}, **options)
    assert result.rc == -9, (step, result)
    assert log.read_text().split()[-1] == f"!{step.partition('#')[0]}"


def programs_below(pid: int) -> set[int]:
    """The processes that a process has started, and theirs."""
    children: dict[int, set[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, set()).add(int(process.name))
    found: set[int] = set()
    new = {pid}
    while new:
        new = set().union(*(children.get(one, set()) for one in new)) - found
        found |= new
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and not dead."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def kill_with(
    program: str, word: str, module: str, *, hold: bool, env: dict[str, str] | None = None, **options: Any
) -> None:
    """Kill it when it has started ``program`` with ``word`` among its arguments; what it has started must end with it.

    ``hold``: that program is stopped first, so that it does not end by itself.
    """
    process = start(module, env=env, **options)
    started: set[int] = set()

    def has_started() -> bool:
        assert process.poll() is None, finish(process)
        for pid in programs_below(process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if os.path.basename(words[0]) == program and word in words:
                    if hold:
                        os.kill(pid, signal.SIGSTOP)
                    started.add(pid)
        return bool(started)

    until(has_started, f"{module} starting {program}", interval=0.005)
    started |= programs_below(process.pid)
    process.kill()
    assert finish(process).rc == -9
    until(lambda: not any(map(runs, started)), "what the killed run had started ending")
