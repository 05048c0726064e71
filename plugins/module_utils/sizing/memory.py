# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Give memory to a running guest and take it back: balloon, virtio-mem, DIMM."""

from __future__ import annotations

import contextlib
from typing import Any
from xml.etree import ElementTree

from .._errors import AgentSilent, LibvirtFailed
from ..hypervisor import agent
from ..hypervisor.agent import AgentInfo
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import constant, explaining, message_of
from ..hypervisor.domain_model import read_domain
from ..safety.space import human
from .change import MemoryAction
from .facts import balloon, guest_memory, offline_blocks
from .outcome import Outcome, wait_for

_KIB = 1024
_EVENT_SECONDS = 3.0

#: A balloon whose guest has a driver for it begins to move within a moment.
_IDLE_SECONDS = 20.0
_STATE = "The guest runs; its memory is between the old and the new size."


def apply(handle: Any, action: MemoryAction, info: AgentInfo | None, wanted: int) -> Outcome:
    """Do it; ``wanted`` is the guest's memory in bytes then. Taken when QEMU and the guest agree that it is so."""
    notes: list[str] = []
    moves = True
    before = live(handle), guest_memory(handle, info).offline_blocks
    try:
        moves = _carry_out(handle, action, info, wanted, notes)
    except LibvirtFailed as error:
        if not handle.isActive():
            raise
        notes.append(error.problem)
    have = live(handle)
    guest = guest_memory(handle, info)
    taken = have == wanted and not guest.offline_blocks
    if have != wanted:
        notes.append(f"the guest has {human(have)} of the {human(wanted)} that were asked")
    if guest.offline_blocks:
        notes.append(f"the guest left {len(guest.offline_blocks)} blocks of its memory offline")
    if not moves:
        notes.append("its balloon does not move: the guest may have no driver for it")
    if guest.total is None:
        notes.append("the guest agent does not tell what the guest sees; its drivers have confirmed the size")
    return Outcome(guest.total, taken, "; ".join(notes), taken or (have, guest.offline_blocks) != before)


def _carry_out(handle: Any, action: MemoryAction, info: AgentInfo | None, wanted: int, notes: list[str]) -> bool:
    """The steps in their order; whether the balloon moves. ``notes`` get what the guest keeps."""
    moves = True
    if action.dimm and action.balloon is not None:
        moves = _set_balloon(handle, action.balloon)  # before the DIMM: libvirt's balloon target counts it
    for alias, size in action.virtio_mem:
        kept = _request(handle, alias, size)
        if kept > size:
            # Pages that cannot move hold some blocks. Asking for what it keeps makes that stable; the balloon does the rest.
            _request(handle, alias, kept)
            notes.append(f"the guest keeps {human(kept - size)} of virtio-mem, so the balloon takes as much")
    if action.dimm:
        _plug(handle, action.dimm)
    for alias in action.unplug:
        refusal = _unplug(handle, alias)
        if refusal:
            notes.append(f"the guest keeps the DIMM {alias} ({refusal}), so the balloon takes its size")
    if not action.dimm and action.balloon is not None:
        moves = _set_balloon(handle, action.balloon)
    surplus = live(handle) - wanted
    if surplus > 0 and moves and read_domain(handle).has_balloon:
        _set_balloon(handle, balloon(handle, read_domain(handle)) - surplus)
    if action.online:
        _bring_online(handle, info, expected=bool(action.dimm))
    return moves


def live(handle: Any) -> int:
    """Bytes that the running guest has, by its drivers."""
    domain = read_domain(handle)
    return balloon(handle, domain) + sum(one.current for one in domain.memory_devices if one.model == "virtio-mem")


def _set_balloon(handle: Any, size: int) -> bool:
    """Let the balloon leave ``size`` bytes to the guest. False when it does not move: it then stays where it is."""
    before = balloon(handle, read_domain(handle))
    _ask_balloon(handle, size)
    if before != size and not wait_for(lambda: balloon(handle, read_domain(handle)) != before, _IDLE_SECONDS):
        _ask_balloon(handle, before)  # a driver that is loaded later must not surprise anybody
        return False
    # The guest's driver reports how far it got. libvirt's own record follows an event that QEMU sends once a second at most;
    # whoever reads the definition right after this task should not see the size on the way there.
    if wait_for(lambda: balloon(handle, read_domain(handle)) == size):
        wait_for(lambda: handle.info()[2] * _KIB == size, _EVENT_SECONDS)
    return True


def _ask_balloon(handle: Any, size: int) -> None:
    with explaining(f"Setting the balloon of domain {handle.name()!r} to {human(size)}", state=_STATE):
        handle.setMemoryFlags(size // _KIB, constant("VIR_DOMAIN_AFFECT_LIVE") or 0)


def _device(handle: Any, alias: str) -> ElementTree.Element | None:
    with explaining(f"Reading domain {handle.name()!r}", state=_STATE):
        root = ElementTree.fromstring(handle.XMLDesc(0))
    for element in root.iterfind("devices/memory"):
        found = element.find("alias")
        if found is not None and found.get("name") == alias:
            return element
    return None


def _request(handle: Any, alias: str, size: int) -> int:
    """virtio-mem: ask for a size and wait until the guest's driver has got there; returns how far it got, in bytes."""
    element = _device(handle, alias)
    target = element.find("target") if element is not None else None
    if element is None or target is None:
        return 0
    requested = target.find("requested")
    if requested is None:
        requested = ElementTree.SubElement(target, "requested")
    requested.set("unit", "KiB")
    requested.text = str(size // _KIB)
    current = target.find("current")
    if current is not None:
        target.remove(current)
    with explaining(f"Asking for {human(size)} of virtio-mem in domain {handle.name()!r}", state=_STATE):
        handle.updateDeviceFlags(
            ElementTree.tostring(element, encoding="unicode"), constant("VIR_DOMAIN_AFFECT_LIVE") or 0
        )
    wait_for(lambda: _plugged(handle, alias) == size)
    return _plugged(handle, alias)


def _plugged(handle: Any, alias: str) -> int:
    return next((one.current for one in read_domain(handle).memory_devices if one.alias == alias), 0)


def _plug(handle: Any, size: int) -> None:
    xml = f"<memory model='dimm'><target><size unit='KiB'>{size // _KIB}</size><node>0</node></target></memory>"
    with explaining(f"Plugging {human(size)} of memory into domain {handle.name()!r}", state=_STATE):
        handle.attachDeviceFlags(xml, constant("VIR_DOMAIN_AFFECT_LIVE") or 0)


def _unplug(handle: Any, alias: str) -> str | None:
    """Take a DIMM out; the reason when the guest does not let it go."""
    element = _device(handle, alias)
    if element is None:
        return None
    try:
        handle.detachDeviceFlags(
            ElementTree.tostring(element, encoding="unicode"), constant("VIR_DOMAIN_AFFECT_LIVE") or 0
        )
    except libvirt.libvirtError as error:
        return message_of(error)
    return None if wait_for(lambda: _device(handle, alias) is None) else "it did not answer"


def _bring_online(handle: Any, info: AgentInfo | None, *, expected: bool) -> None:
    """Bring the guest's offline blocks online. A plugged DIMM shows up after a moment, virtio-mem's memory at once."""
    if info is None or not {"guest-get-memory-blocks", "guest-set-memory-blocks"} <= info.commands:
        return
    before = guest_memory(handle, info)
    seen = {"any": bool(before.offline_blocks)}

    def all_online() -> bool:
        with contextlib.suppress(AgentSilent):
            offline = offline_blocks(agent.command(handle, "guest-get-memory-blocks"))
            if not offline:
                return seen["any"] or not expected
            seen["any"] = True
            agent.command(
                handle,
                "guest-set-memory-blocks",
                {"mem-blks": [{"phys-index": number, "online": True} for number in offline]},
                seconds=30,
            )
        return False

    # A guest that brings its memory online by itself shows nothing offline at any time.
    wait_for(all_online, 10.0 if expected and not seen["any"] else 60.0)
