# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes of this host: which one is meant by a number, whether it lives, and which file it has open."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """The very same process still runs."""
        return _start_time(self.pid) == self.started


def _start_time(pid: int) -> str | None:
    """Field 22 of /proc/<pid>/stat: start time in clock ticks since boot. None if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def myself() -> ProcessIdentity:
    """This process."""
    return ProcessIdentity(os.getpid(), _start_time(os.getpid()) or "")


def boot_id() -> str:
    """A value that changes with every boot of the host."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def holders_of(path: str) -> list[int]:
    """pids of the processes that have ``path`` open, as far as this user may see."""
    try:
        wanted = os.stat(path)
    except OSError:
        return []
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            descriptors = os.listdir(f"/proc/{name}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                status = os.stat(f"/proc/{name}/fd/{descriptor}")
            except OSError:
                continue
            if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(int(name))
                break
    return found


def wait_released(paths: Iterable[str], *, seconds: float = 30.0) -> bool:
    """Wait until no process has any of ``paths`` open; False when one still has after ``seconds``.

    libvirt calls a block job over when QEMU has said so; QEMU closes the target, and drops its lock, a moment later.
    """
    waiting = list(paths)
    give_up = time.monotonic() + seconds
    while waiting := [path for path in waiting if holders_of(path)]:
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True
