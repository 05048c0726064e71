# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blocks set aside for a target before a guest depends on it: while QEMU copies before it writes, a target that cannot
take the copy fails the guest's own write (QEMU before 10)."""

from __future__ import annotations

import ctypes
import errno
import os

from .._errors import NoSpace
from .space import human

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: blocks beyond the end of the file, whose length stays
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def is_possible(directory: str) -> bool:
    """Whether :func:`reserve` can set room aside there, tried on a file without a name. True where that cannot be tried."""
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return True
    try:
        return _fallocate(descriptor, 1) not in _UNSUPPORTED
    finally:
        os.close(descriptor)


def share_of(targets: int, directory: str) -> int:
    """How many times the floor has to be free: each target has one of its own where room is set aside for it."""
    return targets if targets > 1 and is_possible(directory) else 1


def reserve(path: str, size: int) -> bool:
    """Allocate ``size`` bytes to a file without making it longer; False where the filesystem cannot do that."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        number = _fallocate(descriptor, size)
    finally:
        os.close(descriptor)
    if number == 0:
        return True
    if number in _UNSUPPORTED:
        return False
    raise NoSpace(
        f"{human(size)} could not be set aside for {path}: {os.strerror(number)}",
        advice="Make room there, or choose another directory",
        path=path,
        needed=size,
    )


def _fallocate(descriptor: int, size: int) -> int:
    """0, or the error's number."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return errno.ENOSYS
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return 0 if fallocate(descriptor, _KEEP_SIZE, 0, size) == 0 else ctypes.get_errno()


def release(path: str) -> None:
    """Give back what lies beyond the end of the file, and make the file durable."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
