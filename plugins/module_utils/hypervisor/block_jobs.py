# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Live block jobs, whose end is believed only when the domain XML says so.

libvirt 9.0: the job event can precede the XML (NEWS 9.1.0), and "100 %" is not "ready": an active commit is over when the
``<mirror>`` is gone and the active layer is the one that was committed into.
"""

from __future__ import annotations

import time
from typing import Any

from .._errors import Busy, LibvirtFailed
from .binding import libvirt
from .connection import constant, explaining, message_of
from .domain_model import Disk, read_domain

_POLL_SECONDS = 0.05


def live_disk(domain: Any, target: str) -> Disk:
    """The disk as the live XML states it now."""
    disk = read_domain(domain).disk(target)
    if disk is None:
        raise LibvirtFailed(f"Disk {target!r} of domain {domain.name()!r} has gone", advice="See domain_info")
    return disk


def commit_active(domain: Any, target: str, base: str, *, bandwidth: int = 0, seconds: float = 600.0) -> None:
    """Commit everything above ``base`` (a path of the chain) into it and make it the active layer again.

    ``bandwidth`` in bytes per second, 0 for no limit.  Takes up a job that already runs.  Raises when the XML does not say
    within ``seconds`` that it is done; the guest runs on either way.
    """
    state = f"The guest runs; disk {target!r} still has its overlay."
    disk = live_disk(domain, target)
    if disk.job is None:
        if disk.path == base:
            return
        flags = (constant("VIR_DOMAIN_BLOCK_COMMIT_ACTIVE") or 0) | (
            constant("VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES") or 0
        )
        with explaining(f"Committing disk {target!r} of domain {domain.name()!r} into {base}", state=state):
            domain.blockCommit(target, base, None, bandwidth, flags)
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        disk = live_disk(domain, target)
        if disk.job is None:
            if disk.path == base:
                return
            raise LibvirtFailed(
                f"The commit of disk {target!r} of domain {domain.name()!r} ended without success",
                state=state,
            )
        if disk.job.ready and _pivot(domain, target):
            continue
        time.sleep(_POLL_SECONDS)
    raise LibvirtFailed(
        f"The commit of disk {target!r} of domain {domain.name()!r} did not finish within {seconds:.0f} s",
        state=state,
        advice="It goes on; run this again to take it up",
    )


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
