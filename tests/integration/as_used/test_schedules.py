# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Defaults for the whole action group, and schedules that start the same job twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.integration.as_used.runner import Controller
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory


@pytest.fixture(scope="module")
def nightly(module_guest_factory: GuestFactory) -> Guest:
    """A machine that is backed up by a schedule."""
    disk = DiskSpec("vda", size=32 * MIB, fs=None, writer=False)
    guest = module_guest_factory(GuestSpec("nightly", disks=(disk,)))
    guest.exec("dd if=/dev/urandom of=/dev/vda bs=1M count=16; sync")
    return guest


@pytest.fixture
def repository(nightly: Guest) -> Iterator[Path]:
    """An empty repository."""
    path = nightly.directory / "repository"
    path.mkdir(mode=0o711)
    yield path
    shutil.rmtree(path)


def test_module_defaults_of_the_group_reach_the_modules(controller: Controller) -> None:
    arguments = {
        "domain_info": {},
        "fsfreeze": {"domain": "x", "state": "thawed"},
        "backup_info": {"repository": "/nowhere"},
    }
    play = {
        "hosts": "hypervisors",
        "gather_facts": False,
        "module_defaults": {"group/vmkeeper.libvirt.all": {"uri": "qemu+ssh://elsewhere/system"}},
        "tasks": [
            {"name": name, f"vmkeeper.libvirt.{name}": given, "ignore_errors": True}
            for name, given in arguments.items()
        ],
    }
    job = controller.succeed([play])
    for name in arguments:
        (answer,) = job.results(name)
        assert "qemu+ssh://elsewhere/system" in answer["msg"], "a default that arrived is refused: it is another host's"


def test_a_schedule_that_fires_twice_makes_one_point(controller: Controller, nightly: Guest, repository: Path) -> None:
    survey = {
        "hosts": "hypervisors",
        "consistent_backup_repository": str(repository),
        "consistent_backup_domains": nightly.name,
        "consistent_backup_min_age": "12h",
        "consistent_backup_quiesce": "never",
    }
    jobs = [job.end() for job in [controller.launch("backup", **survey), controller.launch("backup", **survey)]]
    assert [(job.rc, job.status) for job in jobs] == [(0, "successful")] * 2, jobs[0].output + jobs[1].output
    made = [job.results("Back up")[0] for job in jobs]
    assert sorted(answer["changed"] for answer in made) == [False, True]
    assert made[0]["restore_points"][0]["id"] == made[1]["restore_points"][0]["id"]
    (image,) = repository.glob("*/*/vda.qcow2")
    evidence.check(image)
    assert nightly.is_running()


def test_two_jobs_that_both_have_to_act_act_one_after_the_other(
    controller: Controller, nightly: Guest, repository: Path
) -> None:
    survey = {
        "hosts": "hypervisors",
        "consistent_backup_repository": str(repository),
        "consistent_backup_domains": nightly.name,
        "consistent_backup_quiesce": "never",
    }
    jobs = [job.end() for job in [controller.launch("backup", **survey), controller.launch("backup", **survey)]]
    assert [(job.rc, job.status) for job in jobs] == [(0, "successful")] * 2, jobs[0].output + jobs[1].output
    points = sorted(
        (job.results("Back up")[0]["restore_points"][0] for job in jobs), key=lambda point: point["sequence"]
    )
    assert [point["sequence"] for point in points] == [1, 2]
    assert points[1]["parent"] == points[0]["id"]
    images = sorted(repository.glob("*/*/vda.qcow2"))
    assert len(images) == 2
    assert evidence.same_content(images[0], images[1]), "nobody wrote in between"


def test_the_same_snapshot_twice_at_once_is_taken_once(controller: Controller, nightly: Guest) -> None:
    survey = {"domains": nightly.name, "snapshot": "twice", "quiesce": "never"}
    jobs = [job.end() for job in [controller.launch("snapshot", **survey), controller.launch("snapshot", **survey)]]
    assert [(job.rc, job.status) for job in jobs] == [(0, "successful")] * 2, jobs[0].output + jobs[1].output
    assert sorted(job.results("See to the snapshot")[0]["changed"] for job in jobs) == [False, True]
    assert len(nightly.chain("vda")) == 2
