# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs on a domain now: workers of ours, and block jobs of anybody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import block_jobs
from ..hypervisor.block_jobs import TookTooLong
from ..hypervisor.domain_model import read_domain
from . import journal, locks, worker
from .settlement import Settler
from .worker import FAILED, INTERRUPTED, Job


def newest(handle: Any) -> Job | None:
    """The newest worker of the domain: one that runs before one that is over."""
    jobs = worker.jobs_of(handle.UUIDString())
    return next((job for job in jobs if not job.over), jobs[0] if jobs else None)


def block_jobs_of(handle: Any) -> list[dict[str, Any]]:
    """``{disk, type, bandwidth, done, total, ready}`` of each disk with a running job."""
    if not handle.isActive():
        return []
    found = []
    for disk in read_domain(handle).disks:
        if disk.active is None or disk.device in ("cdrom", "floppy"):
            continue
        job = block_jobs.job_of(handle, disk.target)
        if job is not None:
            found.append({"disk": disk.target, **job})
    return found


def limit_all(handle: Any, bandwidth: int, *, check: bool = False) -> bool:
    """Limit every running block job to ``bandwidth`` bytes per second (0: no limit); True when one was changed."""
    changed = False
    for job in block_jobs_of(handle):
        if job["bandwidth"] != bandwidth:
            changed = True
            if not check:
                block_jobs.limit(handle, job["disk"], bandwidth)
    return changed


def wait_for(handle: Any, *, seconds: float | None = None) -> None:
    """Wait until the domain's worker is over; raises if it failed, or is not over after ``seconds``."""
    job = newest(handle)
    if job is None:
        return
    after = worker.wait(job.id, seconds=seconds)
    if after is None:
        return
    if not after.over:
        raise TookTooLong(
            f"The {after.operation} of domain {handle.name()!r} is not over after {seconds:.0f} s",
            state="It goes on.",
            advice="Wait again, or cancel it with state: absent",
            job=after.as_result(),
        )
    if after.state in (FAILED, INTERRUPTED):
        said = (after.error or {}).get("msg", "its worker died")
        raise VmkeeperError(
            f"The {after.operation} of domain {handle.name()!r} has not succeeded: {said}",
            state="",
            advice="Run its task again" if after.state == INTERRUPTED else "",
            job=after.as_result(),
        )


def cancel(uri: str, handle: Any, cancellers: Mapping[str, Settler], *, check: bool = False) -> bool:
    """End the domain's worker and its block jobs; True when there was something to end."""
    uuid, name = handle.UUIDString(), handle.name()
    job = newest(handle)
    working = job is not None and not job.over
    running = block_jobs_of(handle)
    if check or not (working or running):
        return bool(working or running)
    if working and job is not None:
        worker.stop(job.id)
    elif locks.holder(uuid) is not None:
        # A task waits for the job: it sees it end, and leaves everything in order itself.
        for one in running:
            block_jobs.cancel(handle, one["disk"])
        return True
    with locks.hold([(uuid, name)], "cancelling a job"):
        pending = journal.unfinished(uuid)
        if pending is not None and pending.operation.kind in cancellers:
            cancellers[pending.operation.kind](uri, pending)
        for one in block_jobs_of(handle):
            block_jobs.cancel(handle, one["disk"])
    return True
