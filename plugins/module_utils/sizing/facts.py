# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read once what the decisions need: what is configured, what is live, what the guest sees, what the host has."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from xml.etree import ElementTree

from .._errors import AgentSilent, VmkeeperError
from ..hypervisor import agent, chain
from ..hypervisor.agent import AgentInfo
from ..hypervisor.binding import libvirt
from ..hypervisor.block_jobs import running_job
from ..hypervisor.connection import explaining
from ..hypervisor.definition import persistent_xml
from ..hypervisor.domain_model import Disk, Domain, Layer, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety import host_graph, space
from . import guest_filesystem
from .guest_filesystem import Filesystem

_MOST_ENTRIES = 65536  # memory blocks of a guest of 8 TiB

#: How old the balloon driver's statistics may be.
_STATISTICS_SECONDS = 60.0


@dataclass(frozen=True)
class GuestCpus:
    """vCPUs by the guest's numbers; ``offline`` are those that it could bring online."""

    online: frozenset[int]
    offline: frozenset[int]
    can_offline: frozenset[int]


@dataclass(frozen=True)
class GuestMemory:
    """Memory as the guest counts it, in bytes; ``None`` where it does not tell."""

    total: int | None = None
    available: int | None = None
    block_size: int | None = None
    offline_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class DiskFacts:
    """One disk: virtual size in bytes, its chain, the checkpoints that track it."""

    disk: Disk
    size: int | None
    layers: tuple[Layer, ...]
    checkpoints: tuple[str, ...] = ()
    device_size: int | None = None  #: of the block device below, None for files
    internal_snapshots: int = 0
    problem: str | None = None
    readers: tuple[str, ...] = ()  #: who else has its content, where that was asked for


@dataclass(frozen=True)
class Host:
    """What the host has left. Memory in bytes; ``free_hugepages`` by page size."""

    cpus: int
    free_memory: int | None
    free_hugepages: Mapping[int, int] = field(default_factory=dict)
    default_hugepage: int = 0
    most_vcpus: int | None = None  #: that its QEMU gives to one domain of this machine type

    def page_of(self, domain: Domain) -> int | None:
        """Size of the hugepages that hold the domain's memory; None for ordinary memory."""
        return None if domain.hugepages is None else domain.hugepages or self.default_hugepage


@dataclass(frozen=True)
class Facts:
    """One domain as it is now. ``live`` is None when it does not run, ``agent`` when it does not answer."""

    configured: Domain
    live: Domain | None
    agent: AgentInfo | None = None
    agent_problem: str | None = None
    cpus: GuestCpus | None = None
    memory: GuestMemory = GuestMemory()
    balloon: int | None = None  #: bytes that the balloon leaves to the guest, virtio-mem not counted
    disks: Mapping[str, DiskFacts] = field(default_factory=dict)
    filesystems: tuple[Filesystem, ...] = ()
    filesystems_problem: str | None = None
    host: Host = Host(cpus=1, free_memory=0)
    job: str | None = None
    frozen: bool = False
    definition: str | None = None  #: of the next start, as libvirt keeps it; None of a transient domain

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.configured.name

    def can(self, *commands: str) -> bool:
        """Whether the agent answers and allows all of these commands."""
        return self.agent is not None and set(commands) <= self.agent.commands


def read_facts(handle: Any, targets: Sequence[str] = (), *, grow: Sequence[str] = (), readers: bool = False) -> Facts:
    """The facts of one domain; ``targets`` are the disks that matter, ``grow`` those whose filesystems do.

    ``readers``: whoever else names an image is looked for, too.
    """
    now = read_domain(handle)
    configured = read_domain(handle, inactive=True) if now.persistent else now
    live = now if now.state.active else None
    info, problem, frozen = _ask_agent(handle, now)
    filesystems: tuple[Filesystem, ...] = ()
    filesystems_problem = None
    if grow and live is not None:
        filesystems_problem = _filesystem_obstacle(now, info, problem)
        if filesystems_problem is None:
            try:
                filesystems = guest_filesystem.read_filesystems(handle, grow)
            except AgentSilent as error:
                filesystems_problem = error.problem
    graph = host_graph.read_graph(handle.connect()) if readers else None
    return Facts(
        configured=configured,
        live=live,
        agent=info,
        agent_problem=problem,
        cpus=guest_cpus(handle, info),
        memory=_with_balloon_statistics(handle, guest_memory(handle, info)) if live is not None else GuestMemory(),
        balloon=balloon(handle, now) if live is not None else None,
        disks={
            disk.target: _disk(handle, now, disk, now.checkpoints, graph)
            for disk in now.disks
            if disk.target in targets
        },
        filesystems=filesystems,
        filesystems_problem=filesystems_problem,
        host=read_host(handle.connect(), configured),
        job=running_job(handle),
        frozen=frozen,
        definition=persistent_xml(handle) if now.persistent else None,
    )


def _ask_agent(handle: Any, domain: Domain) -> tuple[AgentInfo | None, str | None, bool]:
    if not domain.state.running:
        return None, f"the domain is {domain.state.name}", False
    if not domain.agent_configured:
        return None, "the domain has no guest agent channel", False
    return agent.ask(handle)


def _filesystem_obstacle(domain: Domain, info: AgentInfo | None, problem: str | None) -> str | None:
    """Why nothing can be done to filesystems through the agent, or None."""
    if info is None:
        return problem or "the guest agent does not answer"
    if "guest-get-fsinfo" not in info.commands:
        return "the guest agent does not allow guest-get-fsinfo"
    if not info.can_execute:
        return "the guest agent does not allow guest-exec (the default on RHEL and its relatives)"
    return None


def guest_cpus(handle: Any, info: AgentInfo | None) -> GuestCpus | None:
    """What the guest says of its vCPUs; None when it does not say."""
    if info is None or "guest-get-vcpus" not in info.commands:
        return None
    try:
        reply = agent.command(handle, "guest-get-vcpus")
    except AgentSilent:
        return None
    online: set[int] = set()
    offline: set[int] = set()
    movable: set[int] = set()
    for vcpu in reply[:_MOST_ENTRIES] if isinstance(reply, list) else ():
        number = vcpu.get("logical-id") if isinstance(vcpu, dict) else None
        if not isinstance(number, int):
            continue
        (online if vcpu.get("online") is True else offline).add(number)
        if vcpu.get("can-offline") is True:
            movable.add(number)
    return GuestCpus(frozenset(online), frozenset(offline), frozenset(movable)) if online else None


_MEMINFO = re.compile(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", re.MULTILINE)


def guest_memory(handle: Any, info: AgentInfo | None) -> GuestMemory:
    """What the guest says of its memory, as far as the agent may ask."""
    if info is None:
        return GuestMemory()
    text = None
    try:
        if info.can_use_files:
            content = agent.read_file(handle, "/proc/meminfo", limit=8192)
            text = content.decode("ascii", errors="replace") if content else None
        if text is None and info.can_execute:
            text = agent.execute(handle, ["cat", "/proc/meminfo"], seconds=10).output
    except AgentSilent:
        text = None
    numbers = {key: int(value) * 1024 for key, value in _MEMINFO.findall(text or "")}
    block_size: int | None = None
    offline: tuple[int, ...] = ()
    if {"guest-get-memory-blocks", "guest-get-memory-block-info"} <= info.commands:
        try:
            size = agent.command(handle, "guest-get-memory-block-info")
            block_size = size.get("size") if isinstance(size, dict) and isinstance(size.get("size"), int) else None
            offline = offline_blocks(agent.command(handle, "guest-get-memory-blocks"))
        except AgentSilent:
            block_size = None
    return GuestMemory(numbers.get("MemTotal"), numbers.get("MemAvailable"), block_size, offline)


def _with_balloon_statistics(handle: Any, memory: GuestMemory) -> GuestMemory:
    """What the guest can spare, by the statistics of its balloon driver where the agent does not tell.

    The driver sends them as often as ``<memballoon><stats period>`` says.  Without it, it has sent them once, when it was loaded:
    those of a guest that still boots.
    """
    if memory.available is not None:
        return memory
    try:
        asked = ElementTree.fromstring(handle.XMLDesc(0)).find("devices/memballoon/stats")
        if asked is None:
            return memory
        told = handle.memoryStats()
    except libvirt.libvirtError:
        return memory
    spare = told.get("usable", told.get("unused"))
    if spare is None or time.time() - told.get("last_update", 0) > _STATISTICS_SECONDS:
        return memory
    return replace(memory, available=int(spare) * 1024)


def offline_blocks(reply: Any) -> tuple[int, ...]:
    """The numbers of the memory blocks that the guest could bring online, from guest-get-memory-blocks."""
    return tuple(
        sorted(
            block["phys-index"]
            for block in (reply[:_MOST_ENTRIES] if isinstance(reply, list) else ())
            if isinstance(block, dict) and block.get("online") is False and isinstance(block.get("phys-index"), int)
        )
    )


def balloon(handle: Any, domain: Domain) -> int:
    """Bytes that the balloon leaves to the guest, by its driver's own account where there is a balloon."""
    if domain.has_balloon:
        try:
            actual = handle.memoryStats().get("actual")
            if actual:
                return int(actual) * 1024
        except libvirt.libvirtError:
            pass
    return domain.memory_max - sum(device.size for device in domain.memory_devices if device.model == "virtio-mem")


def _disk(
    handle: Any, domain: Domain, disk: Disk, checkpoints: Sequence[str], graph: host_graph.HostGraph | None
) -> DiskFacts:
    size = None
    problem = None
    layers: tuple[Layer, ...] = disk.chain
    snapshots = 0
    try:
        layers = chain.chain_of(disk)
        if disk.active is not None and disk.active.format == "qcow2" and disk.path:
            snapshots = read_qcow2(disk.path).internal_snapshots
    except (VmkeeperError, BadHeader, OSError) as error:
        problem = error.problem if isinstance(error, VmkeeperError) else str(error)
    if disk.active is not None:
        if domain.state.active:
            try:
                size = int(handle.blockInfo(disk.target)[0])
            except libvirt.libvirtError:
                size = None
        else:
            size = chain.virtual_size(disk.active)
    device_size = None
    if disk.path and chain.is_device(disk.path):
        device_size = chain.virtual_size(Layer(disk.path, "raw", "block"))
    return DiskFacts(
        disk,
        size,
        layers,
        tuple(name for name in checkpoints if _tracks(handle, name, disk.target)),
        device_size,
        snapshots,
        problem,
        _readers(graph, disk.path, domain.uuid) if graph is not None and disk.path else (),
    )


def _readers(graph: host_graph.HostGraph, path: str, uuid: str) -> tuple[str, ...]:
    """Whoever but the domain itself would see another content in its image."""
    return tuple(str(one) for one in graph.readers(path) if not (one.kind == "domain" and one.uuid == uuid))


def _tracks(handle: Any, checkpoint: str, target: str) -> bool:
    with explaining(f"Reading checkpoint {checkpoint!r} of domain {handle.name()!r}"):
        root = ElementTree.fromstring(handle.checkpointLookupByName(checkpoint).getXMLDesc(0))
    return any(
        disk.get("name") == target and disk.get("checkpoint", "bitmap") == "bitmap"
        for disk in root.iterfind("disks/disk")
    )


def read_host(connection: Any, domain: Domain) -> Host:
    """What this host has left, and how much one domain like this may have; the module runs on it."""
    with explaining("Reading what the host has"):
        cpus = int(connection.getInfo()[2])
    return Host(cpus, space.free_memory(), *_hugepages(), _most_vcpus(connection, domain))


def _most_vcpus(connection: Any, domain: Domain) -> int | None:
    try:
        xml = connection.getDomainCapabilities(None, domain.arch, domain.machine, domain.domain_type, 0)
        return int(ElementTree.fromstring(xml).find("vcpu").get("max"))  # type: ignore[union-attr,arg-type]
    except (libvirt.libvirtError, AttributeError, TypeError, ValueError):
        return None


def _hugepages(root: str = "/sys/kernel/mm/hugepages") -> tuple[dict[int, int], int]:
    free: dict[int, int] = {}
    try:
        for name in os.listdir(root):
            match = re.fullmatch(r"hugepages-(\d+)kB", name)
            if match:
                with open(os.path.join(root, name, "free_hugepages"), encoding="ascii") as stream:
                    free[int(match.group(1)) * 1024] = int(stream.read())
        with open("/proc/meminfo", encoding="ascii") as stream:
            default = re.search(r"^Hugepagesize:\s+(\d+) kB$", stream.read(), re.MULTILINE)
    except (OSError, ValueError):
        return free, 0
    return free, int(default.group(1)) * 1024 if default else 0
