# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What will change, how and why: decided from facts alone, before anything is touched.

A thing has three values: configured (the next start), live (QEMU now) and what the guest sees.  A change is due when one of
them is not what was asked.  The order of preference is: live, at a restart if the task allows one, at the next boot.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .._errors import AgentSilent, Busy, InvalidInput, NoSpace, NotFound, Refused, Unsupported
from ..hypervisor.capture import REASONS
from ..hypervisor.domain_model import Domain, MemoryDevice
from ..safety.space import free_bytes, human
from .definition import Wish, configured_memory
from .facts import DiskFacts, Facts
from .guest_filesystem import Filesystem
from .request import DiskRequest, Request

LIVE = "live"
OFFLINE = "offline"
RESTART = "restart"
NEXT_BOOT = "next_boot"
NONE = "none"

#: Checkpoints of ours are named ``vmk-<repository>-<point>``; everybody else's are left alone.
OUR_CHECKPOINTS = "vmk-"

#: Linux on x86 plugs memory in blocks of 128 MiB; the guest's own number is used where it tells.
DEFAULT_BLOCK = 128 << 20

#: What must stay available in a guest from which memory is taken, so that it does not start killing processes.
LEAST_AVAILABLE = 32 << 20


@dataclass(frozen=True)
class VcpuAction:
    """Live steps: how many vCPUs QEMU shall have (None: as now), how many the guest shall have online."""

    plug_to: int | None
    online: int


@dataclass(frozen=True)
class MemoryAction:
    """Live steps in bytes; devices by alias. ``online``: the guest's offline blocks are brought online."""

    balloon: int | None = None
    virtio_mem: tuple[tuple[str, int], ...] = ()
    dimm: int = 0
    unplug: tuple[str, ...] = ()
    online: bool = False


@dataclass(frozen=True)
class DiskGrowth:
    """A disk's virtual size, from and to, in bytes; ``path`` and ``format`` of its top image when it is off."""

    target: str
    size: int
    path: str | None
    format: str | None
    kind: str


@dataclass(frozen=True)
class DiskShrink:
    """A disk's smaller virtual size in bytes; ``path`` and ``format`` of its only image."""

    target: str
    size: int
    path: str
    format: str


@dataclass(frozen=True)
class Change:
    """One thing: ``how`` is live, offline (now, on the stopped domain), restart, next_boot or none (``why`` says why)."""

    what: str
    before: int | None
    after: int | None
    how: str
    why: str
    action: Any = None
    ends_checkpoints: tuple[str, ...] = ()
    completes_at_restart: bool = False

    @property
    def due(self) -> bool:
        """Whether something will be done."""
        return self.how != NONE

    def as_result(self, *, applied: str | None = None, guest_sees: int | None = None, why: str = "") -> dict[str, Any]:
        """One entry of ``changes``."""
        return {
            "what": self.what,
            "before": self.before,
            "after": self.after,
            "guest_sees": guest_sees,
            "applied": applied or self.how,
            "why": why or self.why,
            "ends_checkpoints": list(self.ends_checkpoints),
        }


@dataclass(frozen=True)
class ChangeSet:
    """Everything that will be done to one domain. ``wish`` is what its definition shall say."""

    changes: tuple[Change, ...]
    wish: Wish
    pending: tuple[str, ...] = ()  #: why the next boot will differ from now

    @property
    def due(self) -> tuple[Change, ...]:
        """The changes of which something will be done."""
        return tuple(change for change in self.changes if change.due)

    @property
    def shrinks(self) -> tuple[DiskShrink, ...]:
        """The disks that get smaller."""
        return tuple(change.action for change in self.changes if isinstance(change.action, DiskShrink))

    @property
    def restart(self) -> bool:
        """Whether the domain is shut down and started again."""
        return any(change.how == RESTART for change in self.changes)


@dataclass(frozen=True)
class _Decision:
    how: str
    why: str
    pending: bool = False


def compute(request: Request, facts: Facts) -> ChangeSet:
    """The change set; raises what a person must decide, before anything was changed."""
    _check_condition(request, facts)
    changes: list[Change] = []
    pending: list[str] = []
    for change, waits in (_vcpus(request, facts), _memory(request, facts), _limits(request, facts)):
        changes += change
        pending += waits
    for disk in request.disks:
        changes += _disk(request, disk, facts)
    if any(change.how == RESTART for change in changes):
        changes = [_carried_by_restart(change) for change in changes]
    _check_host(request, facts, changes)
    planned = ChangeSet(tuple(changes), _wish(request, facts), tuple(pending))
    if planned.restart:
        _check_restart(request, facts)
    return planned


def _wish(request: Request, facts: Facts) -> Wish:
    return Wish(request.vcpus, request.max_vcpus, request.memory, request.max_memory)


def _check_condition(request: Request, facts: Facts) -> None:
    domain = facts.live or facts.configured
    if domain.managed_save:
        raise Refused(
            f"Domain {domain.name!r} has a saved state, whose RAM would resume on other hardware",
            advice="Start it, or drop the saved state (virsh managedsave-remove), then run this again",
        )
    if facts.job:
        raise Busy(f"Domain {domain.name!r} is busy with {facts.job}", advice="Wait for it to end, then run this again")
    if facts.frozen:
        raise Refused(
            f"The filesystems of domain {domain.name!r} are frozen", advice="Thaw it with fsfreeze: state: thawed"
        )
    if facts.live is not None and not facts.live.state.running and request.apply != NEXT_BOOT:
        raise Refused(
            f"Domain {domain.name!r} is {domain.state.name} ({domain.state.reason}), so its guest cannot take anything",
            advice="Resume it first, or use apply: next_boot",
        )
    if not domain.persistent and request.apply == NEXT_BOOT:
        raise Refused(
            f"Domain {domain.name!r} is transient: it has no next boot", advice="Use apply: live, or define it first"
        )


# --- how ---------------------------------------------------------------------------------------------


def _decide(
    request: Request, facts: Facts, what: str, *, in_force: bool, configured: bool, live: bool, obstacle: str, why: str
) -> _Decision:
    """The order of preference, for one thing. ``obstacle`` is why it cannot be done live."""
    persistent = facts.configured.persistent
    if facts.live is None:
        return _Decision(NONE, "") if configured else _Decision(NEXT_BOOT, "the domain is shut off")
    if in_force:
        if configured or not persistent:
            return _Decision(NONE, "")
        return _Decision(NEXT_BOOT, "the guest has it already; only the definition did not say so")
    if request.apply == NEXT_BOOT:
        return _Decision(NONE if configured else NEXT_BOOT, "apply: next_boot", pending=True)
    if live:
        return _Decision(LIVE, why)
    if request.apply == LIVE or not persistent:
        raise Refused(
            f"{what} of domain {facts.name!r} cannot be changed live: {obstacle}",
            advice="Use apply: auto, with allow_restart to have it at once"
            if persistent
            else "It is transient: define it to change it at a restart",
        )
    if request.allow_restart:
        return _Decision(RESTART, obstacle)
    return _Decision(NONE if configured else NEXT_BOOT, obstacle, pending=True)


def _carried_by_restart(change: Change) -> Change:
    """vCPUs and memory need no hot-plug in a domain that is restarted anyway; disks grow live first."""
    if change.what in ("vcpus", "memory") and change.how in (LIVE, NEXT_BOOT):
        return replace(change, how=RESTART, why="the domain is restarted anyway", action=None)
    if change.what in ("max_vcpus", "max_memory") and change.how == NEXT_BOOT:
        return replace(change, how=RESTART, why="the domain is restarted anyway")
    return change


# --- vCPUs -------------------------------------------------------------------------------------------


def _vcpus(request: Request, facts: Facts) -> tuple[list[Change], list[str]]:
    wanted = request.vcpus
    if wanted is None:
        return [], []
    conf, live = facts.configured, facts.live
    online = len(facts.cpus.online) if facts.cpus else None
    effective = online if online is not None else (live.vcpus_current if live else conf.vcpus_current)
    action, obstacle, why = _vcpus_live(wanted, facts) if live else (None, "", "")
    in_force = live is not None and effective == wanted and live.vcpus_current >= wanted
    decision = _decide(
        request,
        facts,
        "The vCPUs",
        in_force=in_force,
        configured=conf.vcpus_current == wanted and conf.vcpus_max >= wanted,
        live=action is not None,
        obstacle=obstacle,
        why=why,
    )
    kept = live is not None and live.vcpus_current > wanted
    pending = []
    if decision.pending:
        pending.append(f"vcpus: {decision.why}")
    elif kept and (in_force or decision.how == LIVE) and not (action and action.plug_to is not None):
        pending.append("vcpus: QEMU gives up the vCPUs that are offline in the guest at its next start")
    if decision.how == NONE:
        return [], pending
    before = conf.vcpus_current if in_force else effective
    change = Change("vcpus", before, wanted, decision.how, decision.why)
    if decision.how == LIVE:
        change = replace(change, action=action, completes_at_restart=bool(pending))
    return [change], pending


def _vcpus_live(wanted: int, facts: Facts) -> tuple[VcpuAction | None, str, str]:
    """Live steps, or the obstacle; and why it is done so."""
    live = facts.live
    if live is None:
        return None, "the domain is shut off", ""
    have = live.vcpus_current
    if wanted > live.vcpus_max:
        return None, f"it was started with room for {live.vcpus_max} vCPUs", ""
    if wanted > have:
        return VcpuAction(wanted, wanted), "", f"it has room for {live.vcpus_max} vCPUs"
    removable = sum(1 for vcpu in live.vcpus if vcpu.enabled and vcpu.hotpluggable)
    # QEMU's own emulation (TCG) takes an unplugged vCPU from the guest but never reports it gone, and the next memory that
    # is plugged ends QEMU (seen with 7.2). Under KVM it is sound.
    if wanted < have and live.domain_type == "kvm" and have - removable <= wanted:
        return VcpuAction(wanted, wanted), "", "the vCPUs to go are hot-pluggable"
    reason = (
        "QEMU's emulation (TCG) cannot unplug vCPUs safely"
        if live.domain_type != "kvm"
        else "vCPUs that it was started with cannot be unplugged"
    )
    if facts.cpus is None or not facts.can("guest-set-vcpus", "guest-get-vcpus"):
        return None, f"{reason}, and the guest agent cannot take them offline", ""
    if len(facts.cpus.online) > wanted and len(facts.cpus.online - facts.cpus.can_offline) > wanted:
        return None, f"{reason}, and the guest cannot take so many offline", ""
    if len(facts.cpus.online) < wanted:
        return VcpuAction(None, wanted), "", "QEMU has them; the guest brings them online"
    return VcpuAction(None, wanted), "", f"{reason}: the guest takes them offline"


# --- memory ------------------------------------------------------------------------------------------


def live_memory(facts: Facts) -> int | None:
    """Bytes that the running guest has: what the balloon leaves it, and what virtio-mem has plugged."""
    if facts.live is None or facts.balloon is None:
        return None
    return facts.balloon + sum(device.current for device in _virtio_mem(facts.live))


def _virtio_mem(domain: Domain) -> list[MemoryDevice]:
    return [device for device in domain.memory_devices if device.model == "virtio-mem"]


def _memory(request: Request, facts: Facts) -> tuple[list[Change], list[str]]:
    wanted = request.memory
    if wanted is None:
        return [], []
    configured = configured_memory(facts.configured)
    have = live_memory(facts)
    action, obstacle, why = _memory_live(wanted, facts) if have is not None else (None, "", "")
    decision = _decide(
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
        Change("memory", before, wanted, decision.how, decision.why, action if decision.how == LIVE else None)
    ], pending


def _memory_live(wanted: int, facts: Facts) -> tuple[MemoryAction | None, str, str]:
    have = live_memory(facts)
    if facts.live is None or have is None:
        return None, "the domain is shut off", ""
    if wanted == have:
        if facts.can("guest-set-memory-blocks"):
            return MemoryAction(online=True), "", "QEMU has it; the guest brings it online"
        return None, "the guest does not bring its memory online, and its agent may not", ""
    return _more_memory(wanted, facts, facts.live) if wanted > have else _less_memory(wanted, have, facts, facts.live)


def _more_memory(wanted: int, facts: Facts, live: Domain) -> tuple[MemoryAction | None, str, str]:
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
    return None


def _less_memory(wanted: int, have: int, facts: Facts, live: Domain) -> tuple[MemoryAction | None, str, str]:
    """First virtio-mem, then DIMMs that fit wholly, then the balloon, which also stands in for a DIMM that is refused."""
    left = have - wanted
    available = facts.memory.available
    if available is not None and left > available - LEAST_AVAILABLE:
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


# --- room for more -----------------------------------------------------------------------------------


def _limits(request: Request, facts: Facts) -> tuple[list[Change], list[str]]:
    """``max_vcpus`` and ``max_memory``: room that only a start can make."""
    changes, pending = [], []
    conf, live = facts.configured, facts.live
    at = "only a start can make room"
    for what, wanted, configured, running, least in (
        (
            "max_vcpus",
            request.max_vcpus,
            conf.vcpus_max,
            live.vcpus_max if live else None,
            request.vcpus or conf.vcpus_current,
        ),
        (
            "max_memory",
            request.max_memory,
            conf.memory_limit,
            live.memory_limit if live else None,
            request.memory or configured_memory(conf),
        ),
    ):
        if wanted is None:
            continue
        if wanted < least:
            raise InvalidInput(
                f"{what} {wanted} is less than domain {facts.name!r} uses ({least})", advice=f"Raise {what}"
            )
        if request.apply == LIVE:
            raise Refused(f"{what} cannot be changed live: {at}", advice="Use apply: auto or next_boot")
        if not conf.persistent:
            raise Refused(
                f"Domain {facts.name!r} is transient: it has no next boot for {what}", advice="Define it first"
            )
        if wanted != configured:
            changes.append(Change(what, configured, wanted, NEXT_BOOT, at))
        if live is not None and wanted != running:
            pending.append(f"{what}: {at}")
    return changes, pending


# --- disks -------------------------------------------------------------------------------------------


def _disk(request: Request, wanted: DiskRequest, facts: Facts) -> list[Change]:
    known = facts.disks.get(wanted.target)
    domain = facts.live or facts.configured
    if known is None:
        existing = [disk.target for disk in domain.disks]
        raise NotFound(
            f"Domain {facts.name!r} has no disk {wanted.target!r}",
            advice="Its disks are: " + (", ".join(existing) if existing else "none"),
            existing=existing,
        )
    changes: list[Change] = []
    size = known.size
    if wanted.size is not None:
        _check_disk(known, facts)
        if size is None:
            raise Unsupported(
                f"The size of disk {wanted.target!r} of domain {facts.name!r} is not known", advice="See domain_info"
            )
        if wanted.size > size:
            changes.append(_growth(request, wanted.size, known, size, facts))
        elif wanted.size < size:
            return [_shrink(request, wanted.size, known, size, facts)]
        size = wanted.size
    if wanted.grow_filesystem and size is not None:
        changes += _filesystem(wanted.target, size, facts)
    return changes


def _check_disk(known: DiskFacts, facts: Facts) -> None:
    disk, name = known.disk, facts.name
    reason = None
    if disk.device != "disk":
        reason = f"it is a {disk.device}"
    elif disk.transient:
        reason = "it is transient"
    elif disk.readonly:
        reason = "it is read-only"
    elif disk.shareable:
        reason = "other guests may use it at the same time"
    elif disk.path is None:
        reason = REASONS["not-local"]
    elif disk.storage is not None:
        reason = REASONS[disk.storage]
    elif known.problem:
        reason = known.problem
    if reason:
        raise Refused(
            f"Disk {disk.target!r} of domain {name!r} cannot be resized: {reason}", advice="Remove it from disks"
        )
    if disk.job is not None:
        raise Busy(
            f"Disk {disk.target!r} of domain {name!r} is busy with a {disk.job.job}",
            advice="Wait for it to end, then run this again",
        )


def _ended_checkpoints(known: DiskFacts, facts: Facts) -> tuple[str, ...]:
    """Checkpoints that a resize ends.

    With an overlay on the disk the bitmaps of its layers no longer have one size, and the next increment would silently
    miss what was written before (reproduced on libvirt 9.0).
    """
    if len(known.layers) < 2 or not known.checkpoints:
        return ()
    foreign = [name for name in known.checkpoints if not name.startswith(OUR_CHECKPOINTS)]
    if foreign:
        raise Refused(
            f"Disk {known.disk.target!r} of domain {facts.name!r} has overlays, and a resize would make"
            f" increments since checkpoint {', '.join(foreign)} lose data",
            advice="Remove those checkpoints with the tool that made them, or commit the overlays first",
            checkpoints=foreign,
        )
    return known.checkpoints


def _growth(request: Request, wanted: int, known: DiskFacts, size: int, facts: Facts) -> Change:
    disk = known.disk
    _check_room(request, wanted, known, size, facts)
    action = DiskGrowth(disk.target, wanted, disk.path, disk.format, disk.kind)
    what = f"disk {disk.target}"
    if facts.live is not None:
        if request.apply == NEXT_BOOT:
            raise Refused(
                f"Disk {disk.target!r} of domain {facts.name!r} is in use, so its image cannot be changed beside QEMU",
                advice="Use apply: auto; a disk grows live, the guest only sees more room",
            )
        return Change(
            what, size, wanted, LIVE, "a disk grows while it is used", action, _ended_checkpoints(known, facts)
        )
    if known.checkpoints:
        raise Refused(
            f"Disk {disk.target!r} of domain {facts.name!r} has checkpoints, which libvirt keeps right only while it runs",
            advice="Start the domain, then run this again",
        )
    if disk.encrypted or known.internal_snapshots:
        raise Refused(
            f"Disk {disk.target!r} of domain {facts.name!r} "
            + ("is encrypted" if disk.encrypted else "holds internal snapshots")
            + ", so its image is not changed while the domain is off",
            advice="Start the domain, then run this again",
        )
    return Change(what, size, wanted, OFFLINE, "the domain is shut off", action)


def _shrink(request: Request, wanted: int, known: DiskFacts, size: int, facts: Facts) -> Change:
    """Only at a stop, only when something tells whether it went well, and only for an image that nobody else needs."""
    disk = known.disk
    doing = f"Disk {disk.target!r} of domain {facts.name!r} has {human(size)} and would be cut to {human(wanted)}"
    if not request.allow_shrink:
        raise Refused(
            f"{doing}: what lies behind that would be lost",
            advice="Give the present size or more, or allow_shrink: true if its last filesystem is an ext4 with room to spare",
        )
    if request.apply != "auto" or not request.allow_restart or not request.rollback:
        raise Refused(
            f"{doing}: that is done while the domain is off, and kept only if the domain is well with it",
            advice="Use apply: auto, allow_restart: true and rollback: true",
        )
    reason = None
    if disk.kind != "file" or disk.path is None or disk.format not in ("raw", "qcow2"):
        reason = "it is not a raw or qcow2 file"
    elif disk.encrypted:
        reason = "it is encrypted"
    elif not facts.configured.persistent:
        reason = "the domain is transient"
    elif len(known.layers) > 1:
        reason = "it has overlays; end them with blockcommit, or remove its snapshots"
    elif known.readers:
        reason = f"{', '.join(known.readers)} would see it cut, too"
    elif known.internal_snapshots:
        reason = "its image holds internal snapshots; remove them first"
    elif known.checkpoints and facts.live is None:
        reason = f"checkpoints {', '.join(known.checkpoints)} can be ended only while the domain runs; start it first"
    foreign = [name for name in known.checkpoints if not name.startswith(OUR_CHECKPOINTS)]
    if foreign and reason is None:
        reason = (
            f"checkpoints {', '.join(foreign)} of another tool would no longer be right; remove them with that tool"
        )
    if reason is not None or disk.path is None or disk.format is None:
        raise Refused(f"{doing}, and cannot be: {reason}", advice="Or copy the data to a new disk inside the guest")
    return Change(
        f"disk {disk.target}",
        size,
        wanted,
        RESTART,
        "a disk gets smaller while the domain is off, as a copy, if its filesystem fits",
        DiskShrink(disk.target, wanted, os.path.realpath(disk.path), disk.format),
        known.checkpoints,
    )


def _check_room(request: Request, wanted: int, known: DiskFacts, size: int, facts: Facts) -> None:
    path = known.disk.path
    if known.device_size is not None:
        if known.device_size < wanted:
            raise Refused(
                f"Disk {known.disk.target!r} of domain {facts.name!r} lies on {path}, which has {human(known.device_size)}",
                advice="Extend the device first (lvextend, rbd resize, ...), then run this again",
            )
        return
    if request.overcommit or path is None:
        return
    directory = os.path.dirname(path)
    free = free_bytes(directory)
    if free < wanted - size:
        raise NoSpace(
            f"Disk {known.disk.target!r} of domain {facts.name!r} would grow by {human(wanted - size)},"
            f" and the filesystem of {directory} has {human(free)} free",
            advice="Make room there, or use overcommit: true to promise more than there is",
            path=directory,
            needed=wanted - size,
            free=free,
        )


def _filesystem(target: str, size: int, facts: Facts) -> list[Change]:
    """What is on a disk of ``size`` bytes, where the guest can tell and act."""
    what = f"filesystem {target}"
    problem = "the domain is shut off" if facts.live is None else facts.filesystems_problem
    mine: list[Filesystem] = [one for one in facts.filesystems if one.target == target]
    if problem is None and not mine:
        problem = "the guest has mounted nothing that lies on it"
    if problem is None and mine[0].problem:
        problem = f"{mine[0].mountpoint[:100]}: {mine[0].problem}"
    if problem is not None:
        return [Change(what, None, None, NONE, problem)]
    found = mine[0]
    if found.fills(size):
        return []
    why = f"{found.type} at {found.mountpoint[:100]} grows while mounted"
    return [Change(what, found.size, found.room(size), LIVE, why, found)]


# --- the host ----------------------------------------------------------------------------------------


def _check_host(request: Request, facts: Facts, changes: Iterable[Change]) -> None:
    if request.overcommit:
        return
    conf, host = facts.configured, facts.host
    for change in changes:
        if not change.due or change.before is None or change.after is None or change.after <= change.before:
            continue
        if change.what == "vcpus" and change.after > host.cpus:
            raise Refused(
                f"Domain {facts.name!r} would have {change.after} vCPUs, and this host has {host.cpus} CPUs",
                advice="Give fewer, or overcommit: true",
            )
        if change.what == "memory":
            growth = change.after - change.before
            page = conf.hugepages or host.default_hugepage
            free = host.free_memory if conf.hugepages is None else host.free_hugepages.get(page, 0) * page
            if growth > free:
                kind = "memory" if conf.hugepages is None else f"hugepages of {human(page)}"
                raise Refused(
                    f"Domain {facts.name!r} would take {human(growth)} more, and this host has {human(free)} of {kind} available",
                    advice="Give less, or overcommit: true",
                )


def _check_restart(request: Request, facts: Facts) -> None:
    """Before a restart there must be a way to tell whether it went well."""
    if facts.live is None:
        # Only a shrink starts a domain that is off. What its agent allows is known when it answers.
        if not facts.configured.agent_configured:
            raise AgentSilent(
                f"Domain {facts.name!r} must be started, and nothing would tell whether it is well then:"
                " it has no guest agent channel",
                advice="Give it one, and qemu-guest-agent in the guest",
            )
        return
    if request.health_command is not None:
        if facts.agent is None or not facts.agent.can_execute:
            raise AgentSilent(
                f"health_command cannot be run in domain {facts.name!r}: "
                + (facts.agent_problem or "the guest agent does not allow guest-exec"),
                advice="Enable guest-exec in the guest's agent, or leave health_command out",
            )
        return
    if request.rollback and facts.agent is None:
        raise AgentSilent(
            f"Domain {facts.name!r} must be restarted, and nothing would tell whether it is well then: {facts.agent_problem}",
            advice="Install qemu-guest-agent in the guest, or use rollback: false",
        )
