# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plug and unplug vCPUs of a running domain, and see that the guest uses them."""

from __future__ import annotations

import contextlib
from typing import Any

from .._errors import AgentSilent, LibvirtFailed
from ..hypervisor import agent
from ..hypervisor.agent import AgentInfo
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, constant, explaining
from ..hypervisor.domain_model import read_domain
from .change import VcpuAction
from .facts import GuestCpus, guest_cpus
from .outcome import Outcome, wait_for


def apply(handle: Any, action: VcpuAction, info: AgentInfo | None) -> Outcome:
    """Do it; what the guest sees decides whether it was taken."""
    before = _count(handle, info)
    if action.plug_to is not None:
        problem = "the guest did not let go"
        try:
            _plug(handle, action.plug_to)
        except LibvirtFailed as error:
            if not handle.isActive():
                raise
            problem = error.problem
        live = read_domain(handle).vcpus_current
        if live != action.plug_to:
            now = _count(handle, info)
            return Outcome(now[1], False, f"{problem}: it has {live} vCPUs", now != before)
    if info is None or not {"guest-get-vcpus", "guest-set-vcpus"} <= info.commands:
        return Outcome(None, True, "the guest agent does not tell; QEMU has plugged them")
    # Each poll sees new vCPUs that ACPI has announced meanwhile, and asks for what is still missing.
    wait_for(lambda: _ask(handle, info, action.online))
    now = _count(handle, info)
    online = now[1]
    if online == action.online:
        return Outcome(online)
    return Outcome(online, False, f"the guest has {online} of {action.online} vCPUs online", now != before)


def _count(handle: Any, info: AgentInfo | None) -> tuple[int, int | None]:
    """How many vCPUs QEMU has, and how many the guest has online."""
    cpus = guest_cpus(handle, info)
    return read_domain(handle).vcpus_current, len(cpus.online) if cpus else None


def _plug(handle: Any, count: int) -> None:
    """Let QEMU have ``count`` vCPUs. An unplug is a request to the guest, so libvirt's own time limit (5 s) is no answer."""
    fewer = count < read_domain(handle).vcpus_current
    try:
        with explaining(f"Changing the vCPUs of domain {handle.name()!r} to {count}", state="It keeps those it has."):
            _set(handle, count, tolerate_timeout=fewer)
    finally:
        if fewer:
            wait_for(lambda: read_domain(handle).vcpus_current == count)


def _set(handle: Any, count: int, *, tolerate_timeout: bool) -> None:
    try:
        handle.setVcpusFlags(count, constant("VIR_DOMAIN_AFFECT_LIVE") or 0)
    except libvirt.libvirtError as error:
        if not (tolerate_timeout and code_of(error) == libvirt.VIR_ERR_OPERATION_TIMEOUT):
            raise


def _ask(handle: Any, info: AgentInfo, wanted: int) -> bool:
    cpus = guest_cpus(handle, info)
    if cpus is None:
        return False
    change = moves(cpus, wanted)
    if change:
        with contextlib.suppress(AgentSilent):
            agent.command(
                handle,
                "guest-set-vcpus",
                {"vcpus": [{"logical-id": number, "online": online} for number, online in change]},
                seconds=30,
            )
        cpus = guest_cpus(handle, info)
    return cpus is not None and len(cpus.online) == wanted


def moves(cpus: GuestCpus, wanted: int) -> list[tuple[int, bool]]:
    """Which vCPUs to bring online (the lowest first) or take offline (the highest first)."""
    missing = wanted - len(cpus.online)
    if missing > 0:
        return [(number, True) for number in sorted(cpus.offline)[:missing]]
    movable = sorted(cpus.online & cpus.can_offline, reverse=True)
    return [(number, False) for number in movable[:-missing]] if missing < 0 else []
