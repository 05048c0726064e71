# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A view: a directory of root's private files, read-only, in which they seem to belong to QEMU's user.

A guest that stands on a repository must read files that are ``root:root 0600``, and libvirt would give them away to QEMU's
user for good.  A view is an id-mapped mount (Linux 5.12): through it, and nowhere else, root's files are those of QEMU's
user, and nothing can be written, not even an owner or a time.  The files themselves never change.  No process stands between
the guest and its data, so a killed module, worker or daemon does no harm.  A reboot ends it; :func:`open_view` makes it again.

Which directory a view shows is remembered beside it across reboots (``<name>.origin``), so that :func:`origin_of` tells which
file is meant, mounted or not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time

from .._errors import Refused, Unsupported
from . import places

#: The numbers of these system calls are the same on every architecture that libvirt's QEMU driver runs on.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _OPEN_TREE_CLONE = -100, 0x1000, 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
#: linux/mount.h: RDONLY | NOSUID | NODEV | NOEXEC | NOATIME; the last needs the group of time attributes cleared.
_ATTRIBUTES, _ATTR_ATIME_GROUP, _ATTR_IDMAP = 0x1 | 0x2 | 0x4 | 0x8 | 0x10, 0x70, 0x00100000
_NAMESPACE_SECONDS = 10.0


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def path_of(name: str) -> str:
    """Where the view called ``name`` is, or would be."""
    return os.path.join(places.VIEWS, name)


def _origin_file(name: str) -> str:
    return os.path.join(places.VIEWS, f"{name}.origin")


def origin_of(path: str) -> str:
    """The file that is meant by a canonical path inside a view; any other path as it is."""
    inside = os.path.realpath(places.VIEWS) + "/"
    if not path.startswith(inside):
        return path
    name, _slash, rest = path[len(inside) :].partition("/")
    try:
        origin = os.readlink(_origin_file(name))
    except OSError:
        return path
    return os.path.join(origin, rest) if rest else origin


def require_support(source: str, owner: tuple[int, int]) -> None:
    """Raise :class:`Unsupported` where a view of ``source`` cannot be made. Nothing is mounted."""
    os.close(_detached_mount(source, owner))


def open_view(name: str, source: str, owner: tuple[int, int]) -> str:
    """Show ``source`` to the uid and gid ``owner``; returns where. Open already: nothing to do."""
    where = path_of(name)
    places.passable_directory(places.VIEWS)
    with contextlib.suppress(FileExistsError):
        os.mkdir(where, 0o711)
    remembered = _origin_file(name)
    if not os.path.islink(remembered):
        os.symlink(source, remembered)
        places.fsync_directory(places.VIEWS)
    elif os.readlink(remembered) != source:
        raise Refused(f"{where} is a view of {os.readlink(remembered)}, not of {source}", advice="Run recover_domain")
    if is_open(name):
        if os.path.samestat(os.stat(where), os.stat(source)):
            return where
        # The filesystem was mounted anew meanwhile.
        _unmount(where)
    mount = _detached_mount(source, owner)
    try:
        _system_call(
            f"Mounting a view of {source} at {where}",
            _MOVE_MOUNT,
            mount,
            b"",
            _AT_FDCWD,
            where.encode(),
            _MOVE_MOUNT_F_EMPTY_PATH,
        )
    finally:
        os.close(mount)
    return where


def close_view(name: str) -> None:
    """Take a view away and forget it. Not open: nothing to do."""
    where = path_of(name)
    while is_open(name):
        _unmount(where)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(where)
    places.unlink_quietly(_origin_file(name))


def is_open(name: str) -> bool:
    """Whether the view is mounted."""
    where = os.path.realpath(path_of(name))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as stream:
        return any(line.split(" ", 5)[4] == where for line in stream)


def _unmount(where: str) -> None:
    # Detached: a QEMU that has just dropped its last layer may still be closing it.
    if _libc().umount2(where.encode(), _MNT_DETACH | _UMOUNT_NOFOLLOW) < 0:
        number = ctypes.get_errno()
        raise Refused(f"Unmounting {where}: {os.strerror(number)}", advice=f"umount {where}, then run this again")


def _detached_mount(source: str, owner: tuple[int, int]) -> int:
    doing = f"Showing {source} to QEMU's user (uid {owner[0]})"
    mount = _system_call(doing, _OPEN_TREE, _AT_FDCWD, source.encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        attributes = _MountAttr(_ATTRIBUTES, _ATTR_ATIME_GROUP, 0, 0)
        with contextlib.ExitStack() as stack:
            if owner[0] != 0:  # where QEMU runs as root there is nothing to map
                namespace = _mapping(owner)
                stack.callback(os.close, namespace)
                attributes.attr_set |= _ATTR_IDMAP
                attributes.userns_fd = namespace
            _system_call(
                doing,
                _MOUNT_SETATTR,
                mount,
                b"",
                _AT_EMPTY_PATH,
                ctypes.byref(attributes),
                ctypes.sizeof(attributes),
            )
    except BaseException:
        os.close(mount)
        raise
    return mount


def _mapping(owner: tuple[int, int]) -> int:
    """A user namespace that maps root to ``owner``, as an open descriptor; it lives as long as that and its mounts."""
    program = shutil.which("unshare", path="/usr/bin:/bin")
    if program is None:
        raise Unsupported("unshare is not installed on this host", advice="Install util-linux")
    with subprocess.Popen(  # pylint: disable=ansible-bad-function
        [program, "--user", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    ) as process:
        directory = f"/proc/{process.pid}"
        give_up = time.monotonic() + _NAMESPACE_SECONDS
        while _namespace(directory) in (None, _namespace("/proc/self")):
            if process.poll() is not None or time.monotonic() > give_up:
                process.kill()
                raise Unsupported("This host's kernel makes no user namespaces", advice="Use mode: copy")
            time.sleep(0.005)
        for name, identifier in (("uid_map", owner[0]), ("gid_map", owner[1])):
            with open(f"{directory}/{name}", "w", encoding="ascii") as stream:
                stream.write(f"0 {identifier} 1")
        return os.open(f"{directory}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _namespace(directory: str) -> str | None:
    try:
        return os.readlink(f"{directory}/ns/user")
    except OSError:
        return None


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _system_call(doing: str, number: int, *arguments: object) -> int:
    result = int(_libc().syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise Unsupported(
            f"{doing}: {os.strerror(error)}; this needs id-mapped mounts (Linux 5.12, and a filesystem that has them: ext4, XFS,"
            " Btrfs, not NFS)",
            advice="Restore with mode: copy, or copy the repository to a local filesystem first",
        )
    return result
