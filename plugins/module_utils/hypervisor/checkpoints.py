# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints that a change of the layers would make lie: they end before it, so that the next backup is a full one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .binding import libvirt
from .connection import constant, explaining

#: How the names of this collection's checkpoints begin. Others are other people's, and never touched.
OURS = "vmk-"


def end(handle: Any, names: Collection[str], *, state: str) -> None:
    """Remove checkpoints with their bitmaps, children before their parents.

    Those that do not exist are passed over; ``state`` says how things stand when it fails.  A bitmap in a layer that QEMU may
    not write, or of a domain that does not run, stays, unused, and what libvirt remembers of it goes.
    """
    if not names:
        return
    flags = constant("VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL") or 0
    with explaining(f"Ending checkpoints of domain {handle.name()!r}", state=state):
        for checkpoint in reversed(handle.listAllCheckpoints(flags)):
            if checkpoint.getName() not in names:
                continue
            try:
                checkpoint.delete(0)
            except libvirt.libvirtError:
                checkpoint.delete(constant("VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY") or 0)
