# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How memory reaches a guest, and how it is taken back: balloon, virtio-mem, DIMM. Pure."""

from __future__ import annotations

from ..hypervisor.domain_model import Domain, MemoryDevice
from ..safety.space import human
from .change import LIVE, NONE, Change, MemoryAction, decide
from .definition import configured_memory
from .facts import Facts
from .request import Request

#: Linux on x86 plugs memory in blocks of 128 MiB; the guest's own number is used where it tells.
DEFAULT_BLOCK = 128 << 20

#: What must stay available in a guest from which memory is taken, so that it does not start killing processes.
LEAST_AVAILABLE = 32 << 20


def live_memory(facts: Facts) -> int | None:
    """Bytes that the running guest has: what the balloon leaves it, and what virtio-mem has plugged."""
    if facts.live is None or facts.balloon is None:
        return None
    return facts.balloon + sum(device.current for device in _virtio_mem(facts.live))


def _virtio_mem(domain: Domain) -> list[MemoryDevice]:
    return [device for device in domain.memory_devices if device.model == "virtio-mem"]


def memory_changes(request: Request, facts: Facts) -> tuple[list[Change], list[str]]:
    """The change of the memory, if one is due, and what of it waits for the next start."""
    wanted = request.memory
    if wanted is None:
        return [], []
    configured = configured_memory(facts.configured)
    have = live_memory(facts)
    action, obstacle, why = _live(wanted, facts) if have is not None else (None, "", "")
    started_so = configured == wanted and _started_with(facts.live, facts.configured)
    if started_so and have == wanted and action is None and facts.memory.offline_blocks:
        # Another start would bring the same.
        return [Change("memory", have, wanted, NONE, obstacle, warn=True)], []
    decision = decide(
        request,
        facts,
        "The memory",
        in_force=have == wanted and not facts.memory.offline_blocks,
        configured=configured == wanted,
        live=action is not None,
        obstacle=obstacle,
        why=why,
    )
    pending = [f"memory: {decision.why}"] if decision.pending else []
    if decision.how == NONE:
        return [], pending
    before = configured if have is None or have == wanted else have
    return [
        Change(
            "memory",
            before,
            wanted,
            decision.how,
            decision.why,
            action if decision.how == LIVE else None,
            restart_helps=not started_so,
        )
    ], pending


def _started_with(live: Domain | None, configured: Domain) -> bool:
    """Whether the running domain has the memory and the memory devices that its definition says."""
    return live is not None and (live.memory_max, sorted(one.size for one in live.memory_devices)) == (
        configured.memory_max,
        sorted(one.size for one in configured.memory_devices),
    )


def _live(wanted: int, facts: Facts) -> tuple[MemoryAction | None, str, str]:
    have = live_memory(facts)
    if facts.live is None or have is None:
        return None, "the domain is shut off", ""
    if wanted == have:
        if facts.can("guest-set-memory-blocks"):
            return MemoryAction(online=True), "", "QEMU has it; the guest brings it online"
        return None, "the guest does not bring its memory online, and its agent may not", ""
    return _more(wanted, facts, facts.live) if wanted > have else _less(wanted, have, facts, facts.live)


def _more(wanted: int, facts: Facts, live: Domain) -> tuple[MemoryAction | None, str, str]:
    """First what the balloon holds, then virtio-mem, then a DIMM."""
    devices = _virtio_mem(live)
    fixed = live.memory_max - sum(device.size for device in devices)
    balloon = min(fixed, wanted - sum(device.current for device in devices))
    missing = wanted - sum(device.current for device in devices) - balloon
    ways = ["the balloon gives it back"] if facts.balloon is not None and balloon > facts.balloon else []
    grown: list[tuple[str, int]] = []
    for device in devices:
        take = min(device.size - device.current, missing)
        take -= take % (device.block or 1)
        if take > 0 and device.alias:
            grown.append((device.alias, device.current + take))
            missing -= take
            ways.append("virtio-mem plugs it")
    if missing:
        obstacle = _dimm_obstacle(missing, facts, live)
        if obstacle:
            return None, obstacle, ""
        ways.append(f"a DIMM of {human(missing)} is plugged")
    action = MemoryAction(
        balloon=balloon if live.has_balloon and balloon != facts.balloon else None,
        virtio_mem=tuple(grown),
        dimm=missing,
        online=bool(missing or grown),
    )
    return action, "", " and ".join(ways)


def _dimm_obstacle(size: int, facts: Facts, live: Domain) -> str | None:
    block = facts.memory.block_size or DEFAULT_BLOCK
    used = sum(1 for device in live.memory_devices if device.model in ("dimm", "nvdimm"))
    if not live.memory_limit:
        return f"it was started with {human(live.memory_max)} and without maxMemory, so that none can be plugged"
    if live.memory_max + size > live.memory_limit:
        return f"it was started with room for {human(live.memory_limit)}"
    if used >= live.memory_slots:
        return f"its {live.memory_slots} memory slots are taken"
    if size % block:
        return f"the guest takes memory in blocks of {human(block)}, and {human(size)} is not a multiple"
    page = facts.host.page_of(live)
    if page and size % page:
        return f"its memory comes in hugepages of {human(page)}, and {human(size)} is not a multiple"
    return None


def _less(wanted: int, have: int, facts: Facts, live: Domain) -> tuple[MemoryAction | None, str, str]:
    """First virtio-mem, then DIMMs that fit wholly, then the balloon, which also stands in for a DIMM that is refused."""
    left = have - wanted
    available = facts.memory.available
    if available is None:
        return None, "the guest does not tell what it can spare", ""
    if left > available - LEAST_AVAILABLE:
        return None, f"the guest has only {human(available)} to spare", ""
    ways: list[str] = []
    shrunk: list[tuple[str, int]] = []
    for device in reversed(_virtio_mem(live)):
        give = min(device.current, left)
        give -= give % (device.block or 1)
        if give > 0 and device.alias:
            shrunk.append((device.alias, device.current - give))
            left -= give
            ways.append("virtio-mem gives it back")
    unplugged: list[str] = []
    kept = left
    for device in sorted(live.memory_devices, key=lambda one: -one.size):
        if device.model == "dimm" and device.alias and device.size <= kept:
            unplugged.append(device.alias)
            kept -= device.size
    if unplugged:
        ways.append("DIMMs are unplugged if the guest lets them go")
    if left and not live.has_balloon and kept:
        return None, "it has no balloon device to give memory back", ""
    if left:
        ways.append("the balloon takes it")
    rest = (
        wanted
        - sum(device.current for device in _virtio_mem(live))
        + sum(device.current - dict(shrunk).get(str(device.alias), device.current) for device in _virtio_mem(live))
    )
    balloon = rest if left and live.has_balloon else None
    return MemoryAction(balloon, tuple(shrunk), 0, tuple(unplugged)), "", " and ".join(ways)
