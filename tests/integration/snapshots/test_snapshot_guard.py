# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role snapshot_guard and the playbooks, by the real ansible-playbook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import ways
from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots.proof import in_test_long
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import MIB

ROLE = """
- hosts: all
  gather_facts: false
  roles:
    - role: vmkeeper.libvirt.snapshot_guard
"""

CHANGE = """
- name: Change the disk
  ansible.builtin.command:
    cmd: qemu-io -f qcow2 -c "write -q -s {{ new_content }} 1M 512" {{ item.source }}
  loop: "{{ overlay.domains[0].disks }}"
"""

LOOK = """
- name: Where the guest writes now
  vmkeeper.libvirt.domain_info:
    domain: "{{ snapshot_guard_report.domains[0] }}"
  register: overlay
"""

CHECK = """
- name: The application answers
  ansible.builtin.fail:
    msg: it does not
  when: bad | bool
"""


@pytest.fixture(scope="module")
def stopped(make_guest: Callable[..., Guest]) -> Guest:
    guest = make_guest(GuestSpec("guarded", disks=(DiskSpec("vda", size=8 * MIB, fs=None, writer=False),)), start="no")
    ways.write_stopped(guest, "old")
    return guest


def playbook(
    name: str, *flags: str, environ: Mapping[str, str] | None = None, **variables: Any
) -> subprocess.CompletedProcess[str]:
    """Run a playbook on this host, with these flags of ansible-playbook."""
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(tasks.COLLECTIONS),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": "/run/vmkeeper-lab/ansible",
        **(environ or {}),
    }
    extra = {"ansible_python_interpreter": tasks.PYTHON, **variables}
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    command = [program, "-i", "hypervisor,", "-c", "local", "-e", json.dumps(extra), name, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def guard(
    guest: Guest, where: Path, *flags: str, bad: bool, **options: Any
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the role with a change of the disk and a check that fails if ``bad``; returns its end and its report."""
    (where / "play.yml").write_text(ROLE)
    (where / "change.yml").write_text(LOOK + CHANGE)
    (where / "check.yml").write_text(CHECK)
    (where / "new").write_bytes(b"new".ljust(ways.SECTOR, b"\0"))
    done = playbook(
        str(where / "play.yml"),
        *flags,
        snapshot_guard_select=f"[?name=='{guest.name}' && persistent]",
        snapshot_guard_tasks_file=str(where / "change.yml"),
        snapshot_guard_check_file=str(where / "check.yml"),
        snapshot_guard_report_file=str(where / "report-{host}.yml"),
        new_content=str(where / "new"),
        bad=bad,
        **options,
    )
    report = "".join(path.read_text() for path in where.glob("report-*.yml"))
    assert not (where / "report-{host}.yml").exists()
    return done, report


def test_a_change_that_fails_its_check_is_taken_back_and_told(stopped: Guest, tmp_path: Path) -> None:
    done, report = guard(stopped, tmp_path, bad=True, snapshot_guard_keep_failed_as="failed")
    assert done.returncode != 0
    assert "it does not" in report
    assert "went back" in report
    assert ways.read_stopped(stopped.active_paths().values()) == {"old"}
    assert ways.snapshots(stopped) == {"failed": None}
    assert ways.read_stopped(ways.bases(stopped, "failed").values()) == {"new"}
    tasks.ok("snapshot", domain=stopped.name, name="failed", state="absent")
    tasks.ok("blockcommit", domain=stopped.name)
    ways.assert_whole(stopped)


def test_a_snapshot_of_its_name_that_anybody_has_taken_is_neither_gone_back_to_nor_removed(
    stopped: Guest, tmp_path: Path
) -> None:
    tasks.ok("snapshot", domain=stopped.name, name="snapshot-guard", description="before the audit")
    for bad in (True, False):
        done, report = guard(stopped, tmp_path, bad=bad)
        assert done.returncode != 0
        assert "There is a snapshot snapshot-guard already" in done.stdout
        assert "nothing was changed" in report
        assert ways.snapshots(stopped) == {"snapshot-guard": None}
    (found,) = tasks.ok("snapshot_info", domain=stopped.name)["snapshots"]
    assert found["description"] == "before the audit"
    tasks.ok("snapshot", domain=stopped.name, name="snapshot-guard", state="absent")


@pytest.mark.parametrize(
    ("bad", "outcome"),
    [(True, "the change would fail"), pytest.param(False, "the change would be made", marks=in_test_long)],
)
def test_check_mode_says_what_would_be(stopped: Guest, tmp_path: Path, bad: bool, outcome: str) -> None:
    done, _report = guard(stopped, tmp_path, "--check", bad=bad)
    assert (done.returncode != 0) == bad
    assert f'"outcome": "{outcome}"' in done.stdout
    assert '"state_now": "as before"' in done.stdout
    assert ways.snapshots(stopped) == {}


def test_a_snapshot_that_fails_after_its_cut_is_not_reported_as_nothing(stopped: Guest, tmp_path: Path) -> None:
    killed = tasks.kill_environment(tmp_path / "steps", "label")
    done, report = guard(stopped, tmp_path, bad=False, environ=killed)
    assert done.returncode != 0
    assert "the snapshot failed; the change was not begun" in report
    assert "state_now: look at snapshot_info" in report
    assert ways.snapshots(stopped) == {"snapshot-guard": None}
    tasks.ok("recover_domain", domain=stopped.name)
    tasks.ok("snapshot", domain=stopped.name, name="snapshot-guard", state="absent")
    ways.assert_whole(stopped)


def test_where_no_domain_is_chosen_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(ROLE)
    done = playbook(
        str(tmp_path / "play.yml"), snapshot_guard_select="[?name=='nobody']", snapshot_guard_tasks_file="change.yml"
    )
    assert done.returncode != 0
    assert "There is no domain to change" in done.stdout


def test_a_good_change_stays_and_the_chain_is_flat_again(stopped: Guest, tmp_path: Path) -> None:
    done, report = guard(stopped, tmp_path, bad=False)
    assert done.returncode == 0, done.stdout
    assert "the change was made" in report
    assert ways.read_stopped(stopped.active_paths().values()) == {"new"}
    assert ways.files(stopped) == {"vda.qcow2"}


def test_the_playbooks_take_a_snapshot_and_flatten(stopped: Guest) -> None:
    done = playbook(
        "vmkeeper.libvirt.snapshot", target="all", domains=[stopped.name], snapshot="by-playbook", ansible_become=False
    )
    assert done.returncode == 0, done.stdout
    assert ways.snapshots(stopped) == {"by-playbook": None}
    done = playbook("vmkeeper.libvirt.flatten", target="all", domains=[stopped.name], ansible_become=False)
    assert done.returncode == 0, done.stdout
    assert ways.snapshots(stopped) == {}
    assert ways.files(stopped) == {"vda.qcow2"}
