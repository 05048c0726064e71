# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of a disk, and of the filesystem on it, and what forbids it."""

from __future__ import annotations

import os

from .._errors import Busy, NotFound, Refused, Unsupported
from ..hypervisor import checkpoints
from ..hypervisor.capture import REASONS
from ..safety.space import human
from . import shrinking
from .change import (
    LIVE,
    NEXT_BOOT,
    NONE,
    OFFLINE,
    RESTART,
    Change,
    DiskGrowth,
    DiskShrink,
    FilesystemGrowth,
    decide,
)
from .facts import DiskFacts, Facts
from .guest_filesystem import SLACK, Filesystem
from .request import DiskRequest, Request


def disk_changes(request: Request, wanted: DiskRequest, facts: Facts) -> tuple[list[Change], list[str]]:
    """The change of one disk and of the filesystem on it, and what waits for the next start.

    Raises for a disk that must stay as it is.
    """
    known = facts.disks.get(wanted.target)
    domain = facts.live or facts.configured
    if known is None:
        existing = [disk.target for disk in domain.disks]
        raise NotFound(
            f"Domain {facts.name!r} has no disk {wanted.target!r}",
            advice="Its disks are: " + (", ".join(existing) if existing else "none"),
            existing=existing,
        )
    changes: list[Change] = []
    size = known.size
    if wanted.size is not None:
        _check(known, facts)
        if size is None:
            raise Unsupported(
                f"The size of disk {wanted.target!r} of domain {facts.name!r} is not known", advice="See domain_info"
            )
        if wanted.size > size:
            changes.append(_growth(request, wanted.size, known, size, facts))
        elif wanted.size < size:
            shrink = _shrink(request, wanted.size, known, size, facts)
            return [shrink, *(_fill(wanted.target, wanted.size, facts) if wanted.grow_filesystem else ())], []
        elif _is_unnoticed(wanted.target, size, facts):
            return _notice(request, wanted.target, size, facts)
        size = wanted.size
    if wanted.grow_filesystem and size is not None:
        if not changes and _is_unnoticed(wanted.target, size, facts):
            return _notice(request, wanted.target, size, facts)
        changes += _filesystem(request, wanted.target, size, facts)
    return changes, []


def _found(target: str, facts: Facts) -> Filesystem | None:
    return next((one for one in facts.filesystems if one.target == target), None)


def _is_unnoticed(target: str, size: int, facts: Facts) -> bool:
    """Whether the guest still sees the disk as small as it was: a SATA or IDE controller does not tell it."""
    found = _found(target, facts)
    return facts.live is not None and found is not None and 0 < found.disk_size < size


def _notice(request: Request, target: str, size: int, facts: Facts) -> tuple[list[Change], list[str]]:
    """A start lets the guest see the size that its disk has already; then its filesystem grows."""
    found, obstacle = _found(target, facts), "the guest has not noticed the new size of the disk"
    seen = found.disk_size if found is not None else None
    what = f"disk {target}"
    decision = decide(
        request,
        facts,
        f"Disk {target!r}",
        in_force=False,
        configured=True,
        live=False,
        obstacle=obstacle,
        why="",
    )
    changes = [Change(what, seen, size, decision.how, decision.why, warn=decision.how == NONE)]
    if found is not None and decision.how == RESTART and not found.problem and not found.fills(size):
        action = FilesystemGrowth(found, size)
        changes.append(Change(f"filesystem {target}", found.size, found.room(size), RESTART, obstacle, action))
    return changes, [f"{what}: {obstacle}"] if decision.pending else []


def _check(known: DiskFacts, facts: Facts) -> None:
    disk, name = known.disk, facts.name
    reason = None
    if disk.device != "disk":
        reason = f"it is a {disk.device}"
    elif disk.transient:
        reason = "it is transient"
    elif disk.readonly:
        reason = "it is read-only"
    elif disk.shareable:
        reason = "other guests may use it at the same time"
    elif disk.path is None:
        reason = REASONS["not-local"]
    elif disk.storage is not None:
        reason = REASONS[disk.storage]
    elif known.problem:
        reason = known.problem
    if reason:
        raise Refused(
            f"Disk {disk.target!r} of domain {name!r} cannot be resized: {reason}", advice="Remove it from disks"
        )
    if disk.job is not None:
        raise Busy(
            f"Disk {disk.target!r} of domain {name!r} is busy with a {disk.job.job}",
            advice="Wait for it to end, then run this again",
        )


def _ended_checkpoints(known: DiskFacts, facts: Facts) -> tuple[str, ...]:
    """Checkpoints that a resize ends.

    With an overlay on the disk the bitmaps of its layers no longer have one size, and the next increment would silently
    miss what was written before (reproduced on libvirt 9.0).
    """
    if len(known.layers) < 2 or not known.checkpoints:
        return ()
    foreign = [name for name in known.checkpoints if not name.startswith(checkpoints.OURS)]
    if foreign:
        raise Refused(
            f"Disk {known.disk.target!r} of domain {facts.name!r} has overlays, and a resize would make"
            f" increments since checkpoint {', '.join(foreign)} lose data",
            advice="Remove those checkpoints with the tool that made them, or commit the overlays first",
            checkpoints=foreign,
        )
    return known.checkpoints


def _growth(request: Request, wanted: int, known: DiskFacts, size: int, facts: Facts) -> Change:
    disk = known.disk
    _check_device(wanted, known, facts)
    kind = "file" if known.device_size is None else "block"
    action = DiskGrowth(disk.target, wanted, disk.path, disk.format, kind)
    what = f"disk {disk.target}"
    if facts.live is not None:
        if request.apply == NEXT_BOOT:
            raise Refused(
                f"Disk {disk.target!r} of domain {facts.name!r} is in use, so its image cannot be changed beside QEMU",
                advice="Use apply: auto; a disk grows live, the guest only sees more room",
            )
        return Change(
            what, size, wanted, LIVE, "a disk grows while it is used", action, _ended_checkpoints(known, facts)
        )
    if known.checkpoints:
        raise Refused(
            f"Disk {disk.target!r} of domain {facts.name!r} has checkpoints, which libvirt keeps right only while it runs",
            advice="Start the domain, then run this again",
        )
    if disk.encrypted or known.internal_snapshots:
        raise Refused(
            f"Disk {disk.target!r} of domain {facts.name!r} "
            + ("is encrypted" if disk.encrypted else "holds internal snapshots")
            + ", so its image is not changed while the domain is off",
            advice="Start the domain, then run this again",
        )
    return Change(what, size, wanted, OFFLINE, "the domain is shut off", action)


def _shrink(request: Request, wanted: int, known: DiskFacts, size: int, facts: Facts) -> Change:
    """Only at a stop, only when something tells whether it went well, and only for an image that nobody else needs."""
    disk = known.disk
    doing = f"Disk {disk.target!r} of domain {facts.name!r} has {human(size)} and would be cut to {human(wanted)}"
    if not request.allow_shrink:
        raise Refused(
            f"{doing}: what lies behind that would be lost",
            advice="Give the present size or more, or allow_shrink: true if its last filesystem is an ext4 with room to spare",
        )
    if request.apply != "auto" or not request.allow_restart or not request.rollback:
        raise Refused(
            f"{doing}: that is done while the domain is off, and kept only if the domain is well with it",
            advice="Use apply: auto, allow_restart: true and rollback: true",
        )
    reason = None
    if disk.kind != "file" or disk.path is None or disk.format not in ("raw", "qcow2"):
        reason = "it is not a raw or qcow2 file"
    elif disk.encrypted:
        reason = "it is encrypted"
    elif not facts.configured.persistent:
        reason = "the domain is transient"
    elif len(known.layers) > 1:
        reason = "it has overlays; end them with blockcommit, or remove its snapshots"
    elif known.readers:
        reason = f"{', '.join(known.readers)} would see it cut, too"
    elif known.internal_snapshots:
        reason = "its image holds internal snapshots; remove them first"
    elif known.checkpoints and facts.live is None:
        reason = f"checkpoints {', '.join(known.checkpoints)} can be ended only while the domain runs; start it first"
    else:
        reason = _fixed(_found(disk.target, facts))
    foreign = [name for name in known.checkpoints if not name.startswith(checkpoints.OURS)]
    if foreign and reason is None:
        reason = (
            f"checkpoints {', '.join(foreign)} of another tool would no longer be right; remove them with that tool"
        )
    if reason is not None or disk.path is None or disk.format is None:
        raise Refused(f"{doing}, and cannot be: {reason}", advice="Or copy the data to a new disk inside the guest")
    return Change(
        f"disk {disk.target}",
        size,
        wanted,
        RESTART,
        "a disk gets smaller while the domain is off, as a copy, if its filesystem fits",
        DiskShrink(disk.target, wanted, os.path.realpath(disk.path), disk.format),
        known.checkpoints,
    )


def _fill(target: str, size: int, facts: Facts) -> list[Change]:
    """The filesystem of a disk that gets smaller, but not as small as its last partition ends: it grows after the start."""
    found = _found(target, facts)
    if found is None or found.problem or found.room(size) - found.device_size <= SLACK:
        return []
    why = "the disk is still larger than what lies on it"
    return [
        Change(f"filesystem {target}", found.size, found.room(size), RESTART, why, FilesystemGrowth(found, size)),
    ]


def _fixed(mounted: Filesystem | None) -> str | None:
    """Why what lies last on a disk cannot be made smaller, as far as the running guest tells; None where it can, or nobody knows.

    libguestfs has the last word, and only once the guest is off.
    """
    if mounted is None:
        return None
    if mounted.covered:
        return (
            f"{mounted.mountpoint[:100]}: {mounted.problem}. What lies last is looked at before anything is changed if the domain is"
            " shut down first; an ext2, ext3 or ext4 can be made smaller"
        )
    if mounted.type == "xfs":
        return "XFS cannot be made smaller"
    return None if mounted.type in shrinking.EXT else f"{mounted.type[:32]} cannot be made smaller"


def _check_device(wanted: int, known: DiskFacts, facts: Facts) -> None:
    device = known.device_size
    if device is None:
        return
    lies = f"Disk {known.disk.target!r} of domain {facts.name!r} lies on {known.disk.path}, which has {human(device)}"
    if device < wanted:
        raise Refused(lies, advice="Extend the device first (lvextend, rbd resize, ...), then run this again")
    # QEMU gives a guest all of a device, whatever is asked for. Of an encrypted one, less its header.
    if device > wanted and known.disk.format == "raw" and not known.disk.encrypted:
        raise Refused(
            f"{lies}, and would grow to all of it: a raw disk is as large as its device",
            advice=f"Give size: {device} (bytes), or make the device {human(wanted)} large",
        )


def _filesystem(request: Request, target: str, size: int, facts: Facts) -> list[Change]:
    """What is on a disk of ``size`` bytes, where the guest can tell and act."""
    what = f"filesystem {target}"
    problem = "the domain is shut off" if facts.live is None else facts.filesystems_problem
    mine: list[Filesystem] = [one for one in facts.filesystems if one.target == target]
    if problem is None and not mine:
        problem = "the guest has mounted nothing that lies on it"
    if problem is None and mine[0].problem:
        problem = f"{mine[0].mountpoint[:100]}: {mine[0].problem}"
    if problem is not None:
        return [Change(what, None, None, NONE, problem)]
    found = mine[0]
    if found.fills(size):
        return []
    if request.apply == NEXT_BOOT:
        return [Change(what, found.size, found.room(size), NONE, "apply: next_boot; it grows while it is mounted only")]
    why = f"{found.type} at {found.mountpoint[:100]} grows while mounted"
    return [Change(what, found.size, found.room(size), LIVE, why, FilesystemGrowth(found, size))]
