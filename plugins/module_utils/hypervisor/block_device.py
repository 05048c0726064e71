# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a block device is made of, as the kernel tells it under ``/sys``: no program of LVM or ZFS need be installed."""

from __future__ import annotations

import os
import stat

THIN_LVM = "thin-lvm"
ZFS = "zfs"

SYSFS = "/sys"


def storage_of(path: str, sysfs: str = SYSFS) -> str | None:
    """``thin-lvm`` or ``zfs`` where ``path`` is a block device of these; None for every other device, file or nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return storage_below(os.path.join(sysfs, "dev", "block", number))


def storage_below(entry: str) -> str | None:
    """The same for a device's directory in ``/sys``.

    A ZFS volume is called ``zd0``.  A thin LVM volume stands on the device-mapper device of its pool, which LVM marks by the
    ending ``-tpool`` of its UUID (lvm2, ``lib/activate/dev_manager.c``); the volume's own UUID does not tell.
    """
    # A partition's directory lies in its device's.
    names = os.path.realpath(entry).split(os.sep)[-2:]
    if any(name.startswith("zd") and name[2:].isdigit() for name in names):
        return ZFS
    slaves = os.path.join(entry, "slaves")
    try:
        below = sorted(os.listdir(slaves))
    except OSError:
        return None
    for name in below:
        lower = os.path.join(slaves, name)
        if _device_mapper_uuid(lower).endswith("-tpool"):
            return THIN_LVM
        # encrypted or mapped once more: what is below decides
        found = storage_below(lower)
        if found is not None:
            return found
    return None


def _device_mapper_uuid(entry: str) -> str:
    try:
        with open(os.path.join(entry, "dm", "uuid"), encoding="utf-8", errors="replace") as stream:
            return stream.read().strip()
    except OSError:
        return ""
