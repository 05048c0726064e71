# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a stopped domain's files are still what they were at the instant of its group.

Somebody may start it, and stop it again, while the disks of the running domains are copied, which may take hours.  Its state is
the same before and after, and its disks are not.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """What changes with every write to a file. ``writes`` are those to a block device, whose times need not tell; else None."""

    inode: int
    size: int
    modified_ns: int
    writes: int | None = None


def marks_of(paths: Iterable[str], *, devices: str = "/sys/dev/block") -> dict[str, Mark | None]:
    """Path -> its mark now, None where there is no such file. Raises OSError."""
    return {path: _mark_of(path, devices) for path in paths}


def written_since(marks: Mapping[str, Mark | None], *, devices: str = "/sys/dev/block") -> list[str]:
    """The files that are not what they were, not there any more, or there only since. Raises OSError."""
    return [path for path, mark in marks.items() if _mark_of(path, devices) != mark]


def _mark_of(path: str, devices: str) -> Mark | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    writes = _writes_of(status.st_rdev, devices) if stat.S_ISBLK(status.st_mode) else None
    return Mark(status.st_ino, status.st_size, status.st_mtime_ns, writes)


def _writes_of(device: int, devices: str) -> int | None:
    """Completed writes, by the kernel's count (Documentation/block/stat.rst, the fifth number)."""
    try:
        with open(os.path.join(devices, f"{os.major(device)}:{os.minor(device)}", "stat"), encoding="ascii") as stream:
            return int(stream.read().split()[4])
    except (OSError, ValueError, IndexError):
        return None
