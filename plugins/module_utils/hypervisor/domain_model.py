# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A domain as data: frozen dataclasses parsed from libvirt's XML once.

Nothing here calls libvirt except :func:`read_domain`, so every decision above can be tested on XML alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from xml.etree import ElementTree

from .binding import libvirt
from .block_device import storage_of
from .connection import explaining

#: The name of the channel that the guest agent listens on.
AGENT_CHANNEL = "org.qemu.guest_agent.0"

#: Models of ``<memory>`` that keep what the guest writes to them in a file of the host.
PERSISTENT_MEMORY = ("nvdimm", "virtio-pmem")

#: virDomainState; the numbers are libvirt's ABI.
STATE_NAMES = {
    0: "nostate",
    1: "running",
    2: "blocked",
    3: "paused",
    4: "shutdown",
    5: "shutoff",
    6: "crashed",
    7: "pmsuspended",
}
RUNNING_STATES = ("running", "blocked")
RUNNING_REASONS = {
    0: "unknown",
    1: "booted",
    2: "migrated",
    3: "restored",
    4: "from-snapshot",
    5: "unpaused",
    6: "migration-canceled",
    7: "save-canceled",
    8: "wakeup",
    9: "crashed",
    10: "post-copy",
    11: "post-copy-failed",
}
PAUSED_REASONS = {
    0: "unknown",
    1: "user",
    2: "migration",
    3: "save",
    4: "dump",
    5: "io-error",
    6: "watchdog",
    7: "from-snapshot",
    8: "shutting-down",
    9: "snapshot",
    10: "crashed",
    11: "starting-up",
    12: "post-copy",
    13: "post-copy-failed",
    14: "api-error",
}
SHUTOFF_REASONS = {
    0: "unknown",
    1: "shutdown",
    2: "destroyed",
    3: "crashed",
    4: "migrated",
    5: "saved",
    6: "failed",
    7: "from-snapshot",
    8: "daemon",
}


@dataclass(frozen=True)
class DomainState:
    """What a domain is doing, by libvirt's names (``running``, ``paused``, ``shutoff``, ...)."""

    name: str
    reason: str = "unknown"

    @property
    def running(self) -> bool:
        """Its vCPUs run."""
        return self.name in RUNNING_STATES

    @property
    def active(self) -> bool:
        """A QEMU process exists. libvirt says ``crashed`` of one that ``on_crash`` preserves; else ``shutoff``."""
        return self.name not in ("shutoff", "nostate")


@dataclass(frozen=True)
class Layer:
    """One image of a chain. ``path`` is local; ``None`` where the layer is not a local file or device."""

    path: str | None
    format: str | None
    kind: str = "file"


@dataclass(frozen=True)
class BlockJob:
    """A running copy or active commit, as the ``<mirror>`` of the disk shows it."""

    job: str
    ready: bool
    destination: str | None


@dataclass(frozen=True)
class Encryption:
    """How an image is encrypted: ``format`` such as ``luks``; its libvirt secret by ``uuid`` or by ``usage``."""

    format: str
    uuid: str | None
    usage: str | None


@dataclass(frozen=True)
class Disk:
    """One ``<disk>``. ``chain`` runs from the active layer down to the base; empty for an empty drive."""

    target: str
    device: str
    kind: str
    bus: str | None
    chain: tuple[Layer, ...]
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    snapshot: str | None = None
    serial: str | None = None
    encrypted: bool = False
    encryption: Encryption | None = None
    job: BlockJob | None = None
    pool: str | None = None
    volume: str | None = None
    #: The definition does not say that ``chain`` ends where it does: libvirt reads on in the images.
    open_ended: bool = False
    #: The definition says that ``chain`` is one layer and stands on nothing, whatever the image's header says.
    alone: bool = False
    sliced: bool = False  #: a layer is a part of its file or device: <slices>
    storage: str | None = None  #: ``thin-lvm`` or ``zfs``: a layer is a device of a kind that is not handled

    @property
    def active(self) -> Layer | None:
        """The layer that the guest writes to."""
        return self.chain[0] if self.chain else None

    @property
    def path(self) -> str | None:
        """Local path of the active layer."""
        return self.chain[0].path if self.chain else None

    @property
    def format(self) -> str | None:
        """Format of the active layer."""
        return self.chain[0].format if self.chain else None


@dataclass(frozen=True)
class Nvram:
    """UEFI variable store; ``format`` is ``raw`` unless the definition says otherwise."""

    path: str
    format: str = "raw"


@dataclass(frozen=True)
class HostShare:
    """A ``<filesystem>`` passed through from the host."""

    source: str
    target: str


@dataclass(frozen=True)
class MemoryDevice:
    """A ``<memory>`` device. Sizes in bytes; ``requested`` and ``current`` are those of virtio-mem, else its size."""

    model: str
    size: int
    node: int
    requested: int
    current: int
    block: int = 0
    alias: str | None = None


@dataclass(frozen=True)
class NumaCell:
    """One guest NUMA cell: the vCPUs in it and its memory in bytes."""

    id: int
    cpus: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class CpuTopology:
    """``<cpu><topology>``: the product is the maximum number of vCPUs."""

    sockets: int
    dies: int
    cores: int
    threads: int


@dataclass(frozen=True)
class Vcpu:
    """One ``<vcpus><vcpu>``; libvirt lists them only where one is hot-pluggable."""

    id: int
    enabled: bool
    hotpluggable: bool


@dataclass(frozen=True)
class Domain:
    """A domain's definition and condition, read at one moment. Memory is in bytes."""

    name: str
    uuid: str
    state: DomainState
    persistent: bool
    disks: tuple[Disk, ...]
    memory_max: int = 0
    memory_current: int = 0
    vcpus_max: int = 1
    vcpus_current: int = 1
    machine: str | None = None
    arch: str | None = None
    domain_type: str = "kvm"
    nvram: Nvram | None = None
    nvram_elsewhere: str | None = None  #: a device or network image that holds the UEFI variables
    firmware: str = "bios"
    has_tpm: bool = False
    shares: tuple[HostShare, ...] = ()
    hostdevs: tuple[str, ...] = ()
    persistent_memory: tuple[str, ...] = ()  #: paths of what NVDIMM and virtio-pmem devices keep on the host
    agent_configured: bool = False
    agent_connected: bool = False
    managed_save: bool = False
    autostart: bool = False
    runtime_id: int | None = None
    checkpoints: tuple[str, ...] = ()
    memory_limit: int | None = None  #: <maxMemory> in bytes: how far memory can be plugged
    memory_slots: int = 0
    hard_limit: int | None = None  #: <memtune>: bytes at which the kernel ends its QEMU
    memory_devices: tuple[MemoryDevice, ...] = ()
    numa_cells: tuple[NumaCell, ...] = ()
    topology: CpuTopology | None = None
    vcpus: tuple[Vcpu, ...] = ()
    has_balloon: bool = True
    hugepages: int | None = None  #: page size in bytes, 0 for the host's default; None: ordinary memory
    extras: dict[str, Any] = field(default_factory=dict, compare=False)

    def disk(self, target: str) -> Disk | None:
        """The disk with that target, if there is one."""
        return next((disk for disk in self.disks if disk.target == target), None)


def _layer(element: ElementTree.Element) -> Layer | None:
    source = element.find("source")
    kind = element.get("type", "file")
    if source is None:
        return None
    driver = element.find("driver") if element.tag == "disk" else None
    format_element = element.find("format")
    image_format = driver.get("type") if driver is not None else None
    if format_element is not None:
        image_format = format_element.get("type")
    path = source.get("file") or source.get("dev")
    return Layer(path=path if kind in ("file", "block") else None, format=image_format, kind=kind)


def _chain(element: ElementTree.Element) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    current: ElementTree.Element | None = element
    while current is not None:
        layer = _layer(current)
        if layer is None:
            break
        layers.append(layer)
        current = current.find("backingStore")
        if current is not None and current.find("source") is None:
            break
    return tuple(layers)


def _is_open_ended(element: ElementTree.Element) -> bool:
    current = element
    while (below := current.find("backingStore")) is not None and below.find("source") is not None:
        current = below
    return below is None


def _stands_alone(element: ElementTree.Element) -> bool:
    below = element.find("backingStore")
    return below is not None and below.find("source") is None


def _job(element: ElementTree.Element) -> BlockJob | None:
    mirror = element.find("mirror")
    if mirror is None:
        return None
    source = mirror.find("source")
    destination = None
    if source is not None:
        destination = source.get("file") or source.get("dev")
    return BlockJob(
        job=mirror.get("job", "copy"),
        ready=mirror.get("ready") == "yes",
        destination=destination or mirror.get("file"),
    )


def _encryption(element: ElementTree.Element) -> Encryption | None:
    found = element.find("source/encryption")
    if found is None:
        found = element.find("encryption")
    if found is None:
        return None
    secret = found.find("secret")
    uuid, usage = (None, None) if secret is None else (secret.get("uuid"), secret.get("usage"))
    return Encryption(found.get("format", ""), uuid, usage)


def parse_disk(element: ElementTree.Element) -> Disk:
    """One ``<disk>`` element (https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms)."""
    target = element.find("target")
    source = element.find("source")
    kind = element.get("type", "file")
    return Disk(
        target=target.get("dev", "") if target is not None else "",
        device=element.get("device", "disk"),
        kind=kind,
        bus=target.get("bus") if target is not None else None,
        chain=_chain(element),
        open_ended=_is_open_ended(element),
        alone=_stands_alone(element),
        sliced=element.find(".//slices") is not None,
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        snapshot=element.get("snapshot"),
        serial=element.findtext("serial"),
        encrypted=element.find("encryption") is not None
        or (source is not None and source.find("encryption") is not None),
        encryption=_encryption(element),
        job=_job(element),
        pool=source.get("pool") if source is not None else None,
        volume=source.get("volume") if source is not None else None,
    )


_MEMORY_UNITS = {
    "b": 1,
    "bytes": 1,
    "kb": 1000,
    "k": 1024,
    "kib": 1024,
    "mb": 1000**2,
    "m": 1024**2,
    "mib": 1024**2,
    "gb": 1000**3,
    "g": 1024**3,
    "gib": 1024**3,
    "tb": 1000**4,
    "t": 1024**4,
    "tib": 1024**4,
}


def read_bytes(root: ElementTree.Element, tag: str) -> int:
    """The bytes that the text of a child says in its ``unit``, KiB by default; 0 where there is none."""
    element = root.find(tag)
    if element is None or not (element.text or "").strip():
        return 0
    return int((element.text or "0").strip()) * _MEMORY_UNITS.get(element.get("unit", "KiB").lower(), 1024)


def _hostdev_name(element: ElementTree.Element) -> str:
    address = element.find("source/address")
    detail = "".join(f" {value}" for _key, value in sorted(address.attrib.items())) if address is not None else ""
    return f"{element.get('type', element.get('mode', 'device'))}{detail}"


def parse_domain(xml: str, state: DomainState, *, persistent: bool = True, **condition: Any) -> Domain:
    """A domain from ``virDomainGetXMLDesc``; ``condition`` holds what the XML does not say (managed save, ...)."""
    root = ElementTree.fromstring(xml)
    os_element = root.find("os")
    os_type = os_element.find("type") if os_element is not None else None
    nvram_element = root.find("os/nvram")
    loader = root.find("os/loader")
    nvram, nvram_elsewhere = None, None
    if nvram_element is not None:
        source = nvram_element.find("source")
        path = (source.get("file") if source is not None else None) or (nvram_element.text or "").strip()
        if path:
            nvram = Nvram(path=path, format=nvram_element.get("format", "raw"))
        elif source is not None:
            nvram_elsewhere = source.get("dev") or source.get("name") or nvram_element.get("type")
    uefi = nvram_element is not None or (os_element is not None and os_element.get("firmware") == "efi")
    uefi = uefi or (loader is not None and loader.get("type") == "pflash")
    vcpu = root.find("vcpu")
    vcpus_max = int((vcpu.text or "1").strip()) if vcpu is not None else 1
    channel = next(
        (
            element
            for element in root.iterfind("devices/channel/target")
            if element.get("type") == "virtio" and element.get("name") == AGENT_CHANNEL
        ),
        None,
    )
    runtime_id = root.get("id")
    return Domain(
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", ""),
        state=state,
        persistent=persistent,
        disks=tuple(parse_disk(element) for element in root.iterfind("devices/disk")),
        memory_max=read_bytes(root, "memory"),
        memory_current=read_bytes(root, "currentMemory") or read_bytes(root, "memory"),
        vcpus_max=vcpus_max,
        vcpus_current=int(vcpu.get("current", vcpus_max)) if vcpu is not None else 1,
        machine=os_type.get("machine") if os_type is not None else None,
        arch=os_type.get("arch") if os_type is not None else None,
        domain_type=root.get("type", "kvm"),
        nvram=nvram,
        nvram_elsewhere=nvram_elsewhere,
        firmware="uefi" if uefi else "bios",
        has_tpm=root.find("devices/tpm") is not None,  # emulated, the host's, or another process's: it has a state
        shares=tuple(_share(element) for element in root.iterfind("devices/filesystem")),
        hostdevs=tuple(_hostdev_name(element) for element in root.iterfind("devices/hostdev")),
        persistent_memory=tuple(
            element.findtext("source/path", element.get("model", ""))
            for element in root.iterfind("devices/memory")
            if element.get("model") in PERSISTENT_MEMORY
        ),
        agent_configured=channel is not None,
        agent_connected=channel is not None and channel.get("state") == "connected",
        runtime_id=int(runtime_id) if runtime_id and runtime_id.isdigit() else None,
        **_sizing(root),
        **condition,
    )


def cpu_list(text: str) -> tuple[int, ...]:
    """libvirt's and the kernel's list of CPUs (``0-3,^2,6``) as numbers, ascending."""
    found: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if part.startswith("^"):
            found.discard(int(part[1:]))
            continue
        first, _dash, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def _sizing(root: ElementTree.Element) -> dict[str, Any]:
    """What says how the domain can grow."""
    limit = root.find("maxMemory")
    topology = root.find("cpu/topology")
    page = root.find("memoryBacking/hugepages/page")
    hugepages = None
    if root.find("memoryBacking/hugepages") is not None:
        unit = _MEMORY_UNITS.get(page.get("unit", "KiB").lower(), 1024) if page is not None else 0
        hugepages = int(page.get("size", "0")) * unit if page is not None else 0
    balloon = root.find("devices/memballoon")
    return {
        "memory_limit": read_bytes(root, "maxMemory") or None,
        "hard_limit": read_bytes(root, "memtune/hard_limit") or None,
        "memory_slots": int(limit.get("slots", "0")) if limit is not None else 0,
        "memory_devices": tuple(_memory_device(element) for element in root.iterfind("devices/memory")),
        "numa_cells": tuple(
            NumaCell(int(cell.get("id", "0")), cpu_list(cell.get("cpus", "")), cell_bytes(cell))
            for cell in root.iterfind("cpu/numa/cell")
        ),
        "topology": CpuTopology(*(int(topology.get(name, "1")) for name in ("sockets", "dies", "cores", "threads")))
        if topology is not None
        else None,
        "vcpus": tuple(
            Vcpu(int(one.get("id", "0")), one.get("enabled") == "yes", one.get("hotpluggable") == "yes")
            for one in root.iterfind("vcpus/vcpu")
        ),
        "has_balloon": balloon is not None and balloon.get("model") != "none",
        "hugepages": hugepages,
    }


def cell_bytes(cell: ElementTree.Element) -> int:
    """The memory of a NUMA cell's definition in bytes."""
    return int(cell.get("memory", "0")) * _MEMORY_UNITS.get(cell.get("unit", "KiB").lower(), 1024)


def _memory_device(element: ElementTree.Element) -> MemoryDevice:
    target = element.find("target")
    alias = element.find("alias")
    model = element.get("model", "dimm")
    if target is None:
        return MemoryDevice(model, 0, 0, 0, 0)
    size = read_bytes(target, "size")
    virtio = model == "virtio-mem"
    requested = read_bytes(target, "requested") if virtio else size
    return MemoryDevice(
        model=model,
        size=size,
        node=int(target.findtext("node", "0")),
        requested=requested,
        current=(read_bytes(target, "current") if target.find("current") is not None else requested)
        if virtio
        else size,
        block=read_bytes(target, "block"),
        alias=alias.get("name") if alias is not None else None,
    )


def _share(element: ElementTree.Element) -> HostShare:
    source = element.find("source")
    target = element.find("target")
    value = ""
    if source is not None:
        value = source.get("dir") or source.get("socket") or source.get("name") or source.get("file") or ""
    return HostShare(source=value, target=target.get("dir", "") if target is not None else "")


def resolve_volume(disk: Disk, path_of: Callable[[str, str], str | None]) -> Disk:
    """Fill in the local path of a ``type='volume'`` active layer, which the XML names by pool and volume only."""
    if disk.kind != "volume" or not disk.chain or disk.chain[0].path or not (disk.pool and disk.volume):
        return disk
    path = path_of(disk.pool, disk.volume)
    return replace(disk, chain=(replace(disk.chain[0], path=path), *disk.chain[1:]))


def resolve_volumes(domain: Domain, path_of: Callable[[str, str], str | None]) -> Domain:
    """The domain with :func:`resolve_volume` done to each of its disks."""
    return replace(domain, disks=tuple(resolve_volume(disk, path_of) for disk in domain.disks))


def with_storage(domain: Domain, storage_of: Callable[[str], str | None]) -> Domain:
    """Fill in what the disks' devices are made of; ``storage_of`` answers by path."""

    def told(disk: Disk) -> Disk:
        found = (storage_of(layer.path) for layer in disk.chain if layer.path)
        return replace(disk, storage=next((storage for storage in found if storage), None))

    return replace(domain, disks=tuple(told(disk) for disk in domain.disks))


def read_state(domain: Any) -> DomainState:
    """The domain's present state and libvirt's reason for it."""
    with explaining(f"Reading the state of domain {domain.name()!r}"):
        code, reason = domain.state()
    name = STATE_NAMES.get(code, "nostate")
    reasons = {"running": RUNNING_REASONS, "paused": PAUSED_REASONS, "shutoff": SHUTOFF_REASONS}.get(name, {})
    return DomainState(name, reasons.get(reason, "unknown"))


#: Pools whose volumes lie under the target path by their names (libvirt's storage backends).
_POOLS_OF_PATHS = ("dir", "fs", "netfs", "logical", "zfs")


def volume_path(connection: Any, pool: str, volume: str) -> str | None:
    """Where a volume lies on this host; None when there is no such pool or volume.

    libvirt looks into active pools only, and knows what was there when it last looked; a domain's disk is its disk even so.
    Then the pool's definition tells.  None also for a volume that is no file or device here: libvirt calls one of RBD
    ``pool/image``, one of Gluster ``gluster://...``.
    """
    try:
        handle = connection.storagePoolLookupByName(pool)
        try:
            path = str(handle.storageVolLookupByName(volume).path())
        except libvirt.libvirtError:
            path = _path_in_pool(ElementTree.fromstring(handle.XMLDesc(0)), volume)
    except libvirt.libvirtError:
        return None
    return path if os.path.isabs(path) else None


def _path_in_pool(pool: ElementTree.Element, volume: str) -> str:
    directory = pool.findtext("target/path", "") if pool.get("type") in _POOLS_OF_PATHS else ""
    path = os.path.join(directory, volume)
    return path if directory and "/" not in volume and os.path.lexists(path) else ""


def read_domain(domain: Any, *, inactive: bool = False) -> Domain:
    """Read one libvirt domain; ``inactive`` reads the definition of its next start instead of the live one."""
    state = read_state(domain)
    with explaining(f"Reading domain {domain.name()!r}"):
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)
        persistent = bool(domain.isPersistent())
        condition = {
            "managed_save": bool(domain.hasManagedSaveImage()) if persistent else False,
            "autostart": bool(domain.autostart()) if persistent else False,
            "checkpoints": tuple(sorted(checkpoint.getName() for checkpoint in domain.listAllCheckpoints())),
        }
    model = parse_domain(xml, state, persistent=persistent, **condition)
    if inactive or not state.active:
        # Only a live definition states its chain; an inactive one names the top layer alone.
        model = replace(model, runtime_id=None)
    return with_storage(resolve_volumes(model, partial(volume_path, domain.connect())), storage_of)


_OWNER = re.compile(r"\+?(\d+):\+?(\d+)")


def qemu_owner(capabilities_xml: str) -> tuple[int, int]:
    """uid and gid that QEMU runs as, from the DAC baselabel of ``virConnectGetCapabilities``.

    Never a guessed user name: distributions call it ``libvirt-qemu``, ``qemu`` or ``kvm``.  Without a DAC label
    (session mode, drivers without security) QEMU runs as the caller.
    """
    root = ElementTree.fromstring(capabilities_xml)
    for model in root.iterfind("host/secmodel"):
        if model.findtext("model") != "dac":
            continue
        for label in model.iterfind("baselabel"):
            match = _OWNER.fullmatch((label.text or "").strip())
            if match:
                return int(match.group(1)), int(match.group(2))
    return os.geteuid(), os.getegid()
