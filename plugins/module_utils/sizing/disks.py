# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Change the virtual size of a disk: live by QEMU itself, never beside it."""

from __future__ import annotations

from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import chain, qemu_img
from ..hypervisor.connection import constant, explaining
from ..hypervisor.domain_model import Layer
from ..safety.space import human
from .change import DiskGrowth


def grow_live(handle: Any, action: DiskGrowth) -> None:
    """blockResize; the guest is told by its controller."""
    with explaining(
        f"Growing disk {action.target!r} of domain {handle.name()!r} to {human(action.size)}",
        state="The disk has its old size.",
    ):
        handle.blockResize(action.target, action.size, constant("VIR_DOMAIN_BLOCK_RESIZE_BYTES") or 0)
        now = handle.blockInfo(action.target)[0]
    if now != action.size:
        raise VmkeeperError(
            f"Disk {action.target!r} of domain {handle.name()!r} has {human(now)} after it was grown to {human(action.size)}",
            state="The guest runs.",
            advice="See libvirt's log",
        )


def grow_offline(handle: Any, action: DiskGrowth) -> None:
    """qemu-img on the image of a stopped domain; its lock keeps everybody else out."""
    if action.path is None or action.format is None:
        return
    if action.kind == "block" and action.format == "raw":
        return  # the device itself was extended: there is no image to change
    qemu_img.run(
        ["resize", "-q", "-f", action.format, action.path, str(action.size)],
        doing=f"Growing disk {action.target!r} of domain {handle.name()!r}",
    )
    now = chain.virtual_size(Layer(action.path, action.format))
    if now != action.size:
        raise VmkeeperError(f"{action.path} has {now} bytes after it was grown to {action.size}", state="It is whole.")
