# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Partitions and filesystems inside the guest: measured and grown by the guest's own programs.

Nothing of the guest's disk is parsed here.  Each program is run through the agent without a shell, on a device whose name
was checked, with a time limit; what it prints is believed only as a number.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._errors import AgentSilent, VmkeeperError
from ..hypervisor import agent
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import message_of
from .outcome import GUEST_SECONDS, Outcome, wait_for

SECTOR = 512

#: What a partition table keeps at the end of a disk (GPT: 33 sectors), what sfdisk aligns to (1 MiB), and a last ext4 group
#: or XFS allocation group that is too small to be used: less than this is "full".
SLACK = 4 << 20

GROWABLE = ("ext4", "ext3", "xfs")

_DEVICE = re.compile(r"[a-z][a-z0-9]{0,31}")
_LOOK_SECONDS = 30.0
_GROW_SECONDS = 600.0
_MOST = 256
_PARTITIONS = 129  #: a GPT has room for 128


@dataclass(frozen=True)
class Filesystem:
    """One mounted filesystem of a disk. Sizes in bytes; ``room`` is the part of its disk that it could fill."""

    target: str
    device: str
    mountpoint: str
    type: str
    disk_device: str = ""
    disk_size: int = 0
    partition: int | None = None
    start: int = 0
    device_size: int = 0
    size: int | None = None
    problem: str | None = None
    covered: bool = False  #: something else (LVM, RAID, another partition) lies between it and the end of the disk

    def room(self, disk_size: int) -> int:
        """Bytes from the beginning of its partition to the end of a disk of that size."""
        return disk_size - self.start

    def fills(self, disk_size: int) -> bool:
        """Whether it and its partition reach the end of a disk of that size."""
        if self.size is None:
            return False
        return self.room(disk_size) - self.device_size <= SLACK and self.device_size - self.size <= SLACK


def read_filesystems(handle: Any, targets: Sequence[str]) -> tuple[Filesystem, ...]:
    """The mounted filesystems of these disks that can be grown: on each disk the last one.

    Raises :class:`AgentSilent` when the guest does not answer.
    """
    try:
        # Without a limit it waits for ever: a dead network mount in the guest hangs its agent.
        with agent.finite_timeout(handle, int(_LOOK_SECONDS)):
            listed = handle.fsInfo() or []
    except libvirt.libvirtError as error:
        raise AgentSilent(
            f"The guest agent of domain {handle.name()!r} does not list its filesystems: {message_of(error)}",
            advice="Update or restart qemu-guest-agent in the guest",
        ) from error
    found: dict[str, list[Filesystem]] = {}
    seen: set[str] = set()
    for mountpoint, device, kind, disks in listed[:_MOST]:
        for target in disks or ():
            if target in targets and device not in seen:
                seen.add(device)
                found.setdefault(target, []).append(_measure(handle, target, str(device), str(mountpoint), str(kind)))
    # Only what lies last on its disk can grow into the room behind it.
    return tuple(max(several, key=lambda one: one.start) for _target, several in sorted(found.items()))


def _measure(handle: Any, target: str, device: str, mountpoint: str, kind: str) -> Filesystem:
    bare = Filesystem(target, device, mountpoint, kind)
    if not _DEVICE.fullmatch(device) or len(mountpoint) > 1024:
        problem = f"{device[:64]!r} is not a disk or a partition (LVM, RAID or encryption lies between)"
        return replace(bare, problem=problem, covered=True)
    block = f"/sys/class/block/{device}"
    own = _run(handle, ["cat", f"{block}/uevent", f"{block}/size"]).output
    sectors = _last_number(own)
    if sectors is None or "DEVTYPE=" not in own:
        return _unfit(bare, f"the guest does not say how large {device} is")
    partition, start, disk_device, disk_size = None, 0, device, sectors * SECTOR
    if "DEVTYPE=partition" in own:
        # The device directory of a partition lies in that of its disk.
        above = _run(handle, ["cat", f"{block}/../uevent", f"{block}/start", f"{block}/../size"]).output
        name = re.search(r"^DEVNAME=(\S+)$", above, re.MULTILINE)
        number = re.search(r"^PARTN=(\d{1,3})$", own, re.MULTILINE)
        tail = re.findall(r"^(\d+)$", above, re.MULTILINE)
        if not (name and number and len(tail) >= 2 and _DEVICE.fullmatch(name.group(1))):
            return _unfit(bare, f"the guest does not say where the partition {device} lies")
        partition, disk_device = int(number.group(1)), name.group(1)
        start, disk_size = int(tail[-2]) * SECTOR, int(tail[-1]) * SECTOR
    starts = _partition_starts(handle, disk_device)
    if starts is None:
        problem = f"{disk_device} is not a disk of the machine (RAID or the like lies between)"
        return replace(bare, problem=problem, covered=True)
    measured = Filesystem(target, device, mountpoint, kind, disk_device, disk_size, partition, start, sectors * SECTOR)
    if any(other > start for other in starts):
        return replace(measured, problem=f"another partition lies behind {device}", covered=True)
    if kind not in GROWABLE:
        return _unfit(measured, f"filesystems of type {kind[:32]} are not grown")
    try:
        size = _filesystem_size(handle, measured)
    except VmkeeperError as error:
        return _unfit(measured, error.problem)
    return replace(measured, size=size)


def _partition_starts(handle: Any, disk: str) -> list[int] | None:
    """Where the partitions of a disk begin, in bytes; None for a block device that no hardware stands behind, such as md0."""
    stem = f"/sys/class/block/{disk}/{disk}{'p' if disk[-1].isdigit() else ''}"
    paths = [f"/sys/class/block/{disk}/device/uevent", *(f"{stem}{number}/start" for number in range(1, _PARTITIONS))]
    said = _run(handle, ["cat", *paths]).output  # what does not exist is passed over
    if not re.search(r"^\w+=", said, re.MULTILINE):
        return None
    return [int(sectors) * SECTOR for sectors in re.findall(r"^(\d+)$", said, re.MULTILINE)]


def _unfit(filesystem: Filesystem, problem: str) -> Filesystem:
    return replace(filesystem, problem=problem)


def _last_number(text: str) -> int | None:
    numbers = re.findall(r"^(\d+)$", text, re.MULTILINE)
    return int(numbers[-1]) if numbers else None


def _run(
    handle: Any, argv: Sequence[str], *, seconds: float = _LOOK_SECONDS, stdin: str | None = None
) -> agent.Executed:
    return agent.execute(handle, argv, seconds=seconds, stdin=stdin)


def _must(handle: Any, argv: Sequence[str], *, seconds: float, stdin: str | None = None) -> str:
    done = _run(handle, argv, seconds=seconds, stdin=stdin)
    if done.status != 0:
        said = " ".join((done.errors or done.output).split())[-300:]
        raise VmkeeperError(
            f"{argv[0]} in the guest of domain {handle.name()!r} failed with status {done.status}: {said}",
            state="The disk has its new size; what is on it was not grown further.",
            advice=f"See that {argv[0]} is installed in the guest, then run this again",
        )
    return done.output


def _filesystem_size(handle: Any, filesystem: Filesystem) -> int:
    """Bytes by the filesystem's own account; ``df`` would leave out its metadata."""
    if filesystem.type == "xfs":
        text = _must(handle, ["xfs_growfs", "-n", filesystem.mountpoint], seconds=_LOOK_SECONDS)
        match = re.search(r"^data\s+=\s+bsize=(\d+)\s+blocks=(\d+)", text, re.MULTILINE)
        pair = match.groups() if match else None
    else:
        pair = _ext_blocks(handle, filesystem)
    if pair is None:
        raise VmkeeperError(f"the guest does not say how large the filesystem of {filesystem.device} is")
    return int(pair[0]) * int(pair[1])


def _ext_blocks(handle: Any, filesystem: Filesystem) -> tuple[str, str] | None:
    """Size and number of an ext filesystem's blocks."""
    text = _must(handle, ["dumpe2fs", "-h", f"/dev/{filesystem.device}"], seconds=_LOOK_SECONDS)
    count = re.search(r"^Block count:\s+(\d+)$", text, re.MULTILINE)
    size = re.search(r"^Block size:\s+(\d+)$", text, re.MULTILINE)
    return (size.group(1), count.group(1)) if size and count else None


def least_size(handle: Any, filesystem: Filesystem) -> int | None:
    """Bytes that a mounted ext filesystem needs at least, by resize2fs' own estimate; None where the guest does not tell."""
    try:
        blocks = _ext_blocks(handle, filesystem)
        text = _must(handle, ["resize2fs", "-P", f"/dev/{filesystem.device}"], seconds=_GROW_SECONDS)
    except VmkeeperError:
        return None
    least = re.search(r"size of the filesystem: (\d+)$", text, re.MULTILINE)
    return int(least.group(1)) * int(blocks[0]) if least and blocks else None


def take_room(handle: Any, filesystem: Filesystem, disk_size: int) -> Outcome:
    """:func:`grow`, and how the guest took it: whether the filesystem fills a disk of ``disk_size`` bytes then."""
    try:
        grown = grow(handle, filesystem)
    except VmkeeperError as error:
        with contextlib.suppress(AgentSilent):
            now = _device_size(handle, filesystem.device)
            return Outcome(filesystem.size, False, error.problem, now is not None and now != filesystem.device_size)
        return Outcome(None, False, error.problem)
    altered = (grown.size, grown.device_size) != (filesystem.size, filesystem.device_size)
    if grown.fills(disk_size):
        return Outcome(grown.size, altered=altered)
    if grown.disk_size and grown.disk_size < disk_size:
        return Outcome(grown.size, False, "the guest has not noticed the new size of the disk", altered)
    return Outcome(grown.size, False, str(grown.problem or "it does not fill its disk"), altered)


def grow(handle: Any, filesystem: Filesystem) -> Filesystem:
    """Let the partition and then the filesystem fill the disk, while mounted; returns what the guest sees then."""
    disk_size = _device_size(handle, filesystem.disk_device) or filesystem.disk_size
    if filesystem.partition is not None and filesystem.room(disk_size) - filesystem.device_size > SLACK:
        _grow_partition(handle, filesystem)
    if filesystem.type == "xfs":
        _must(handle, ["xfs_growfs", filesystem.mountpoint], seconds=_GROW_SECONDS)
    else:
        _must(handle, ["resize2fs", f"/dev/{filesystem.device}"], seconds=_GROW_SECONDS)
    return _measure(handle, filesystem.target, filesystem.device, filesystem.mountpoint, filesystem.type)


def _grow_partition(handle: Any, filesystem: Filesystem) -> None:
    disk = f"/dev/{filesystem.disk_device}"
    number = str(filesystem.partition)
    # sfdisk is part of util-linux everywhere; it moves GPT's second header to the new end. The kernel does not re-read the
    # table of a disk in use, so partx tells it the one partition's new size.
    _must(
        handle,
        ["sfdisk", "--force", "--no-reread", "-N", number, disk],
        seconds=_GROW_SECONDS,
        stdin=", +\n",
    )
    _must(handle, ["partx", "--update", "--nr", number, disk], seconds=_GROW_SECONDS)
    after = _device_size(handle, filesystem.device)
    if after is None or after <= filesystem.device_size:
        raise VmkeeperError(
            f"The partition {filesystem.device} in the guest of domain {handle.name()!r} did not grow: another one lies behind it,"
            " or its table has no room",
            state="The disk has its new size; the partition table is as it was.",
            advice="Look at it with lsblk in the guest",
        )


def wait_for_disk(handle: Any, filesystem: Filesystem, size: int, seconds: float = GUEST_SECONDS) -> int | None:
    """The size of the filesystem's disk as the guest sees it, waiting for ``size``: the controller's message takes a moment."""
    last: list[int | None] = [None]

    def noticed() -> bool:
        last[0] = _device_size(handle, filesystem.disk_device)
        return last[0] == size

    try:
        wait_for(noticed, seconds)
    except AgentSilent:
        return None
    return last[0]


def _device_size(handle: Any, device: str) -> int | None:
    """Bytes of a disk or partition by the guest."""
    sectors = _last_number(_run(handle, ["cat", f"/sys/class/block/{device}/size"]).output)
    return None if sectors is None else sectors * SECTOR
