# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the collection keeps its own files on the hypervisor, and how it writes them.

State that must survive a reboot lies under ``/var/lib``; state that a reboot makes meaningless (who holds a lock, which
guest is frozen) lies under ``/run``, which a reboot empties.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from .._errors import Refused

JOURNAL = "/var/lib/vmkeeper.libvirt/journal"
WORKERS = "/var/lib/vmkeeper.libvirt/workers"
SCRATCH = "/var/lib/vmkeeper.libvirt/scratch"
BASES = "/var/lib/vmkeeper.libvirt/bases"
GUARDS = "/run/vmkeeper.libvirt/guards"
LOCKS = "/run/lock/vmkeeper.libvirt"

#: What QEMU's user must be able to reach: repositories as guests see them, and the files of guests that are thrown away.
VIEWS = "/var/lib/libvirt/vmkeeper/views"
PROOFS = "/var/lib/libvirt/vmkeeper/proofs"

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def private_directory(path: str) -> str:
    """Make ``path`` (and what is above it) a directory that only this user can change."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        private_directory(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    # /run/lock is world-writable on Debian: somebody else may have made the name first.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise Refused(f"{path} is not a directory of this user", advice="Remove it; it is made again when it is needed")
    return path


def passable_directory(path: str) -> str:
    """A directory of ours that every user gets through and nobody else can list."""
    parent = os.path.dirname(path)
    for one in (private_directory(parent), private_directory(path)):
        os.chmod(one, 0o711)
    return path


def reachable_by(path: str, owner: tuple[int, int]) -> bool:
    """Whether that uid and gid get into a directory: asked of the kernel as that user, for ACLs count too."""
    return owner[0] == 0 or _succeeds_as(owner, ["/usr/bin/test", "-x", path])


def readable_by(path: str, owner: tuple[int, int]) -> bool:
    """Whether that uid and gid can read a file: asked by reading, for directories on the way and security modules count too."""
    return _succeeds_as(owner, ["/usr/bin/head", "-c", "1", path])


def _succeeds_as(owner: tuple[int, int], command: Sequence[str]) -> bool:
    finished = subprocess.run(  # pylint: disable=ansible-bad-function
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=owner[0],
        group=owner[1],
        extra_groups=[],
        cwd="/",
        check=False,
    )
    return finished.returncode == 0


def fsync_directory(path: str) -> None:
    """Make renames and unlinks in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: str) -> None:
    """Make the content of a file and its name durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fsync_directory(os.path.dirname(path))


def write_json(path: str, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, wholly or not at all, durably, readable by the owner only."""
    write_file(path, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_json_once(path: str, value: Any) -> Any:
    """Write ``path`` as :func:`write_json` does unless somebody has written it; returns what it says then.

    Of several that write at the same time, also on several hosts, one wins and all return its value.
    """
    with _temporary(path, _json_bytes(value)) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Such a filesystem (FAT, some SMB servers) leaves a gap between the look and the rename.
            if not os.path.exists(path):
                os.replace(temporary, path)
    return read_json(path)


def rename_new(part: str, path: str) -> None:
    """Give the complete file ``part`` its name ``path`` beside it, replacing nothing. Raises FileExistsError.

    Interrupted, it is called again, or taken back by :func:`undo_rename_new`.
    """
    if not _same_file(part, path):
        try:
            # link() fails where rename() would overwrite what somebody put there meanwhile.
            os.link(part, path)
        except OSError as error:
            if not _is_claim(path, part):
                if error.errno not in _NO_LINKS:
                    raise
                # FAT and some SMB servers: a file that says whose it is claims the name first.
                write_new(path, _claim_of(part))
            os.rename(part, path)
            return
    os.unlink(part)


def undo_rename_new(part: str, path: str) -> None:
    """Remove ``part`` and what :func:`rename_new` made of it, however far it came, but nothing of somebody else's."""
    if not os.path.lexists(part) or _same_file(part, path) or _is_claim(path, part):
        unlink_quietly(path)
    unlink_quietly(part)


def _claim_of(part: str) -> bytes:
    return f"claimed for {os.path.basename(part)}\n".encode()


def _is_claim(path: str, part: str) -> bool:
    expected = _claim_of(part)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as stream:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and stream.read(len(expected) + 1) == expected


def _same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def write_new(path: str, content: bytes) -> None:
    """A new file, 0600, durable. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_file(path: str, content: bytes) -> None:
    """Replace ``path`` by ``content``, as :func:`write_json` does."""
    with _temporary(path, content) as temporary:
        os.replace(temporary, path)


@contextlib.contextmanager
def _temporary(path: str, content: bytes) -> Iterator[str]:
    """A durable file with ``content`` beside ``path``, to be made ``path``; it is gone afterwards if nobody did."""
    directory = os.path.dirname(path)
    descriptor, temporary = tempfile.mkstemp(prefix=_prefix_of(path), dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        unlink_quietly(temporary)
    fsync_directory(directory)


def _prefix_of(path: str) -> str:
    return f".new-{os.path.basename(path)}-"


def sweep_unfinished(path: str) -> None:
    """Remove what killed processes were about to make ``path``. Nobody may be writing it now."""
    directory = os.path.dirname(path)
    for name in os.listdir(directory):
        if name.startswith(_prefix_of(path)):
            unlink_quietly(os.path.join(directory, name))


def read_json(path: str) -> Any:
    """The JSON in ``path``, or None when there is no such file."""
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        return None


def is_held(path: str) -> bool:
    """Whether a process holds a lock (flock) on a file: it is at its post, since the kernel drops the lock of a dead one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def unlink_quietly(path: str) -> bool:
    """Remove a file; False when it was not there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
