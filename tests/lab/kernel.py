# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The few system calls that Python 3.11 does not offer: unshare, mount, prctl, sethostname, loop devices."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8

_PR_SET_PDEATHSIG = 1
_LOOP_CLR_FD = 0x4C01
_LOOP_GET_STATUS64 = 0x4C05
# struct loop_info64: lo_device, lo_inode, rdevice, offset, sizelimit, number, ... (linux/loop.h)
_LOOP_INFO64 = struct.Struct("=QQQQQIIII64s64s32sQQ")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")


def unshare(flags: int) -> None:
    """Leave the namespaces named by C(CLONE_NEW*) flags; raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, fstype: str | None = None, flags: int = 0) -> None:
    """mount(2); raises OSError."""
    _check(
        _libc.mount(source.encode(), target.encode(), fstype.encode() if fstype else None, flags, None),
        f"mount {source} on {target}",
    )


def set_hostname(name: str) -> None:
    """sethostname(2) of the current UTS namespace."""
    data = name.encode()
    _check(_libc.sethostname(data, len(data)), "sethostname")


def die_with_parent(signal: int) -> None:
    """Have the kernel send ``signal`` to this process when its parent ends (prctl PR_SET_PDEATHSIG)."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl")


def loop_devices_backed_below(directory: Path) -> list[str]:
    """Loop devices (``/dev/loopN``) whose backing file lies below ``directory``.

    Compared by device and inode: the path that sysfs shows depends on the mount namespace that
    attached the file.
    """
    inodes = set()
    for parent, _dirs, files in os.walk(directory):
        for name in files:
            status = os.lstat(os.path.join(parent, name))
            inodes.add((status.st_dev, status.st_ino))
    found = []
    for entry in Path("/sys/block").glob("loop*/loop"):
        node = f"/dev/{entry.parent.name}"
        try:
            fd = os.open(node, os.O_RDONLY)
        except OSError:
            continue
        try:
            info = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64.size))
            device, inode = _LOOP_INFO64.unpack(info)[:2]
            # lo_device is encoded as the kernel's new_encode_dev, the same 32-bit form that stat uses.
            if (device, inode) in inodes:
                found.append(node)
        except OSError:
            pass
        finally:
            os.close(fd)
    return found


def detach_loop(node: str) -> None:
    """Detach the backing file of ``node``; quiet when it has none."""
    try:
        fd = os.open(node, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD, 0)
    except OSError:
        pass
    finally:
        os.close(fd)
