# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copy a running guest's disks as they are at one instant, by a push-mode backup job without a checkpoint.

QEMU copies what the guest is about to overwrite first, so the instant is that of the job's begin; the source's chain is as
before and after, and no profile of AppArmor stands in the way as it does for a commit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

from .._errors import LibvirtFailed, NoSpace
from ..hypervisor import block_jobs
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import constant, explaining, message_of
from ..safety import processes, space

_POLL_SECONDS = 0.2

#: Below this much room the job is ended: in QEMU before 10 a target that is full fails the guest's own writes.
LEAST_ROOM = 64 << 20


def backup_xml(targets: Mapping[str, str], all_disks: list[str]) -> str:
    """The ``<domainbackup>`` that writes the disks in ``targets`` (target -> file) and leaves the others out."""
    root = ElementTree.Element("domainbackup", mode="push")
    disks = ElementTree.SubElement(root, "disks")
    for target in all_disks:
        if target in targets:
            disk = ElementTree.SubElement(disks, "disk", name=target, backup="yes", type="file", backupmode="full")
            ElementTree.SubElement(disk, "driver", type="qcow2")
            ElementTree.SubElement(disk, "target", file=targets[target])
        else:
            ElementTree.SubElement(disks, "disk", name=target, backup="no")
    return ElementTree.tostring(root, encoding="unicode")


def begin(handle: Any, xml: str) -> None:
    """The cut: one call."""
    handle.backupBegin(xml, None, constant("VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL") or 0)


def limit(handle: Any, targets: Iterable[str], bandwidth: int) -> None:
    """Limit the copy of each disk to ``bandwidth`` bytes per second; 0 for no limit."""
    if bandwidth:
        for target in targets:
            block_jobs.limit_running(handle, target, bandwidth)


def finish(handle: Any, directory: str) -> None:
    """Wait until the job is over and has succeeded; ends it when ``directory`` runs out of room."""
    name = handle.name()
    state = "The guest runs as before; the unfinished copy is removed."
    none = constant("VIR_DOMAIN_JOB_NONE")
    watch = block_jobs.BackupWatch()
    with explaining(f"Copying the disks of domain {name!r}", state=state):
        while handle.jobInfo()[0] != none:
            if watch.is_lost(handle):
                handle.abortJob()
                raise LibvirtFailed(
                    f"Copying the disks of domain {name!r}: libvirt was interrupted and does not notice that QEMU's jobs have ended",
                    state=state,
                    advice="Run this again",
                )
            if space.free_bytes(directory) < LEAST_ROOM:
                handle.abortJob()
                raise NoSpace(
                    f"Exporting domain {name!r}: the filesystem of {directory} ran full",
                    state=state,
                    advice="Make room there, or choose another directory",
                    path=directory,
                )
            time.sleep(_POLL_SECONDS)
        flags = (constant("VIR_DOMAIN_JOB_STATS_COMPLETED") or 0) | (
            constant("VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED") or 0
        )
        stats = handle.jobStats(flags)
    if stats.get("type") != constant("VIR_DOMAIN_JOB_COMPLETED"):
        why = stats.get("errmsg") or "the job did not complete (did the guest stop, or somebody cancel it?)"
        raise LibvirtFailed(f"Copying the disks of domain {name!r}: {why}", state=state, advice="Run this again")
    processes.wait_released(os.path.join(directory, file) for file in os.listdir(directory))


def stop(handle: Any, directories: list[str]) -> None:
    """End a copy into one of ``directories`` that an interrupted run left behind; anybody else's job is left alone."""
    _end_job(handle, directories)
    block_jobs.resume_starved(handle)


def _end_job(handle: Any, directories: list[str]) -> None:
    try:
        xml = handle.backupGetXMLDesc(0)
    except libvirt.libvirtError:
        return  # no backup job
    files = [target.get("file", "") for target in ElementTree.fromstring(xml).iterfind("disks/disk/target")]
    if not any(os.path.dirname(file) in directories for file in files):
        return
    try:
        handle.abortJob()
    except libvirt.libvirtError as error:
        if handle.isActive() and handle.jobInfo()[0] != constant("VIR_DOMAIN_JOB_NONE"):
            raise LibvirtFailed(
                f"Ending the interrupted copy of domain {handle.name()!r}: {message_of(error)}",
                advice="Look at it with virsh domjobinfo",
            ) from error
    give_up = time.monotonic() + 60
    while handle.isActive() and handle.jobInfo()[0] != constant("VIR_DOMAIN_JOB_NONE") and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS)
