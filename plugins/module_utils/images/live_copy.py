# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copy a running guest's disks as they are at one instant, by a push-mode backup job without a checkpoint.

QEMU copies what the guest is about to overwrite first, so the instant is that of the job's begin; the source's chain is as
before and after, and no profile of AppArmor stands in the way as it does for a commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

from .._errors import LibvirtFailed, NoSpace
from ..hypervisor import backup_job, block_jobs
from ..hypervisor.connection import connect_again, constant, find_by_uuid
from ..safety import processes
from ..safety.sentry import Sentry


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


def obey(watching: Sentry, name: str, directory: str) -> None:
    """Raise :class:`NoSpace` where the sentry has ended the copy of domain ``name`` into ``directory``."""
    verdict = watching.verdict()
    if verdict:
        raise NoSpace(
            f"The export of domain {name!r} was ended: {verdict}",
            state="No image was made, and no write of the guest failed.",
            advice="Make room there, or choose another directory, then run this again",
            path=directory,
        )


def finish(uri: str, handle: Any, directory: str, watching: Sentry) -> None:
    """Wait until the job that writes into ``directory`` is over and has succeeded, across restarts of libvirtd."""
    uuid, name = handle.UUIDString(), handle.name()
    end = backup_job.wait(uri, handle, directory, watching.verdict)
    obey(watching, name, directory)
    if not end.success:
        raise LibvirtFailed(
            f"Copying the disks of domain {name!r}: {end.message}",
            state="No image was made; the unfinished copy is removed.",
            advice="See libvirt's log of the domain, then run this again",
        )
    # Looked up again: a restart of libvirtd ends the connection that the handle belongs to, not the job.
    present = find_by_uuid(connect_again(uri), uuid)
    if present is not None:
        block_jobs.resume_starved(present, seconds=0.0)
    processes.wait_released(os.path.join(directory, file) for file in os.listdir(directory))


def stop(handle: Any, directories: list[str]) -> None:
    """End a copy into one of ``directories`` that an interrupted run left behind; anybody else's job is left alone."""
    for directory in directories:
        backup_job.abort(handle, directory)
    block_jobs.resume_starved(handle)
