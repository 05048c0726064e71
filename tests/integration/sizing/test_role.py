# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The playbook brings a machine to a named size, takes a snapshot before disks change, and reports."""

from __future__ import annotations

import os
from typing import Any

import pytest
from lab import ansible
from lab.guest import Guest, GuestSpec

from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory
from ansible_collections.vmkeeper.libvirt.tests.integration.sizing.resizing import online_cpus

SIZES = {"mini": {"vcpus": 1, "memory": "224M"}, "midi": {"vcpus": "2", "memory": "224MiB"}}

#: A survey sends what was left out as an empty answer.
UNSAID = dict.fromkeys(
    (
        "vertical_scale_size",
        "vertical_scale_direction",
        "vertical_scale_vcpus",
        "vertical_scale_memory",
        "vertical_scale_apply",
        "vertical_scale_allow_restart",
        "vertical_scale_allow_shrink",
        "vertical_scale_rollback",
        "vertical_scale_snapshot",
        "vertical_scale_snapshot_name",
        "vertical_scale_health_timeout",
        "vertical_scale_shutdown_timeout",
        "vertical_scale_sizes",
        "vertical_scale_extra_sizes",
        "vertical_scale_guests",
    ),
    "",
)


@pytest.fixture(scope="module")
def machine(module_guest_factory: GuestFactory) -> Guest:
    return module_guest_factory(GuestSpec("role", vcpus=1, max_vcpus=2, memory=224))


def scale(guest: Guest, **variables: Any) -> ansible.PlaybookRun:
    return ansible.run_playbook(
        "vmkeeper.libvirt.scale",
        extra_vars={
            "target": "localhost",
            "ansible_become": False,
            "vertical_scale_select": f"[?name=='{guest.name}']",
            "vertical_scale_overcommit": True,
            "vertical_scale_sizes": SIZES,
            **variables,
        },
    )


def resized(run: ansible.PlaybookRun) -> dict[str, Any]:
    """The result of the task that changes the size, the last of its module."""
    assert run.rc == 0, run.stdout + run.stderr
    return [task.result for task in run.tasks if "restart_required" in task.result][-1]


def test_a_machine_goes_one_size_up_with_a_larger_disk(machine: Guest) -> None:
    disks = [{"target": "vda", "size": "160M"}]
    # That disks may shrink does not keep one that grows from its snapshot.
    run = scale(machine, vertical_scale_direction="up", vertical_scale_disks=disks, vertical_scale_allow_shrink=True)
    result = resized(run)
    assert {change["what"]: change["applied"] for change in result["changes"]} == {
        "vcpus": "live",
        "disk vda": "live",
        "filesystem vda": "live",
    }
    assert online_cpus(machine) == 2
    assert [one.getName() for one in machine.domain().listAllSnapshots()] == ["before-scaling"]
    assert "downtime ms" in run.stdout + str([task.result for task in run.tasks])


def test_a_named_size_that_it_has_changes_nothing(machine: Guest) -> None:
    run = scale(machine, vertical_scale_size="midi", vertical_scale_disks=[{"target": "vda", "size": "160M"}])
    assert not resized(run)["changed"]


def test_each_change_of_disks_has_a_snapshot_of_its_own_and_empty_answers_mean_nothing(machine: Guest) -> None:
    run = scale(machine, **UNSAID, vertical_scale_disks=[{"target": "vda", "size": "192M"}])
    assert [change["what"] for change in resized(run)["changes"]] == ["disk vda", "filesystem vda"]
    first, second = sorted(one.getName() for one in machine.domain().listAllSnapshots())
    assert first == "before-scaling"
    assert second.startswith("before-scaling-2")


def test_checkpoints_of_other_tools_are_found_before_a_snapshot_is_taken(machine: Guest) -> None:
    domain = machine.domain()
    domain.checkpointCreateXML("<domaincheckpoint><name>somebody-elses</name></domaincheckpoint>")
    run = scale(machine, vertical_scale_disks=[{"target": "vda", "size": "208M"}])
    assert run.rc != 0
    assert "somebody-elses" in str([task.result for task in run.tasks])
    assert domain.snapshotNum() == 2
    domain.checkpointLookupByName("somebody-elses").delete()


def test_no_size_beyond_the_largest(machine: Guest) -> None:
    run = scale(machine, vertical_scale_direction="up")
    assert run.rc != 0
    assert "There is no size up" in str([task.result for task in run.tasks])
    assert online_cpus(machine) == 2


def test_a_machine_goes_one_size_down(machine: Guest) -> None:
    assert [change["what"] for change in resized(scale(machine, vertical_scale_direction="down"))["changes"]] == [
        "vcpus"
    ]
    assert online_cpus(machine) == 1


@pytest.mark.skipif(int(os.environ.get("VMK_SCALE", "1")) < 2, reason="make test-long")
def test_hypervisors_are_done_one_after_the_other(machine: Guest) -> None:
    run = ansible.run_playbook(
        "vmkeeper.libvirt.scale",
        extra_vars={
            "target": "localhost,again",  # this hypervisor by another name finds what was done under the first
            "ansible_become": False,
            "vertical_scale_domains": [machine.name],
            "vertical_scale_overcommit": True,
            "vertical_scale_sizes": SIZES,
            "vertical_scale_size": "midi",
        },
        more_hosts={"again": {"ansible_connection": "local", "ansible_python_interpreter": ansible.INTERPRETER}},
    )
    assert run.rc == 0, run.stdout + run.stderr
    done = [task.result["changed"] for task in run.tasks if task.task.endswith("Change the size")]
    assert done == [True, False]
    assert online_cpus(machine) == 2
