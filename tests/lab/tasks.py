# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one task of the collection, as Ansible does or without the controller around it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COLLECTIONS = ROOT / ".ansible" / "collections"
KILLHOOK = ROOT / "tests" / "lab" / "killhook"
PYTHON = "/usr/bin/python3"
"""The interpreter that has the libvirt bindings, as on a hypervisor."""

TIMEOUT = 300.0
"""No task of these tests may take longer, whatever the guest's agent does."""

_RUN = """
import importlib, os, sys
sys.path[:0] = {paths!r}
module = importlib.import_module("ansible_collections.vmkeeper.libvirt.plugins.modules.{module}")
if {user}:
    os.setgroups([]); os.setgid({user}); os.setuid({user})
module.main()
"""


@dataclass(frozen=True)
class Outcome:
    """What a task answered. ``answer`` is empty when it was killed; ``seconds`` is wall time."""

    answer: dict[str, Any]
    rc: int
    seconds: float
    stderr: str = ""

    @property
    def failed(self) -> bool:
        """It failed with an answer."""
        return bool(self.answer.get("failed"))

    @property
    def killed(self) -> bool:
        """It ended without an answer."""
        return self.rc < 0

    @property
    def changed(self) -> bool:
        """It says that it changed something."""
        return bool(self.answer["changed"])

    @property
    def message(self) -> str:
        """Its failure in words."""
        return str(self.answer.get("msg", ""))

    @property
    def warnings(self) -> list[str]:
        """Its warnings as texts, however this version of ansible-core wraps them."""
        return [
            line if isinstance(line, str) else str(line["event"]["msg"]) for line in self.answer.get("warnings", [])
        ]

    def __getitem__(self, key: str) -> Any:
        return self.answer[key]


def start(
    module: str, *, check: bool = False, env: Mapping[str, str] | None = None, user: int = 0, **params: Any
) -> subprocess.Popen[str]:
    """Start a module's own code in a process group of its own, without the controller; as ``user`` once it is loaded."""
    arguments = {**params, "_ansible_check_mode": check, "_ansible_diff": True}
    paths = [str(COLLECTIONS), _only_ansible()]
    process = subprocess.Popen(
        [PYTHON, "-c", _RUN.format(paths=paths, module=module, user=user)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **(env or {})},
        start_new_session=True,
        cwd="/",
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": arguments}))
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen[str], since: float | None = None, timeout: float = TIMEOUT) -> Outcome:
    """Wait for it; raises TimeoutExpired, the failure that no misbehaving agent may cause."""
    began = time.monotonic() if since is None else since
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    answer = json.loads(out[out.index("{") :]) if "{" in out else {}
    assert answer or process.returncode, (out, err)
    return Outcome(answer, process.returncode, time.monotonic() - began, err)


def run(module: str, *, timeout: float = TIMEOUT, **arguments: Any) -> Outcome:
    """Run a module's own code to its end."""
    began = time.monotonic()
    return finish(start(module, **arguments), began, timeout)


def ok(module: str, **arguments: Any) -> Outcome:
    """Run a module that must not fail."""
    outcome = run(module, **arguments)
    assert outcome.rc == 0, (outcome.message, outcome.stderr)
    return outcome


def killed_at(step: str, module: str, log: Path, *, how: str = "kill", **arguments: Any) -> subprocess.Popen[str]:
    """Start a module that is killed (or stopped) at a step of its journal; see tests/lab/killhook."""
    log.unlink(missing_ok=True)
    return start(module, env=kill_environment(log, step, how), **arguments)


def kill_environment(log: Path, step: str = "", how: str = "kill") -> dict[str, str]:
    """The environment that makes the kill hook list the steps, and act at one."""
    environment = {"PYTHONPATH": str(KILLHOOK), "VMK_KILL_LOG": str(log), "VMK_KILL_HOW": how}
    return {**environment, "VMK_KILL_AT": step} if step else environment


def steps_in(log: Path) -> list[str]:
    """The steps that were reached, numbered where one comes twice (``start``, ``start#2``); ``!`` marks a kill."""
    seen: dict[str, int] = {}
    named = []
    for line in log.read_text().split() if log.exists() else []:
        seen[line] = seen.get(line, 0) + 1
        named.append(line if seen[line] == 1 else f"{line}#{seen[line]}")
    return named


def _only_ansible() -> str:
    """A directory with nothing but ansible-core in it: the rest of a virtual environment is not the hypervisor's.

    It is the controller's: module_utils are plain Python, good for any interpreter. A test that empties /run takes it along.
    """
    import ansible

    directory = Path("/run/vmkeeper-lab/only-ansible")
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / "ansible"
    if not link.is_symlink():
        link.symlink_to(Path(ansible.__file__).resolve().parent)
    return str(directory)


def ad_hoc(module: str, arguments: str, *flags: str, interpreter: str = PYTHON, timeout: float = TIMEOUT) -> Outcome:
    """``ansible localhost -m vmkeeper.libvirt.<module> -a '<arguments>'``, as a person types it."""
    began = time.monotonic()
    command = [
        str(Path(sys.executable).with_name("ansible")),
        "localhost",
        "--connection=local",
        f"--extra-vars=ansible_python_interpreter={interpreter}",
        "-m",
        f"vmkeeper.libvirt.{module}",
        "-a",
        arguments,
        *flags,
    ]
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": "/run/vmkeeper-lab/ansible",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    found = re.search(r"=>\s*(\{.*\})", done.stdout, re.DOTALL)
    assert found, (done.stdout, done.stderr)
    answer, _end = json.JSONDecoder().raw_decode(found.group(1))
    if done.returncode:
        answer["failed"] = True
    return Outcome(answer, done.returncode, time.monotonic() - began, done.stdout + done.stderr)
