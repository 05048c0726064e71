# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of a restart whose run was killed: what a guest may have written since is never thrown away."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.binding import libvirt
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import DomainState
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Operation
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import settle, shrinking
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing import a_domain


def interrupted(*steps: str, was_running: bool = True) -> Operation:
    plan = {"was_running": was_running, "health_timeout": 300.0, "rollback": True}
    return Operation("resize", [], plan, steps=[{"name": name, "at": 1000.0} for name in steps])


@pytest.mark.parametrize(
    ("steps", "reason", "again"),
    [
        (("shutdown", "start"), "shutdown", True),  # by the run itself, which did not get to the start
        (("shutdown", "start", "health"), "shutdown", False),
        (("shutdown", "start", "health"), "destroyed", False),
        (("shutdown", "start"), "destroyed", False),
        (("shutdown", "start", "health"), "crashed", True),
        (("shutdown", "start", "health"), "unknown", True),  # the host was started anew
    ],
)
def test_a_guest_that_somebody_has_switched_off_since_its_start_is_not_started(steps, reason, again):
    assert settle.starts_again(interrupted(*steps), reason) is again


def test_a_domain_that_was_off_is_started_to_prove_itself_unless_it_was_saved():
    off = interrupted("shutdown", "start", "health", was_running=False)
    assert settle.starts_again(off, "destroyed")
    assert not settle.starts_again(off, "saved", saved=True)


def test_a_running_guest_is_judged_in_the_place_of_the_run_for_a_while_only():
    assert settle.is_recent(interrupted("start", "health"), 1500.0)
    assert not settle.is_recent(interrupted("start", "health"), 7 * 86400.0)


def test_a_copy_that_a_guest_has_written_is_told_from_one_that_was_only_made(tmp_path):
    path, kept = tmp_path / "disk", tmp_path / "disk.original"
    shrinks = [{"path": str(path), "kept": str(kept)}]
    path.touch()
    os.utime(path, (1000, 1000))
    assert not shrinking.written_since(shrinks, 0), "nothing was swapped"
    kept.touch()
    assert not shrinking.written_since(shrinks, 1001)
    assert shrinking.written_since(shrinks, 999)


class Refusing:
    """A domain that is off, and that libvirt does not start."""

    def isActive(self):
        return False

    def create(self):
        raise libvirt.libvirtError("no")

    def name(self):
        return "d"


@pytest.mark.parametrize(("steps", "ran"), [(("shutdown", "start"), False), (("shutdown", "start", "health"), True)])
def test_a_smaller_disk_that_the_domain_never_started_on_is_taken_back(monkeypatch, tmp_path, steps, ran):
    operation = interrupted(*steps)
    for name in ("path", "kept"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    operation.plan.update(shrinks=[{name: str(tmp_path / name) for name in ("path", "kept")}], judge=True)
    off = a_domain.domain(state=DomainState("shutoff", "failed"))
    monkeypatch.setattr(settle, "read_domain", lambda handle: off)
    monkeypatch.setattr(settle.restart, "is_as_written", lambda handle, plan: True)
    monkeypatch.setattr(settle.restart, "roll_back", lambda connection, journal: None)
    assert settle.has_run(operation) is ran
    journal = SimpleNamespace(operation=operation)
    if ran:
        with pytest.raises(VmkeeperError, match="nothing was taken back"):
            settle._started(None, Refusing(), journal)
        return
    assert settle._started(None, Refusing(), journal) == "taken back: it runs with its old definition"
    (tmp_path / "path").write_text("a guest has written")
    with pytest.raises(VmkeeperError, match="nothing was taken back"):
        settle._started(None, Refusing(), journal)


@pytest.mark.parametrize(
    ("timeout", "now", "seconds"),
    [
        (300.0, 1010.0, 290.0),  # as long as the run itself would have waited
        (300.0, 1290.0, 60.0),
        (300.0, 9000.0, 60.0),
        (300.0, 900.0, 300.0),  # a clock that was set back
        (2.0, 1001.0, 2.0),
    ],
)
def test_a_guest_that_was_told_to_shut_down_has_the_time_that_its_task_gave_it(timeout, now, seconds):
    operation = interrupted("define", "shutdown")
    operation.plan["shutdown_timeout"] = timeout
    assert settle.patience(operation, now) == seconds


@pytest.mark.parametrize(
    ("steps", "ended", "reason", "switched_off"),
    [
        (("rollback", "start-old"), "destroyed", "shutdown", True),
        (("rollback", "start-old"), "destroyed", "destroyed", False),  # by the way back itself
        (("rollback", "start-old"), "shutdown", "shutdown", False),  # the new size had ended itself
        (("rollback", "start-old"), "destroyed", "crashed", False),
        (("rollback", "put-back"), "destroyed", "shutdown", False),
    ],
)
def test_a_guest_that_ran_with_its_old_size_again_and_was_shut_down_since_stays_off(steps, ended, reason, switched_off):
    operation = interrupted("shutdown", "start", "health", *steps)
    operation.steps[-1]["ended"] = ended
    assert settle.was_switched_off(operation, reason) is switched_off
