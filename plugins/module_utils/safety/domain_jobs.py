# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs on a domain now: workers of ours, and block jobs of anybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._errors import NotFound, VmkeeperError
from ..hypervisor import block_jobs
from ..hypervisor.block_jobs import TookTooLong
from ..hypervisor.connection import find_domain
from ..hypervisor.domain_model import read_domain
from . import journal, locks, release, settlement, worker
from .settlement import Settler
from .worker import CANCELLED, FAILED, INTERRUPTED, Job


@dataclass(frozen=True)
class Subject:
    """The domain that is asked about; without a ``handle`` one that a worker has yet to define."""

    uuid: str
    name: str
    handle: Any | None


def subject_of(connection: Any, wanted: str) -> Subject:
    """The domain ``wanted`` (its name, else its UUID), or the one that a worker makes under that name."""
    try:
        handle = find_domain(connection, wanted)
    except NotFound:
        # One that runs before one that is over, which may have been to make the same domain under another UUID.
        for job in sorted(worker.all_jobs(), key=lambda job: job.over):
            for uuid, name in job.domains:
                if wanted in (name, uuid):
                    return Subject(uuid, name, None)
        raise
    return Subject(handle.UUIDString(), handle.name(), handle)


def newest(uuid: str) -> Job | None:
    """The newest worker of the domain: one that runs before one that is over."""
    jobs = worker.jobs_of(uuid)
    return next((job for job in jobs if not job.over), jobs[0] if jobs else None)


def block_jobs_of(handle: Any | None) -> list[dict[str, Any]]:
    """``{disk, type, bandwidth, done, total, ready}`` of each disk with a running job."""
    if handle is None or not handle.isActive():
        return []
    found = []
    for disk in read_domain(handle).disks:
        if disk.active is None or disk.device in ("cdrom", "floppy"):
            continue
        job = block_jobs.job_of(handle, disk.target)
        if job is not None:
            found.append({"disk": disk.target, **job})
    return found


def limit_all(subject: Subject, bandwidth: int, *, check: bool = False) -> bool:
    """Limit every block job, and those that a worker has yet to begin, to ``bandwidth`` bytes per second (0: no limit).

    True when one that runs was changed.
    """
    changed = False
    job = newest(subject.uuid)
    if job is not None and not job.over and not check:
        worker.limit(job.id, bandwidth)  # first: a job that begins in between is among those that run, or knows
    for running in block_jobs_of(subject.handle):
        if running["bandwidth"] != bandwidth:
            changed = True
            if not check:
                block_jobs.limit_running(subject.handle, running["disk"], bandwidth)
    return changed


def wait_for(job: Job, *, seconds: float | None = None) -> Job:
    """Wait until a worker is over and return it; raises if it failed, or is not over after ``seconds``."""
    after = worker.wait(job.id, seconds=seconds) or job
    names = ", ".join(repr(name) for _uuid, name in job.domains)
    if after.state in (FAILED, INTERRUPTED, CANCELLED):
        died = "it was cancelled" if after.state == CANCELLED else "its worker died"
        said = (after.error or {}).get("msg", died)
        failure = VmkeeperError(
            f"The {after.operation} of domain {names} has not succeeded: {said}",
            state="",
            advice="Run its task again" if after.state == INTERRUPTED else "",
            job=after.as_result(),
        )
        failure.kind = (after.error or {}).get("kind", failure.kind)
        raise failure
    if not after.over and seconds is not None:
        raise TookTooLong(
            f"The {after.operation} of domain {names} is not over after {seconds:.0f} s",
            state="It goes on.",
            advice="Wait for it with domain_job and state: finished, or cancel it with state: absent",
            job=after.as_result(),
        )
    return after


def cancel(uri: str, subject: Subject, cancellers: Mapping[str, Settler], *, check: bool = False) -> bool:
    """End the domain's worker and its block jobs; True when there was something to end.

    What the worker had begun on its other domains ends, too.
    """
    job = newest(subject.uuid)
    working = job is not None and not job.over
    running = block_jobs_of(subject.handle)
    domains = {subject.uuid: subject.name}
    if check or not (working or running):
        return bool(working or running)
    if working and job is not None:
        worker.stop(job.id)
        domains.update(job.domains)
    elif locks.holder(subject.uuid) is not None:
        # A task waits for the job: it sees it end, and leaves everything in order itself.
        _end_all(subject.handle, running)
        return True
    with settlement.hold(list(domains.items()), "cancelling a job"):
        for uuid in domains:
            release.release_orphans(uuid)  # it may have been ended while the guest was frozen
            pending = journal.unfinished(uuid)
            if pending is not None and pending.operation.kind in cancellers:
                cancellers[pending.operation.kind](uri, pending)
        _end_all(subject.handle, block_jobs_of(subject.handle))
    if working and job is not None:
        worker.mark_cancelled(job.id)
    return True


def _end_all(handle: Any | None, running: list[dict[str, Any]]) -> None:
    for one in running:
        if one["type"] == "backup":
            block_jobs.abort_backup(handle)  # all its disks at once
        else:
            block_jobs.cancel(handle, one["disk"])
