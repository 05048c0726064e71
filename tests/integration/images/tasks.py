# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one of the image modules: its own code, in a process of its own, with what Ansible would give it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

ROOT = Path(__file__).resolve().parents[3]
KILLHOOK = ROOT / "tests" / "lab" / "killhook"
PYTHON = "/usr/bin/python3"
"""The interpreter that has the libvirt bindings, as on a hypervisor."""

TIMEOUT = 300


@dataclass(frozen=True)
class Result:
    """What a module answered; ``answer`` is empty when it was killed."""

    answer: dict[str, Any]
    rc: int
    errors: str

    def __getitem__(self, key: str) -> Any:
        return self.answer[key]

    @property
    def changed(self) -> bool:
        return bool(self.answer["changed"])

    @property
    def message(self) -> str:
        return str(self.answer.get("msg", ""))


@functools.cache
def _ansible() -> str:
    """The directory of ansible-core: of this interpreter, which may be another than the hypervisor's."""
    import ansible

    return str(Path(ansible.__file__).parent.parent)


def start(
    module: str, *, check: bool = False, env: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start it; its options are on their way to it."""
    paths = [str(ROOT / ".ansible" / "collections"), _only_ansible()]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        f"from ansible_collections.vmkeeper.libvirt.plugins.modules.{module} import main; main()"
    )
    arguments = {"ANSIBLE_MODULE_ARGS": {**options, "_ansible_check_mode": check, "_ansible_diff": True}}
    process = subprocess.Popen(
        [PYTHON, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **(env or {})},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(arguments))
    process.stdin.close()
    process.stdin = None  # communicate() would flush it again
    return process


def result_of(process: subprocess.Popen[str]) -> Result:
    """What it answered, once it has ended."""
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    answer = json.loads(stdout[stdout.index("{") :]) if "{" in stdout else {}
    assert answer or process.returncode, (stdout, stderr)
    return Result(answer, process.returncode, stderr)


def run(module: str, *, check: bool = False, env: dict[str, str] | None = None, **options: Any) -> Result:
    """Run it to its end, whichever that is."""
    return result_of(start(module, check=check, env=env, **options))


@functools.cache
def _only_ansible() -> str:
    """A directory with nothing but ansible-core in it: the rest of a virtual environment is not the hypervisor's."""
    directory = Path("/run/vmk-images-ansible")
    directory.mkdir(exist_ok=True)
    link = directory / "ansible"
    if not link.is_symlink():
        link.symlink_to(os.path.join(_ansible(), "ansible"))
    return str(directory)


def ok(module: str, **options: Any) -> Result:
    """Run it; it must not fail."""
    result = run(module, **options)
    assert result.rc == 0, (result.message, result.errors[-2000:])
    return result


def refused(module: str, *words: str, **options: Any) -> Result:
    """Run it; it must fail with an error of ours that contains the words."""
    result = run(module, **options)
    assert result.rc == 1, result
    assert result.answer.get("error", {}).get("kind"), (result.message, result.errors[-2000:])
    for word in words:
        assert word in result.message, result.message
    return result


def steps_of(module: str, log: Path, *, env: dict[str, str] | None = None, **options: Any) -> list[str]:
    """The steps that a whole run goes through, the second time of one as ``step#2``."""
    log.unlink(missing_ok=True)
    ok(module, env={**(env or {}), "PYTHONPATH": str(KILLHOOK), "VMK_KILL_LOG": str(log)}, **options)
    names: list[str] = []
    for name in log.read_text().split():
        count = sum(one.partition("#")[0] == name for one in names) + 1
        names.append(name if count == 1 else f"{name}#{count}")
    return names


def kill_at(step: str, module: str, log: Path, *, env: dict[str, str] | None = None, **options: Any) -> None:
    """Run it and kill it when it has recorded the step; asserts that the kill landed there."""
    log.unlink(missing_ok=True)
    hook = {"PYTHONPATH": str(KILLHOOK), "VMK_KILL_LOG": str(log), "VMK_KILL_AT": step}
    result = run(module, env={**(env or {}), **hook}, **options)
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
        assert process.poll() is None, result_of(process)
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
    assert result_of(process).rc == -9
    until(lambda: not any(map(runs, started)), "what the killed run had started ending")
