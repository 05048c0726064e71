# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of test_two_hosts.py that runs on the second host: launch the image, and tell what its guest says."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

import libvirt  # noqa: E402
import libvirt_qemu  # noqa: E402
from lab.host import TestHost  # noqa: E402

NAME = "lab-elsewhere"
PATIENCE = 600


def launch(library: str) -> str:
    """Run the playbook; its recap."""
    variables = {
        "target": "all",
        "ansible_python_interpreter": "/usr/bin/python3",
        "image_share_name": "golden",
        "image_share_library": library,
        "image_share_new_domain": NAME,
        "image_share_mode": "linked",
        "image_share_vcpus": 2,
        "image_share_memory": "200M",
        "image_share_virt_type": "qemu",
    }
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local",
         "vmkeeper.libvirt.launch", "-e", json.dumps(variables)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".ansible" / "collections")},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout.rpartition("PLAY RECAP")[2]


def ask(domain: Any, execute: str, **arguments: Any) -> Any:
    """One command to the guest's agent, asked until it answers."""
    command = json.dumps({"execute": execute, "arguments": arguments})
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return json.loads(libvirt_qemu.qemuAgentCommand(domain, command, 10, 0))["return"]
        except libvirt.libvirtError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.5)


def main(library: str) -> None:
    """Print one line of JSON."""
    host = TestHost()
    host.start()
    connection = host.connect()
    try:
        launch(library)
        domain = connection.lookupByName(NAME)
        handle = ask(domain, "guest-file-open", path="/disk/vdb/greeting")
        content = ask(domain, "guest-file-read", handle=handle)["buf-b64"]
        again = re.search(r"changed=\d+", launch(library))
        info = domain.info()
        print(
            json.dumps(
                {
                    "greeting": base64.b64decode(content).decode(),
                    "uuid": domain.UUIDString(),
                    "second_run": again.group() if again else None,
                    "vcpus": info[3],
                    "memory": info[1],
                }
            )
        )
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.lookupByName(NAME).destroy()


if __name__ == "__main__":
    main(sys.argv[1])
