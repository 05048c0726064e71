# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Running the collection: through the real ``ansible`` command, or a module's file as a child process of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
COLLECTIONS = CHECKOUT / ".ansible" / "collections"
COLLECTION = "vmkeeper.libvirt"
INTERPRETER = os.environ.get("VMK_LAB_PYTHON", "/usr/bin/python3")
"""The interpreter that modules run with: the hypervisor's own, which has python3-libvirt."""

TIMEOUT = 900.0

Result = dict[str, Any]
"""A module's result. ``failed``, ``changed``, ``msg`` and ``warnings`` are always there."""


class AnsibleRunError(RuntimeError):
    """ansible or a module ended without a result; the message carries what it printed."""


@dataclasses.dataclass(frozen=True)
class TaskOutcome:
    """One task of a playbook: ``outcome`` is ok, failed, skipped, unreachable, item_ok or item_failed."""

    host: str
    task: str
    outcome: str
    result: Result


@dataclasses.dataclass(frozen=True)
class PlaybookRun:
    """What a playbook run printed and did."""

    rc: int
    tasks: tuple[TaskOutcome, ...]
    stdout: str
    stderr: str


def link_collection() -> Path:
    """Make the checkout importable and resolvable as the collection; returns the collections path."""
    link = COLLECTIONS / "ansible_collections" / "vmkeeper" / "libvirt"
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(Path("../../../.."))
    return COLLECTIONS


def run_module(
    module: str,
    /,
    *,
    check: bool = False,
    diff: bool = False,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    interpreter: str = INTERPRETER,
    **arguments: Any,
) -> Result:
    """Run one module with ``ansible localhost -m`` and return its result.

    ``module`` is a short name of this collection or a full name of any. Never raises because the module
    failed: look at ``result["failed"]``. ``_stdout`` and ``_stderr`` hold what ansible printed. ``env`` adds
    to the environment, which the module inherits. Raises AnsibleRunError when there is no result.
    """
    name = module if "." in module else f"{COLLECTION}.{module}"
    command = [_program("ansible"), "localhost", "-c", "local", "-e", f"ansible_python_interpreter={interpreter}"]
    command += ["-m", name, "-a", json.dumps(arguments)]
    command += ["--check"] * check + ["--diff"] * diff
    run = _run(command, env or {}, timeout)
    if not run.tasks:
        raise AnsibleRunError(f"{name} gave no result (exit code {run.rc}):\n{run.stdout}\n{run.stderr}")
    outcome = run.tasks[-1]
    return _completed(outcome.result, outcome.outcome in ("failed", "unreachable"), run.stdout, run.stderr)


def run_playbook(
    playbook: Path | str | Sequence[Mapping[str, Any]],
    *,
    extra_vars: Mapping[str, Any] | None = None,
    more_hosts: Mapping[str, Mapping[str, Any]] | None = None,
    check: bool = False,
    diff: bool = False,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> PlaybookRun:
    """Run a playbook against localhost: a path, a name like ``vmkeeper.libvirt.backup``, or a list of plays.

    ``more_hosts`` are in the inventory, too, with their variables.
    """
    with tempfile.TemporaryDirectory(prefix="lab-playbook-") as directory:
        if not isinstance(playbook, (str, Path)):
            file = Path(directory) / "playbook.yml"
            file.write_text(json.dumps(list(playbook)))  # JSON is YAML
            playbook = file
        local = {"ansible_connection": "local", "ansible_python_interpreter": INTERPRETER}
        inventory = Path(directory) / "inventory.json"
        inventory.write_text(json.dumps({"all": {"hosts": {"localhost": local, **(more_hosts or {})}}}))
        command = [
            _program("ansible-playbook"),
            "-i",
            str(inventory),
            str(playbook),
            "-e",
            json.dumps(dict(extra_vars or {})),
            *arguments,
        ]
        command += ["--check"] * check + ["--diff"] * diff
        return _run(command, env or {}, timeout)


def _run(command: Sequence[str], extra: Mapping[str, str], timeout: float) -> PlaybookRun:
    link_collection()
    with tempfile.TemporaryDirectory(prefix="lab-ansible-") as directory:
        results = Path(directory) / "results"
        config = Path(directory) / "ansible.cfg"
        config.touch()  # whatever the machine or the user has configured does not count
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_CALLBACK_PLUGINS": str(HERE / "callback_plugins"),
            "ANSIBLE_STDOUT_CALLBACK": "lab_result",
            "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
            "ANSIBLE_LOCAL_TEMP": directory,
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CONFIG": str(config),
            "VMK_LAB_RESULTS": str(results),
            **extra,
        }
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise AnsibleRunError(f"{' '.join(command)} did not end within {timeout:.0f} s") from error
        lines = results.read_text().splitlines() if results.exists() else []
    return PlaybookRun(process.returncode, tuple(TaskOutcome(**json.loads(line)) for line in lines), stdout, stderr)


def _completed(result: Result, failed: bool, stdout: str, stderr: str) -> Result:
    complete: Result = {"failed": failed, "changed": False, "msg": "", "warnings": [], **result}
    complete["failed"] = bool(failed or complete["failed"])
    complete["warnings"] = [_text_of(warning) for warning in complete["warnings"] or []]
    return {**complete, "_stdout": stdout, "_stderr": stderr}


def _text_of(warning: Any) -> str:
    """ansible-core 2.19 hands warnings on as structures."""
    if isinstance(warning, Mapping):
        return str(warning.get("msg") or warning.get("event", {}).get("msg", warning))
    return str(warning)


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise AnsibleRunError(f"{name} is neither beside {sys.executable} nor in PATH")
    return found


# --- a module's file, run directly ---------------------------------------------------------------------


class ModuleProcess:
    """A module running as a child process, in a session of its own, so that a test can kill it at any moment."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self.process = process
        self._name = name

    @property
    def pid(self) -> int:
        """The pid of the module itself."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL the module and nothing else (detached guards and workers live on), and reap it."""
        self.process.kill()
        self.process.wait()

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end; the exit code (negative: killed by that signal)."""
        return self.process.wait(timeout)

    def result(self, timeout: float = TIMEOUT) -> Result:
        """Wait for its end and return the result; raises AnsibleRunError when it gave none."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise AnsibleRunError(f"{self._name} did not end within {timeout:.0f} s") from error
        for line in reversed(stdout.splitlines()):
            if line.startswith("{"):
                result: Result = json.loads(line)
                return _completed(result, bool(result.get("failed")), stdout, stderr)
        raise AnsibleRunError(f"{self._name} gave no result (exit code {self.process.returncode}):\n{stdout}\n{stderr}")


def run_module_process(
    module: str,
    /,
    *,
    check: bool = False,
    diff: bool = False,
    env: Mapping[str, str] | None = None,
    interpreter: str = INTERPRETER,
    **arguments: Any,
) -> ModuleProcess:
    """Start a module of this collection without ansible around it (about 0.2 s cheaper) and return at once.

    The arguments go in on stdin as AnsibleModule takes them when it is not wrapped; defaults of the argument
    spec apply, ``module_defaults`` and action plugins do not. A ``PYTHONPATH`` in ``env`` comes first (killhook).
    """
    internal = {
        "_ansible_check_mode": check,
        "_ansible_diff": diff,
        "_ansible_module_name": f"{COLLECTION}.{module}",
        "_ansible_selinux_special_fs": ["fuse", "nfs", "vboxsf", "ramfs", "9p", "vfat"],
    }
    environment = {**os.environ, **(env or {})}
    ahead = [(env or {})["PYTHONPATH"]] if env and env.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join([*ahead, str(link_collection()), str(_bare_ansible())])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    program = (
        "import runpy; runpy.run_module("
        f"'ansible_collections.{COLLECTION}.plugins.modules.{module}', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [interpreter, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, **internal}}))
        process.stdin.close()
    except BrokenPipeError:  # it died at once: result() tells
        pass
    process.stdin = None
    return ModuleProcess(process, module)


def _bare_ansible() -> Path:
    """A directory with the controller's ``ansible`` package and nothing else of its environment."""
    directory = COLLECTIONS.parent / "module-path"
    directory.mkdir(parents=True, exist_ok=True)
    # importlib.util.find_spec would find this very module's package under pytest's path; ask the controller.
    program = Path(_program("ansible")).resolve()
    candidates = sorted(program.parent.parent.glob("lib/python3*/site-packages/ansible"))
    if not candidates:
        raise AnsibleRunError(f"no ansible package belongs to {program}")
    link = directory / "ansible"
    if not link.is_symlink() or link.resolve() != candidates[0].resolve():
        partial = directory / f"ansible.{os.getpid()}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(candidates[0])
        partial.rename(link)
    return directory
