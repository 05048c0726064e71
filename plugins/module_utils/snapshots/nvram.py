# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the UEFI variables of a moment, and bring them back.

They are half a megabyte of raw flash that QEMU writes in place, so the copy is taken inside the window of the cut.  A freeze
stops the guest's filesystems and not its firmware: a variable that it writes in that very millisecond may be copied in part,
as a power cut would leave it, which the firmware's own fault-tolerant writes are made for.  A group is paused, so its copies
are exact.  When memory is resumed QEMU writes the variables of the memory's moment over the file.
"""

from __future__ import annotations

import os
import shutil

from .._errors import LibvirtFailed
from ..safety import places

#: A file larger than this holds no UEFI variables.
LARGEST = 64 << 20


def keep(source: str, path: str) -> None:
    """Copy the variables to a fresh file that only this user can read. Not durable yet: a guest may be frozen."""
    try:
        with open(source, "rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise LibvirtFailed(f"{source} is too large for UEFI variables", advice="See the domain's definition")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as copy:
            copy.write(content)
    except OSError as error:
        raise LibvirtFailed(f"Copying the UEFI variables {source} to {path}: {error.strerror}") from error


def bring_back(kept: str, present: str, *, owner: tuple[int, int]) -> None:
    """Make ``present`` what ``kept`` is, wholly or not at all; it keeps its owner and mode, or belongs to ``owner``."""
    temporary = present + ".new"
    try:
        uid, gid, mode = (*owner, 0o600)
        if os.path.exists(present):
            status = os.stat(present)
            uid, gid, mode = status.st_uid, status.st_gid, status.st_mode & 0o777
        places.unlink_quietly(temporary)  # by a run that was killed here
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as stream, open(kept, "rb") as source:
            shutil.copyfileobj(source, stream)
            os.fchown(stream.fileno(), uid, gid)
            os.fchmod(stream.fileno(), mode)
        places.fsync_file(temporary)
        os.replace(temporary, present)
        places.fsync_directory(os.path.dirname(present))
    except OSError as error:
        raise LibvirtFailed(
            f"Bringing back the UEFI variables {kept}: {error.strerror}",
            state="The domain is shut off and stands on the snapshot's disks; run this again.",
        ) from error
