# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Directories that QEMU writes to while a guest depends on it: on a filesystem of this host, and within reach of QEMU's user."""

from __future__ import annotations

import contextlib
import os
import re

from .._errors import InvalidInput, Unsupported
from . import places

#: Filesystems whose writes may fail or stall for reasons that this host does not control. A failing target fails the
#: guest's own writes (QEMU before 10), so nothing is pushed there.  FUSE is among them whatever it stands on (mergerfs, too):
#: its server is a process that may hang or be ended.  ``fuseblk`` (NTFS of a local device) is not.
_REMOTE = re.compile(
    r"nfs4?|cifs|smb3|smbfs|ceph|glusterfs|9p|afs|lustre|beegfs|ocfs2|gfs2|ncpfs|virtiofs|fuse|fuse\..*",
)


def filesystem_type(path: str, *, mountinfo: str = "/proc/self/mountinfo") -> str:
    """The type of the filesystem that holds ``path``, as the kernel names it; empty when it cannot be told."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = ""
    with contextlib.suppress(OSError), open(mountinfo, encoding="utf-8") as stream:
        for line in stream:
            fields = line.split()
            if fields[2] == wanted:
                found = fields[fields.index("-") + 1]
    return found


def is_local(path: str) -> bool:
    """Whether QEMU may push into it: see :data:`_REMOTE`."""
    return _REMOTE.fullmatch(filesystem_type(path)) is None


def check(directory: str, owner: tuple[int, int], what: str) -> None:
    """Refuse, before anything is frozen, a directory that QEMU's uid and gid could not write to, or that could stall it."""
    if not is_local(directory):
        raise Unsupported(
            f"The {what} {directory} is on {filesystem_type(directory)}, which is not local to this host:"
            " while a running guest's disks are copied, a stalled or failing target would stall or fail the guest's own writes",
            advice="Name a directory on a local filesystem with scratch",
        )
    if not places.reachable_by(directory, owner):
        barrier = _barrier(os.path.realpath(directory), owner)
        raise InvalidInput(
            f"QEMU (uid {owner[0]}) cannot reach the {what} {directory}: {barrier} does not let it through",
            advice=f"chmod o+x {barrier}, or choose another directory",
        )


def _barrier(directory: str, owner: tuple[int, int]) -> str:
    """The first directory from the top that does not let that user through."""
    above = os.path.dirname(directory)
    return directory if above == directory or places.reachable_by(above, owner) else _barrier(above, owner)
