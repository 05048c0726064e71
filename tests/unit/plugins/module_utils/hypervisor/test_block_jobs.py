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


def test_another_job_that_came_in_between_means_that_nothing_was_written(job, monkeypatch):
    monkeypatch.setattr(block_jobs, "job_of", lambda *_arguments: {"type": "copy", "bandwidth": 0})
    monkeypatch.setattr(block_jobs, "_in_chain", lambda *_arguments: True)
    for begin in (block_jobs.begin_intermediate, block_jobs.pull):
        with pytest.raises(block_jobs.NotBegun, match="copy") as refused:
            begin(Named(), "vda", "/base", "/top")
        assert refused.value.kind == "busy"
        assert "still has" in refused.value.state


class Named:
    def name(self):
        return "web"


class Copying:
    """A domain whose backup job libvirt reports; ``jobs``: the disks that have a job in QEMU."""

    def __init__(self, jobs):
        self.jobs = set(jobs)
        self.backup = True

    def backupGetXMLDesc(self, _flags):
        if not self.backup:
            raise block_jobs.libvirt.libvirtError("no domain backup job present")
        disks = "".join(f"<disk name='vd{one}' backup='{'no' if one == 'c' else 'yes'}'/>" for one in "abc")
        return f"<domainbackup><disks>{disks}</disks></domainbackup>"

    def blockJobInfo(self, target, _flags):
        return {"type": 5} if target in self.jobs else {}


@pytest.fixture
def looking(monkeypatch):
    """Looks at a domain once a second; returns after how many seconds its job is called lost, None within a minute."""

    def look(domain, happening=None):
        watch = block_jobs.BackupWatch()
        for second in range(1, 60):
            monkeypatch.setattr(block_jobs.time, "monotonic", lambda now=second: float(now))
            if happening is not None:
                happening(domain, second)
            if watch.is_lost(domain):
                return second
        return None

    return look


def test_a_backup_job_that_nothing_copies_for_is_lost(looking):
    assert looking(Copying([])) == 1 + int(block_jobs._LOST_SECONDS) + 1
    assert looking(Copying(["vdc"])) is not None, "it takes no part in the backup"


def test_a_backup_job_is_not_lost_while_any_disk_is_copied(looking):
    assert looking(Copying(["vdb"])) is None


def test_a_pause_between_jobs_is_no_loss(looking):
    def now_and_then(domain, second):
        domain.jobs = {"vda"} if second % 8 == 0 else set()

    assert looking(Copying([]), now_and_then) is None


def test_a_backup_job_that_libvirt_reports_no_more_is_not_lost_but_over(looking):
    def ends(domain, second):
        domain.backup = second < 5

    assert looking(Copying([]), ends) is None


class Starved:
    """A domain after a copy, ``paused`` by a write that found no room; ``fails`` at one of the calls."""

    def __init__(self, fails="", paused=True, code=None):
        self.fails, self.paused, self.code = fails, paused, code

    def name(self):
        return "web"

    def _call(self, name):
        if self.fails == name:
            error = block_jobs.libvirt.libvirtError("client socket is closed")
            error.get_error_code = lambda: self.code
            raise error

    def state(self):
        self._call("state")
        return [3, 5] if self.paused else [1, 1]

    def resume(self):
        self._call("resume")
        self.paused = False


def test_a_guest_that_a_full_target_has_stopped_runs_on():
    domain = Starved()
    block_jobs.resume_starved(domain, seconds=0.0)
    assert not domain.paused


def test_a_guest_is_called_paused_only_where_that_was_read():
    with pytest.raises(LibvirtFailed, match="client socket is closed") as failed:
        block_jobs.resume_starved(Starved("state", paused=False), seconds=0.0)
    said = str(failed.value)
    assert "It is paused" not in said
    assert "Resuming" not in said
    assert "not known" in failed.value.state
    with pytest.raises(LibvirtFailed, match=r"Resuming domain 'web'.* It is paused; its writes are kept"):
        block_jobs.resume_starved(Starved("resume"), seconds=0.0)


def test_a_transient_guest_that_has_gone_meanwhile_needs_no_resuming():
    block_jobs.resume_starved(Starved("state", code=block_jobs.libvirt.VIR_ERR_NO_DOMAIN), seconds=0.0)
