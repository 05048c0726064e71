# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Room on filesystems, asked for before anything is frozen or written."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping

from .._errors import NoSpace

#: What a guest may write between an estimate and the cut, with a copy's own tables: at least, and as a share of its data.
SLACK_LEAST = 8 << 20
SLACK_SHARE = 20


def human(size: int) -> str:
    """Bytes as a person reads them: ``1.5 GiB``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def free_bytes(directory: str) -> int:
    """Bytes that an unprivileged process may still write; QEMU is one."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def allocated(path: str) -> int:
    """Bytes that a file takes up on its filesystem, without its holes; of a block device all that it has. Raises OSError.

    ``st_blocks`` counts 512 bytes each, whatever the filesystem's own blocks are (inode(7)); of a device node it is 0.
    """
    status = os.stat(path)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_blocks * 512
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def allocated_in_all(paths: Iterable[str]) -> int:
    """The sum of :func:`allocated`; what is not there, or cannot be reached, counts nothing."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += allocated(path)
    return total


def room_for(data: int, size: int) -> int:
    """Most bytes of a qcow2 file that holds ``data`` bytes of a disk of ``size`` bytes, cut a little later."""
    slack = max(SLACK_LEAST, data // SLACK_SHARE)
    return min(data + slack, size + SLACK_LEAST) + size // 4096 + (1 << 20)


def free_memory(*, meminfo: str = "/proc/meminfo") -> int | None:
    """Bytes of memory that a new process can have without swapping (``MemAvailable``); None where the kernel does not say."""
    try:
        with open(meminfo, encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def require_memory(needed: int, doing: str) -> None:
    """Raise :class:`NoSpace` unless the host has ``needed`` bytes of memory."""
    free = free_memory()
    if free is not None and free < needed:
        raise NoSpace(
            f"{doing}: this host has {human(free)} of memory free and {human(needed)} are needed",
            advice="Free some, or do it on another host that reaches the repository",
            path="memory",
            needed=needed,
            free=free,
        )


def total_by_filesystem(needs: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    """Sum ``(directory, bytes)`` over directories of the same filesystem; the key is one such directory."""
    devices: dict[int, str] = {}
    totals: dict[str, int] = {}
    for directory, size in needs:
        name = devices.setdefault(os.stat(directory).st_dev, directory)
        totals[name] = totals.get(name, 0) + size
    return totals


def require(
    needs: Iterable[tuple[str, int]], doing: str, *, advice: str = "Make room there, or choose another directory"
) -> None:
    """Raise :class:`NoSpace` unless every filesystem has room for all that ``needs`` puts there."""
    for directory, needed in total_by_filesystem(needs).items():
        free = free_bytes(directory)
        if free < needed:
            raise NoSpace(
                f"{doing}: the filesystem of {directory} has {human(free)} free and {human(needed)} are needed",
                advice=advice,
                path=directory,
                needed=needed,
                free=free,
            )
