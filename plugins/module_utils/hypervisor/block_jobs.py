# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Live block jobs, whose end is believed only when the domain XML says so.

libvirt 9.0: the job event can precede the XML (NEWS 9.1.0), and "100 %" is not "ready": an active commit is over when the
``<mirror>`` is gone and the active layer is the one that was committed into.
"""

from __future__ import annotations

import os
import time
from typing import Any
from xml.etree import ElementTree

from .._errors import Busy, LibvirtFailed
from .binding import libvirt
from .connection import code_of, constant, explaining, is_gone, message_of
from .domain_model import Disk, DomainState, read_domain, read_state

_POLL_SECONDS = 0.05
_LOOK_SECONDS = 1.0
_LOST_SECONDS = 10.0

#: A speed (bytes per second) at which a job begins and does not end: it waits for :func:`release`.
HELD = 1


def live_disk(domain: Any, target: str) -> Disk:
    """The disk as the live XML states it now."""
    disk = read_domain(domain).disk(target)
    if disk is None:
        raise LibvirtFailed(f"Disk {target!r} of domain {domain.name()!r} has gone", advice="See domain_info")
    return disk


def commit_active(
    domain: Any, target: str, base: str, *, bandwidth: int = 0, seconds: float | None = 600.0, patience: float = 5.0
) -> None:
    """Commit everything above ``base`` (a path of the chain) into it and make it the active layer again.

    ``bandwidth`` in bytes per second, 0 for no limit.  Takes up a job that already runs.  Raises when the XML does not say
    within ``seconds`` (None: no limit) that it is done; the guest runs on either way.
    """
    state = f"The guest runs; disk {target!r} still has its overlay."
    disk = live_disk(domain, target)
    if disk.job is None and disk.path != base:
        _start_commit(domain, target, base, None, bandwidth, state)
    elif disk.job is not None and not _is_commit_into(disk, base):
        raise _foreign_job(domain, target, disk.job.job, state)
    waiting = _Waiting(seconds, patience)
    while True:
        disk = live_disk(domain, target)
        if disk.job is None:
            if disk.path == base:
                return
            if waiting.gone_for_long():
                raise _ended_early(domain, target, state)
        elif disk.job.ready and _pivot(domain, target):
            continue
        waiting.pause(domain, target, state)


def commit_intermediate(
    domain: Any, target: str, base: str, top: str, *, bandwidth: int = 0, seconds: float | None = None
) -> None:
    """Commit the layers from ``top`` (not the active one) down to ``base`` into it; arguments as :func:`commit_active`."""
    state = f"The guest runs; disk {target!r} still has the layer {top}."
    begin_intermediate(domain, target, base, top, bandwidth=bandwidth)
    _wait_until_left(domain, target, top, state, seconds, "commit")


def begin_intermediate(domain: Any, target: str, base: str, top: str, *, bandwidth: int = 0) -> None:
    """Begin a :func:`commit_intermediate`, unless it runs or is over. Raises :class:`NotBegun`."""
    # The job first, the chain second: one that ends in between has changed the chain before it went.
    job = job_of(domain, target)
    if not _in_chain(domain, target, top):
        return
    state = f"The guest runs; disk {target!r} still has the layer {top}."
    if job is None:
        try:
            _start_commit(domain, target, base, top, bandwidth, state)
        except NotBegun:
            if _in_chain(domain, target, top):
                raise
    elif job["type"] != "commit":
        raise _foreign_job(domain, target, job["type"], state)
    elif bandwidth != HELD:
        release(domain, target, bandwidth)


def release(domain: Any, target: str, bandwidth: int) -> None:
    """Let a job that was begun with :data:`HELD` go on at this speed; nothing where it is over, or is not held."""
    job = job_of(domain, target)
    if job is None or job["bandwidth"] != HELD:
        return
    try:
        limit(domain, target, bandwidth)
    except LibvirtFailed:
        if job_of(domain, target) is not None:
            raise


def pull(
    domain: Any,
    target: str,
    lowest: str,
    below: str | None,
    *,
    bandwidth: int = 0,
    seconds: float | None = None,
) -> None:
    """Copy the layers between the active one and ``below`` (None: all) into the active one, which then stands on that.

    ``lowest`` is the lowest of them: it leaves the chain last.  Lower layers are only read.  Arguments as
    :func:`commit_active`; takes up a pull that already runs.
    """
    state = f"The guest runs; disk {target!r} still has the layer {lowest}."
    job = job_of(domain, target)
    if not _in_chain(domain, target, lowest):
        return
    if job is None:
        try:
            domain.blockRebase(target, below, bandwidth, constant("VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES") or 0)
        except libvirt.libvirtError as error:
            raise NotBegun(
                f"Pulling the layers of disk {target!r} of domain {domain.name()!r} down to {lowest}: {message_of(error)}",
                state=state,
                advice="See libvirt's log if the reason is not clear",
                libvirt=message_of(error),
            ) from error
    elif job["type"] != "pull":
        raise _foreign_job(domain, target, job["type"], state)
    _wait_until_left(domain, target, lowest, state, seconds, "pull")


def _wait_until_left(domain: Any, target: str, layer: str, state: str, seconds: float | None, kind: str) -> None:
    """Wait until a layer has left the chain, as the XML says."""
    waiting = _Waiting(seconds, 5.0, kind)
    while True:
        # The job first, the chain second: a job that ends in between has changed the chain before it went.
        running = job_of(domain, target) is not None
        if not _in_chain(domain, target, layer):
            return
        if not running and waiting.gone_for_long():
            raise _ended_early(domain, target, state, kind)
        waiting.pause(domain, target, state)


class _Waiting:
    """A limit for the whole wait, and patience with an XML that lags behind the end of the job."""

    def __init__(self, seconds: float | None, patience: float, kind: str = "commit") -> None:
        self._kind = kind
        self._seconds = seconds
        self._give_up = None if seconds is None else time.monotonic() + seconds
        self._patience = patience
        self._gone_since: float | None = None

    def gone_for_long(self) -> bool:
        """Whether the job has been away for so long that it will not be explained by a lag any more."""
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
        return now - self._gone_since > self._patience

    def pause(self, domain: Any, target: str, state: str) -> None:
        """Sleep a little; raises past the limit."""
        if self._give_up is not None and time.monotonic() > self._give_up:
            raise TookTooLong(
                f"The {self._kind} of disk {target!r} of domain {domain.name()!r} did not finish within {self._seconds:.0f} s",
                state=state + " The job goes on.",
                advice="Run this again to take it up, or watch it with domain_job",
                job=job_of(domain, target),
            )
        time.sleep(_POLL_SECONDS)


class NotBegun(LibvirtFailed):
    """The job was not begun: no byte was written."""


class AnotherJob(NotBegun):
    """A job that is not ours has the disk."""

    kind = "busy"


class TookTooLong(LibvirtFailed):
    """The task's patience ended before the job did; nothing was stopped. ``facts['job']`` shows it."""

    kind = "timeout"


def _start_commit(domain: Any, target: str, base: str, top: str | None, bandwidth: int, state: str) -> None:
    flags = constant("VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES") or 0
    if top is None:
        flags |= constant("VIR_DOMAIN_BLOCK_COMMIT_ACTIVE") or 0
    try:
        domain.blockCommit(target, base, top, bandwidth, flags)
    except libvirt.libvirtError as error:
        said = message_of(error)
        advice = "See libvirt's log if the reason is not clear"
        if "Permission denied" in said:
            # libvirt before 12.1: the AppArmor profile of a running guest denies writes to every layer it was started on.
            advice = (
                f"This host's security profile lets QEMU only read {base} until the guest stops: run this again, which"
                " takes another way where there is one, or shut the domain down first, which merges it offline"
            )
        raise NotBegun(
            f"Committing disk {target!r} of domain {domain.name()!r} into {base}: {said}",
            state=state,
            advice=advice,
            libvirt=said,
        ) from error


def _is_commit_into(disk: Disk, base: str) -> bool:
    return disk.job is not None and disk.job.job == "active-commit" and disk.job.destination == base


def _foreign_job(domain: Any, target: str, kind: str, state: str) -> AnotherJob:
    return AnotherJob(
        f"Disk {target!r} of domain {domain.name()!r} has another block job running ({kind})",
        state=state,
        advice="Wait for it (domain_job shows it), then run this again",
    )


def _ended_early(domain: Any, target: str, state: str, kind: str = "commit") -> LibvirtFailed:
    return LibvirtFailed(
        f"The {kind} of disk {target!r} of domain {domain.name()!r} ended without success",
        state=state,
        advice="See the free space of the image's filesystem and QEMU's log, then run this again",
    )


def _in_chain(domain: Any, target: str, path: str) -> bool:
    real = os.path.realpath(path)
    return any(layer.path and os.path.realpath(layer.path) == real for layer in live_disk(domain, target).chain)


#: virDomainBlockJobType
_JOB_TYPES = {1: "pull", 2: "copy", 3: "commit", 4: "active-commit", 5: "backup"}


def job_of(domain: Any, target: str) -> dict[str, Any] | None:
    """The block job of a disk as ``{type, bandwidth, done, total, ready}`` (bytes), or None."""
    try:
        info = domain.blockJobInfo(target, constant("VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES") or 0)
    except libvirt.libvirtError as error:
        if code_of(error) == constant("VIR_ERR_OPERATION_INVALID"):
            return None  # the domain does not run
        raise LibvirtFailed(
            f"Reading the block job of disk {target!r} of domain {domain.name()!r}: {message_of(error)}"
        ) from error
    if not info:
        return None
    mirror = live_disk(domain, target).job
    return {
        "type": _JOB_TYPES.get(info["type"], "unknown"),
        "bandwidth": info.get("bandwidth", 0),
        "done": info.get("cur", 0),
        "total": info.get("end", 0),
        "ready": mirror.ready if mirror is not None else False,
    }


def limit(domain: Any, target: str, bandwidth: int) -> None:
    """Set the speed of a disk's running job, in bytes per second; 0 for no limit."""
    with explaining(f"Limiting the block job of disk {target!r} of domain {domain.name()!r}"):
        domain.blockJobSetSpeed(target, bandwidth, constant("VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES") or 0)


def limit_running(domain: Any, target: str, bandwidth: int) -> None:
    """The same for a job that may end meanwhile: then there is nothing to limit any more."""
    try:
        limit(domain, target, bandwidth)
    except LibvirtFailed:
        job = job_of(domain, target)
        if job is not None and job["done"] < job["total"]:
            raise


class BackupWatch:
    """Tells when libvirt goes on reporting a backup job whose jobs in QEMU have ended.

    libvirt 9.0 does so for ever if it was killed while they were about to end: nobody tells it, and it does not look.
    """

    def __init__(self) -> None:
        self._without_since: float | None = None
        self._looked_at = 0.0

    def is_lost(self, domain: Any) -> bool:
        """Whether none of its disks has had a job for too long. Where libvirt does not say, or there is no backup job any more: no."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return False
        self._looked_at = now
        try:
            disks = ElementTree.fromstring(domain.backupGetXMLDesc(0)).iterfind("disks/disk")
            targets = [disk.get("name", "") for disk in disks if disk.get("backup") != "no"]
            copying = any(domain.blockJobInfo(target, 0) for target in targets)
        except libvirt.libvirtError:
            return False
        if copying:
            self._without_since = None
            return False
        self._without_since = self._without_since or now
        return now - self._without_since > _LOST_SECONDS


def abort_backup(domain: Any) -> None:
    """End the domain's backup job, whoever began it; nothing to do when there is none any more."""
    try:
        domain.abortJob()
    except libvirt.libvirtError as error:
        if code_of(error) not in (constant("VIR_ERR_OPERATION_INVALID"), constant("VIR_ERR_OPERATION_FAILED")):
            raise LibvirtFailed(f"Aborting the backup job of domain {domain.name()!r}: {message_of(error)}") from error


def cancel(domain: Any, target: str, *, seconds: float = 60.0) -> bool:
    """Cancel a disk's running job and wait until it is gone; False when there was none. The chain is as it was."""
    if job_of(domain, target) is None:
        return False
    with explaining(f"Cancelling the block job of disk {target!r} of domain {domain.name()!r}"):
        domain.blockJobAbort(target, 0)
    give_up = time.monotonic() + seconds
    while job_of(domain, target) is not None:
        if time.monotonic() > give_up:
            raise LibvirtFailed(
                f"The block job of disk {target!r} of domain {domain.name()!r} does not end",
                state="It was told to; the guest runs.",
                advice="Look again with domain_job",
            )
        time.sleep(_POLL_SECONDS)
    return True


def _pivot(domain: Any, target: str) -> bool:
    try:
        domain.blockJobAbort(target, constant("VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT") or 0)
        return True
    except libvirt.libvirtError as error:
        # "not ready for pivot yet": the XML ran ahead of QEMU; ask again.
        if "not ready" in message_of(error):
            return False
        raise LibvirtFailed(
            f"Switching disk {target!r} of domain {domain.name()!r} back to its base: {message_of(error)}",
            state="The guest runs; the commit goes on.",
            advice="Run this again to take it up",
        ) from error


def wait_idle(domain: Any, *, seconds: float = 60.0) -> None:
    """Wait until libvirt has no domain-wide job; raises :class:`Busy` after ``seconds``.

    A call whose caller was killed goes on inside libvirtd: until it is over, what the domain looks like says nothing.
    """
    give_up = time.monotonic() + seconds
    while (job := running_job(domain)) is not None:
        if time.monotonic() > give_up:
            raise Busy(
                f"libvirt is still busy with {job} of domain {domain.name()!r}",
                state="What an interrupted run left there is kept.",
                advice="Wait for it (domain_job shows it), then run this again",
            )
        time.sleep(_POLL_SECONDS)


def running_job(domain: Any) -> str | None:
    """What the domain's one domain-wide job is (backup, save, migration, ...), or None."""
    if not domain.isActive():
        return None
    with explaining(f"Reading the job of domain {domain.name()!r}"):
        kind = domain.jobInfo()[0]
        if kind == constant("VIR_DOMAIN_JOB_NONE"):
            return None
        operation = domain.jobStats().get("operation", 0)
    names = {
        constant("VIR_DOMAIN_JOB_OPERATION_SAVE"): "a save",
        constant("VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT"): "a migration",
        constant("VIR_DOMAIN_JOB_OPERATION_SNAPSHOT"): "a snapshot",
        constant("VIR_DOMAIN_JOB_OPERATION_DUMP"): "a dump",
        constant("VIR_DOMAIN_JOB_OPERATION_BACKUP"): "a backup",
    }
    return names.get(operation, "a job of libvirt")


def resume_starved(domain: Any, *, seconds: float = 2.0) -> None:
    """Let a guest run on that QEMU paused because a copy of ours found no room.

    While a copy runs, QEMU copies what the guest is about to overwrite; when the target is full it fails the guest's write
    (QEMU before 10), and a domain's usual error policy pauses the guest and keeps the write.  Once the copy is gone the
    write succeeds, so nothing is lost.  Looked at for ``seconds``, since the pause may come after the job's end.  A guest
    whose own disk is full is paused again at once, as before; one that somebody paused is left alone, as is one that is gone.
    """
    give_up = time.monotonic() + seconds
    while (state := _state_after_copy(domain)) is not None and state.active:
        if state.name == "paused" and state.reason == "io-error":
            with explaining(
                f"Resuming domain {domain.name()!r}, which stopped on a full disk",
                state="It is paused; its writes are kept.",
                advice=f"virsh resume {domain.name()}",
            ):
                domain.resume()
        if time.monotonic() >= give_up:
            return
        time.sleep(_POLL_SECONDS)


def _state_after_copy(domain: Any) -> DomainState | None:
    """The state of a domain that a copy of ours may have starved; None where the domain is gone."""
    try:
        return read_state(domain)
    except LibvirtFailed as error:
        if is_gone(error):
            return None
        error.advice = f"See virsh domstate --reason {domain.name()}; if it is paused by an I/O error: virsh resume {domain.name()}"
        error.now("Whether it has stopped on a full disk is not known; a write that waits for room is not lost.")
        raise
