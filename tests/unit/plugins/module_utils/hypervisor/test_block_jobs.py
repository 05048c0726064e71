# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import block_jobs


@pytest.fixture
def job(monkeypatch):
    """A running job whose speed can be set: ``bandwidth`` as QEMU has it, None once it is over."""

    class Job:
        bandwidth: int | None = block_jobs.HELD

        def limit(self, _domain, _target, bandwidth):
            if self.bandwidth is None:
                raise LibvirtFailed("Limiting the block job of disk 'vda': there is none")
            self.bandwidth = bandwidth

    made = Job()
    monkeypatch.setattr(block_jobs, "limit", made.limit)
    monkeypatch.setattr(
        block_jobs,
        "job_of",
        lambda _domain, _target: None if made.bandwidth is None else {"type": "commit", "bandwidth": made.bandwidth},
    )
    return made


def test_a_held_job_goes_on_at_the_speed_that_was_asked(job):
    block_jobs.release(object(), "vda", 1 << 20)
    assert job.bandwidth == 1 << 20


def test_the_speed_that_somebody_gave_a_job_is_left_alone(job):
    job.bandwidth = 5 << 20
    block_jobs.release(object(), "vda", 0)
    assert job.bandwidth == 5 << 20


def test_a_job_that_is_over_needs_no_release(job):
    job.bandwidth = None
    block_jobs.release(object(), "vda", 0)


def test_a_job_that_ends_while_it_is_released_is_no_failure(job, monkeypatch):
    def ends(_domain, _target, _bandwidth):
        job.bandwidth = None
        raise LibvirtFailed("Limiting the block job of disk 'vda': there is none")

    monkeypatch.setattr(block_jobs, "limit", ends)
    block_jobs.release(object(), "vda", 0)
    assert job.bandwidth is None


def test_a_held_job_that_an_interrupted_run_left_is_released_by_the_next(job, monkeypatch):
    monkeypatch.setattr(block_jobs, "_in_chain", lambda *_arguments: True)
    block_jobs.begin_intermediate(object(), "vda", "/base", "/top")
    assert job.bandwidth == 0
