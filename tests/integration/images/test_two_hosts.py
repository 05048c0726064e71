# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role's playbooks, through real Ansible, from one hypervisor to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest

from . import tasks

HERE = Path(__file__).parent


def playbook(name: str, **variables: Any) -> str:
    """Run a playbook of the collection on this host; its recap. Raises when it fails."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local",
         f"vmkeeper.libvirt.{name}", "-e", json.dumps({"target": "all", "ansible_python_interpreter": tasks.PYTHON, **variables})],
        capture_output=True, text=True, check=False, timeout=tasks.TIMEOUT,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(tasks.ROOT / ".ansible" / "collections")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rpartition("PLAY RECAP")[2]


def test_a_machine_is_shared_on_one_host_and_launched_on_another_through_the_role(
    running: Guest, tmp_path: Path
) -> None:
    running.write_file("/disk/vdb/greeting", b"from the first host")
    # Both hosts see this directory, and QEMU's user cannot reach it: the copy goes through the scratch directory.
    library = tmp_path / "library"
    share = {
        "image_share_domain": running.name,
        "image_share_name": "golden",
        "image_share_library": str(library),
        "image_share_with": ["user:nobody"],
    }
    assert "failed=0" in playbook("share", **share)
    assert [path.name for path in Path("/var/lib/libvirt/images").glob(".vmkeeper-export-*")] == []
    assert sorted(path.name for path in library.iterdir()) == ["CATALOGUE.md", "golden"]

    enter = [str(tasks.ROOT / "tests" / "lab" / "enter"), "--name", f"{os.environ['VMK_LAB_HOST']}-b", "--"]
    done = subprocess.run(
        [*enter, sys.executable, str(HERE / "second_host.py"), str(library)],
        capture_output=True, text=True, check=False, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["greeting"] == "from the first host"
    assert said["uuid"] != running.domain().UUIDString()
    assert said["second_run"] == "changed=0"
    assert (said["vcpus"], said["memory"]) == (2, 200 << 10)
    assert running.is_running()
    assert "lab-elsewhere" not in [domain.name() for domain in running.connection().listAllDomains()]
