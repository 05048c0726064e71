# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import long_operation, worker
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.long_operation import Operation, Waiting

ASKED = {"request": {"name": "one", "disks": ("vda",)}}
EXPORT = Operation("export_image", "images.workers", ASKED)


def job(state: str, operation: str = "export_image", disks: tuple[str, ...] = ("vda",)) -> worker.Job:
    """As it is read back: what was asked has been JSON, and the worker was told its domains besides."""
    request = {"request": {"name": "one", "disks": list(disks)}, "domains": [["uuid", "web01"]]}
    return worker.Job(f"{operation}-{state}", operation, (("uuid", "web01"),), state, "2026-01-01", request=request)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[worker.Job]:
    found: list[worker.Job] = []
    monkeypatch.setattr(worker, "all_jobs", lambda: found)
    return found


def test_the_same_task_finds_its_worker_while_that_runs(jobs: list[worker.Job]) -> None:
    jobs += [job("failed"), job("running")]
    assert long_operation.twin(EXPORT) == job("running")
    assert long_operation.twin(EXPORT, over=True) is None
    jobs.append(job("finished"))
    assert long_operation.twin(EXPORT, over=True) == job("finished")


@pytest.mark.parametrize(
    "other", [job("running", disks=("vdb",)), job("running", operation="import_image"), job("interrupted")]
)
def test_another_task_s_worker_is_not_taken_for_it(jobs: list[worker.Job], other: worker.Job) -> None:
    jobs.append(other)
    assert long_operation.twin(EXPORT) is None


def test_a_task_that_waits_without_a_limit_does_it_itself(jobs: list[worker.Job]) -> None:
    def here(check: bool) -> dict[str, Any]:
        return {"changed": True, "check": check}

    answer = long_operation.run(EXPORT, "test:///default", list, here, Waiting())
    assert answer == {"changed": True, "check": False}


def test_a_task_that_is_refused_or_has_nothing_to_do_starts_no_worker(jobs: list[worker.Job]) -> None:
    def here(check: bool) -> dict[str, Any]:
        return {"changed": False, "check": check}

    answer = long_operation.run(EXPORT, "test:///default", list, here, Waiting(wait=False))
    assert answer == {"changed": False, "check": True}


def test_a_task_that_does_not_wait_answers_with_the_worker_that_is_there(jobs: list[worker.Job]) -> None:
    jobs.append(job("running"))
    answer = long_operation.run(EXPORT, "test:///default", list, pytest.fail, Waiting(wait=False))
    assert (answer["job"]["id"], answer["job"]["state"]) == ("export_image-running", "pending")
