# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's backup job of a domain: whose it is, waiting for its end, aborting it.

A job event can precede the XML (libvirt NEWS 9.1.0); here a job is over when libvirt has no backup XML any more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from .._errors import LibvirtFailed, VmkeeperError
from . import block_jobs
from .binding import libvirt
from .connection import code_of, constant, message_of, open_connection

#: How long a restarting libvirtd may be away before the job is given up.
DAEMON_PATIENCE = 120.0
_POLL_SECONDS = 0.02
_SLOWEST_POLL = 0.25

#: What libvirt says when the connection, not the operation, is the trouble.
_LOST = ("VIR_ERR_INTERNAL_ERROR", "VIR_ERR_RPC", "VIR_ERR_SYSTEM_ERROR", "VIR_ERR_INVALID_CONN")


@dataclass(frozen=True)
class End:
    """How a job ended. ``success`` is None when libvirt cannot say (it was restarted meanwhile)."""

    success: bool | None
    message: str = ""


def current_xml(handle: Any) -> str | None:
    """The running backup job's XML, or None when there is none."""
    try:
        return str(handle.backupGetXMLDesc(0))
    except libvirt.libvirtError as error:
        if code_of(error) in (
            constant("VIR_ERR_NO_DOMAIN_BACKUP"),
            constant("VIR_ERR_OPERATION_INVALID"),
            constant("VIR_ERR_NO_DOMAIN"),
        ):
            return None
        raise


def is_ours(handle: Any, directory: str) -> bool:
    """Whether a backup job runs that writes into ``directory``."""
    xml = current_xml(handle)
    return xml is not None and writes_into(xml, directory)


def writes_into(xml: str, directory: str) -> bool:
    """Whether a backup job's XML names a target in ``directory``, whatever characters XML had to escape in it."""
    targets = ElementTree.fromstring(xml).iterfind("disks/disk/target")
    return any(os.path.dirname(target.get("file", "")) == directory for target in targets)


def forget_last(handle: Any) -> None:
    """Drop what libvirt remembers of an earlier job, so that the next answer is about ours."""
    try:
        handle.jobStats(constant("VIR_DOMAIN_JOB_STATS_COMPLETED") or 0)
    except libvirt.libvirtError:
        return


def wait(uri: str, handle: Any, directory: str, interrupted: Callable[[], str | None]) -> End:
    """Wait until our job is over, across restarts of libvirtd.

    ``interrupted`` is asked in between; its text ends the wait with an error (the caller undoes).
    """
    uuid, name = handle.UUIDString(), handle.name()
    watch = block_jobs.BackupWatch()
    pause, away_since, restarted = _POLL_SECONDS, None, False
    while True:
        trouble = interrupted()
        if trouble:
            return End(False, trouble)
        try:
            if not is_ours(handle, directory):
                return _judge(handle, restarted)
            if watch.is_lost(handle):
                return End(False, "libvirt was interrupted and does not notice that QEMU's jobs have ended")
            away_since = None
        except libvirt.libvirtError as error:
            if handle.connect().isAlive() and code_of(error) not in [constant(one) for one in _LOST]:
                raise LibvirtFailed(
                    f"Watching the backup job of domain {name!r}: {message_of(error)}", state="The job is aborted."
                ) from error
            restarted = True
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > DAEMON_PATIENCE:
                raise LibvirtFailed(
                    f"libvirtd went away during the backup job of domain {name!r} and did not come back",
                    state="The copy is abandoned; its job is aborted as soon as libvirtd answers.",
                    advice="Start libvirtd, then run this again",
                ) from error
            handle = _again(uri, uuid) or handle
        time.sleep(pause)
        pause = min(pause * 1.2, _SLOWEST_POLL)


def _again(uri: str, uuid: str) -> Any | None:
    try:
        return open_connection(uri).lookupByUUIDString(uuid)
    except (VmkeeperError, libvirt.libvirtError):
        return None


def _judge(handle: Any, restarted: bool) -> End:
    flags = (constant("VIR_DOMAIN_JOB_STATS_COMPLETED") or 0) | (constant("VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED") or 0)
    try:
        if not handle.isActive():
            return End(False, "the guest stopped while its disks were copied")
        stats = handle.jobStats(flags)
    except libvirt.libvirtError as error:
        return End(False, message_of(error))
    if stats.get("operation") != constant("VIR_DOMAIN_JOB_OPERATION_BACKUP"):
        return End(
            None, "libvirtd was restarted and does not remember how it ended" if restarted else "it ended unseen"
        )
    if stats.get("type") == constant("VIR_DOMAIN_JOB_COMPLETED") and stats.get("success", True):
        return End(True)
    return End(False, str(stats.get("errmsg") or stats.get("error-message") or "the job failed"))


def abort(handle: Any, directory: str, *, seconds: float = 60.0) -> None:
    """End our job, if it runs, and wait until libvirt's XML says that it is over."""
    give_up = time.monotonic() + seconds
    while is_ours(handle, directory):
        block_jobs.abort_backup(handle)
        if time.monotonic() > give_up:
            raise LibvirtFailed(
                f"The backup job of domain {handle.name()!r} could not be aborted within {seconds:.0f} s",
                state="It goes on; nothing of it is kept.",
                advice=f"virsh domjobabort {handle.name()}, then run this again",
            )
        time.sleep(_POLL_SECONDS)
