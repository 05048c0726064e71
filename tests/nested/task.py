# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A task of the collection, done in a nested hypervisor over ssh, as Ansible does it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .machine import Machine

COLLECTIONS = Path(__file__).resolve().parents[2] / ".ansible" / "collections"


class TaskFailed(RuntimeError):
    """The task failed; the message is its own."""


def run(machine: Machine, module: str, *, timeout: float = 900.0, **arguments: Any) -> dict[str, Any]:
    """What ``vmkeeper.libvirt.<module>`` answers. Raises TaskFailed."""
    options = " ".join(f"-o {name}={value}" for name, value in machine.ssh_options.items())
    variables = {
        "ansible_host": "127.0.0.1",
        "ansible_port": machine.port,
        "ansible_user": "root",
        "ansible_ssh_common_args": options,
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    command = [
        str(Path(sys.executable).with_name("ansible")),
        machine.name,
        f"--inventory={machine.name},",
        f"--extra-vars={json.dumps(variables)}",
        f"--module-name=vmkeeper.libvirt.{module}",
        f"--args={json.dumps(arguments)}",
    ]
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": str(machine.directory / "ansible"),
    }
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
    )
    found = re.search(r"=>\s*(\{.*\})", done.stdout, re.DOTALL)
    if found is None:
        raise TaskFailed(done.stdout + done.stderr)
    answer: dict[str, Any] = json.JSONDecoder().raw_decode(found.group(1))[0]
    if done.returncode:
        raise TaskFailed(str(answer.get("msg")))
    return answer
