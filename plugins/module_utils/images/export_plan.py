# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an export needs to know, read once, and what it will do, decided from that alone."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from .._errors import Busy, InvalidInput, NotFound, Refused, Unsupported
from ..hypervisor import agent, chain
from ..hypervisor.binding import libvirt
from ..hypervisor.block_jobs import running_job
from ..hypervisor.capture import Capture, choose, require_local_chains
from ..hypervisor.connection import constant, explaining
from ..hypervisor.domain_model import Disk, Domain, DomainState, Layer, parse_domain, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..hypervisor.image_node import Passphrase
from ..safety import consistency, standing_freeze
from ..safety.space import allocated, room_for
from . import manifest as manifests
from .manifest import Machine

#: Where a running guest's disks are copied to when the destination is not for QEMU to write.
SCRATCH = "/var/lib/libvirt/images"

#: Our labels in a snapshot's XML, which carry its true level.
_SNAPSHOT_LABELS = "domain/metadata/{urn:vmkeeper:libvirt:snapshot:1}snapshot"


@dataclass(frozen=True)
class Request:
    """The task's options, checked. ``deadline`` in seconds, ``bandwidth`` in bytes per second (0: no limit)."""

    dest: str
    name: str
    snapshot: str | None = None
    disks: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    format: str = "qcow2"
    compression: str = "none"
    quiesce: str = "auto"
    scratch: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    deadline: float = 60.0
    seal: tuple[str, ...] = ()
    passphrase: Passphrase | None = None
    bandwidth: int = 0

    @property
    def path(self) -> str:
        """Where the bundle will be."""
        return os.path.join(self.dest, self.name)


@dataclass(frozen=True)
class Facts:
    """What is exported, as it is now. ``sizes`` (virtual) and ``allocated`` in bytes by target, the latter as far as it is known.

    ``domain`` is the machine of the exported instant: with a snapshot, as it was then. ``live``: the guest's disks are
    being written, and the copy is QEMU's to make.  ``inside``: the snapshot lies inside the images, which a running guest may be
    writing to (``shared``).  ``frozen``: filesystems are frozen already; ``frozen_whole``: by the fsfreeze
    module, and all of them.
    """

    domain: Domain
    live: bool
    sizes: Mapping[str, int]
    allocated: Mapping[str, int]
    interfaces: int = 0
    direct_kernel: bool = False
    nvram: str | None = None
    snapshot: str | None = None
    inside: bool = False
    shared: bool = False
    level: str | None = None
    agent: agent.AgentInfo | None = None
    agent_problem: str | None = None
    frozen: bool = False
    frozen_whole: bool = False
    job: str | None = None


def read_facts(handle: Any, request: Request) -> Facts:
    """The facts of one domain, or of one of its snapshots."""
    current = read_domain(handle)
    if request.snapshot is not None:
        return _snapshot_facts(handle, current, request.snapshot)
    with explaining(f"Reading domain {current.name!r}"):
        root = ElementTree.fromstring(handle.XMLDesc(0))
    info, problem, frozen = None, None, False
    if current.state.running and current.agent_configured:
        info, problem, frozen = agent.ask(handle)
    live = current.state.active
    return Facts(
        domain=current,
        live=live,
        sizes={
            disk.target: size
            for disk in current.disks
            if disk.active and (size := _live_size(handle, disk) if live else chain.virtual_size(disk.active))
        },
        allocated=_allocated(disk for disk in current.disks if disk.active),
        interfaces=len(root.findall("devices/interface")),
        direct_kernel=root.find("os/kernel") is not None,
        nvram=_nvram_path(current),
        agent=info,
        agent_problem=problem,
        frozen=frozen,
        frozen_whole=frozen and standing_freeze.is_whole(current.uuid),
        job=running_job(handle),
    )


def _live_size(handle: Any, disk: Disk) -> int | None:
    if disk.device in ("cdrom", "floppy"):
        return None
    try:
        return int(handle.blockInfo(disk.target)[0])
    except libvirt.libvirtError:
        return None


def _nvram_path(domain: Domain) -> str | None:
    """The file with the UEFI variables, where it can be copied as it is. A domain that never ran has none yet."""
    if domain.nvram is None or domain.nvram.format != "raw":
        return None
    try:
        status = os.lstat(domain.nvram.path)
    except OSError:
        return None
    fits = stat.S_ISREG(status.st_mode) and 0 < status.st_size <= manifests.LARGEST_NVRAM
    return domain.nvram.path if fits else None


def _allocated(disks: Iterable[Disk]) -> dict[str, int]:
    """Bytes that each disk's chain takes on the host, near the most that its content can be; without those where it is not known."""
    found = {}
    for disk in disks:
        with contextlib.suppress(OSError, BadHeader):
            files = [file for layer in chain.chain_of(disk) for file in _files_of(layer)]
            if None not in files:
                found[disk.target] = sum(allocated(file) for file in files if file is not None)
    return found


def _files_of(layer: Layer) -> list[str | None]:
    """The files and devices that hold a layer's data; None for what is not here, or not known to be."""
    header = read_qcow2(layer.path) if layer.path is not None and layer.format == "qcow2" else None
    return [layer.path, chain.data_file(header)] if header is not None and header.has_data_file else [layer.path]


def _snapshot_facts(handle: Any, current: Domain, name: str) -> Facts:
    """The machine and the disks as they were at a snapshot: the layers below its overlays, or what its images hold of it inside."""
    try:
        snapshot = handle.snapshotLookupByName(name)
    except libvirt.libvirtError as error:
        existing = sorted(one.getName() for one in handle.listAllSnapshots())
        raise NotFound(
            f"Domain {current.name!r} has no snapshot {name!r}",
            advice="Its snapshots are: " + (", ".join(existing) if existing else "none"),
            existing=existing,
        ) from error
    with explaining(f"Reading snapshot {name!r} of domain {current.name!r}"):
        root = ElementTree.fromstring(snapshot.getXMLDesc(constant("VIR_DOMAIN_SNAPSHOT_XML_SECURE") or 0))
    inner = root.find("domain")
    held = {disk.get("name"): disk.get("snapshot", "no") for disk in root.iterfind("disks/disk")}
    if inner is None:
        raise Unsupported(
            f"libvirt does not know the machine of snapshot {name!r} of domain {current.name!r}",
            advice="Take another snapshot, or export the domain itself",
        )
    inside = "internal" in held.values()
    then = parse_domain(ElementTree.tostring(inner, encoding="unicode"), DomainState("shutoff", "from-snapshot"))
    written = {os.path.realpath(disk.path) for disk in current.disks if disk.path}
    disks = []
    for disk in then.disks:
        if held.get(disk.target) != ("internal" if inside else "external") or disk.active is None:
            continue
        if not inside and disk.path and os.path.realpath(disk.path) in written:
            raise Refused(
                f"The layer {disk.path} of snapshot {name!r} is written by domain {current.name!r} again",
                advice="Its content is no longer the snapshot's; export the domain itself",
            )
        disks.append(disk)
    if not disks:
        raise NotFound(f"Snapshot {name!r} of domain {current.name!r} holds no disk")
    then = Domain(**{**then.__dict__, "disks": tuple(disks), "name": current.name, "uuid": current.uuid})
    return Facts(
        domain=then,
        live=False,
        sizes={disk.target: size for disk in disks if disk.active and (size := chain.virtual_size(disk.active))},
        allocated=_allocated(disks),
        interfaces=len(inner.findall("devices/interface")),
        direct_kernel=inner.find("os/kernel") is not None,
        snapshot=name,
        inside=inside,
        shared=current.state.active,
        level=_snapshot_level(root),
    )


def _snapshot_level(root: ElementTree.Element) -> str:
    """The level that the snapshot was labelled with; an image holds no memory, so ``memory`` is not one of them."""
    label = root.findtext(_SNAPSHOT_LABELS)
    level = None
    if label:
        try:
            level = json.loads(label).get("consistency")
        except (ValueError, AttributeError):
            level = None
    if level is None:
        level = "offline" if root.findtext("state") == "shutoff" else "crash"
    return level if level in ("application", "filesystem", "offline") else "crash"


@dataclass(frozen=True)
class DiskPlan:
    """One disk to write. ``source`` is the layer to read when the guest is not running; sizes in bytes."""

    target: str
    bus: str
    source: Layer
    size: int
    estimate: int
    file: str
    serial: str | None


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export will do. ``copy_directory`` is where a running guest's disks are copied to first, and where
    copies are sealed; None when that is the bundle itself.  ``inside`` is the snapshot to copy out of the images first, which
    are ``shared`` with a running guest."""

    domain: Domain
    machine: Machine
    disks: tuple[DiskPlan, ...]
    capture: Capture
    live: bool
    freeze: bool
    standing: bool
    why_not_frozen: str | None
    expected_level: str
    converts: bool
    copy_directory: str | None
    seals: bool
    nvram: str | None
    not_captured: tuple[Mapping[str, str], ...]
    inside: str | None = None
    shared: bool = False

    @property
    def copied(self) -> bool:
        """Whether the image is made of copies of the disks, not of the disks."""
        return self.live or self.inside is not None

    def needs(self, dest: str, kept_free: int = 0) -> list[tuple[str, int]]:
        """``(directory, bytes)`` that must be free, with ``kept_free`` where QEMU copies a running guest's disks to."""
        total = sum(disk.estimate for disk in self.disks) + (64 << 20)
        copies = self.copy_directory or dest
        needs = [(dest, total)]
        if self.copied and (self.copy_directory is not None or self.converts):
            needs.append((copies, total))
        if self.seals:
            needs.append((copies, total))
        if self.live:
            needs.append((copies, kept_free))
        return needs


def check_request(request: Request) -> None:
    """Raise :class:`InvalidInput` for formats and compressions that do not go together."""
    possible = {"qcow2": ("none", "zlib", "zstd"), "vmdk": ("none", "zlib")}.get(request.format, ("none",))
    if request.compression not in possible:
        raise InvalidInput(
            f"compression: {request.compression} does not exist for format: {request.format}",
            advice="Use " + " or ".join(f"compression: {one}" for one in possible) + ", or format: qcow2",
        )
    _check_encryption(request)


def _check_encryption(request: Request) -> None:
    if request.passphrase is not None and (request.format != "qcow2" or request.compression != "none"):
        raise InvalidInput(
            "encryption goes with format: qcow2 and compression: none only",
            advice="Leave format and compression out: other formats know no LUKS, and what is encrypted cannot be compressed",
        )


def family_of(machine: str | None) -> str:
    """QEMU's machine family: ``pc-q35-7.2`` is ``q35``; its version is the launching host's business."""
    name = machine or ""
    for prefix, family in (
        ("q35", "q35"),
        ("pc-q35", "q35"),
        ("pc", "pc"),
        ("virt", "virt"),
        ("s390-ccw-virtio", "s390-ccw-virtio"),
        ("pseries", "pseries"),
    ):
        if name.startswith(prefix):
            return family
    raise Unsupported(
        f"The machine type {name!r} cannot be given to a guest elsewhere",
        advice="Images are made of machines of these types: " + ", ".join(manifests.FAMILIES),
    )


def plan_export(request: Request, facts: Facts, *, direct: bool, scratch: str) -> ExportPlan:
    """Decide what an export does. ``direct``: copies may lie in the destination; else they are made in ``scratch``."""
    domain = facts.domain
    check_request(request)
    if facts.live and facts.job:
        raise Busy(f"Domain {domain.name!r} is busy: {facts.job}", advice="Wait for it, then run this again")
    for disk in domain.disks:
        if disk.job is not None:
            raise Busy(
                f"Disk {disk.target!r} of domain {domain.name!r} has a running block job ({disk.job.job})",
                advice="Wait for it (domain_job shows it), then run this again",
            )
    capture = choose(domain, disks=request.disks, exclude=request.exclude, carries_nvram=facts.nvram is not None)
    if not capture.disks:
        raise Refused(
            f"Domain {domain.name!r} has no disk that an image can hold",
            advice="See not_captured for the reasons",
            not_captured=[part.as_result() for part in capture.left_out],
        )
    if not facts.live:
        require_local_chains(domain, capture.disks)
    disks = tuple(_disk_plan(request, facts, disk) for disk in capture.disks)
    obstacle = consistency.agent_obstacle(domain, facts.agent, facts.agent_problem)
    if request.quiesce == "required":
        _require_consistent(facts)
    freeze = consistency.FreezeDecision(False)
    if facts.live and facts.frozen:
        freeze = consistency.respect_freeze(request.quiesce, domain, whole=facts.frozen_whole)
    elif facts.live:
        freeze = consistency.decide_freeze(request.quiesce, domain, obstacle, with_memory=False)
    level = facts.level or consistency.level(
        domain.state, frozen_over_cut=facts.frozen_whole or freeze.freeze, managed_save=domain.managed_save
    )
    plain = request.format == "qcow2" and request.compression == "none"
    converts = not facts.live or not plain or not direct or bool(request.seal) or request.passphrase is not None
    not_captured = [part.as_result() for part in capture.left_out]
    if facts.direct_kernel:
        not_captured.append(
            {
                "kind": "kernel",
                "name": "direct kernel boot",
                "reason": "host-file",
                "why": "the kernel lies on the host; a launched image boots from its disk",
            }
        )
    return ExportPlan(
        domain=domain,
        machine=Machine(
            arch=domain.arch or "x86_64",
            family=family_of(domain.machine),
            firmware=domain.firmware,
            vcpus=max(1, domain.vcpus_current),
            memory=domain.memory_current,
            interfaces=min(facts.interfaces, 32),
        ),
        disks=disks,
        capture=capture,
        live=facts.live,
        freeze=freeze.freeze,
        standing=facts.live and facts.frozen_whole,
        why_not_frozen=freeze.why_not,
        expected_level=level,
        converts=converts,
        copy_directory=scratch if not direct and (facts.live or facts.inside or request.seal) else None,
        seals=bool(request.seal),
        nvram=facts.nvram,
        not_captured=tuple(not_captured),
        inside=facts.snapshot if facts.inside else None,
        shared=facts.shared,
    )


def _require_consistent(facts: Facts) -> None:
    """Raise where ``quiesce: required`` cannot be kept any more, since nothing is running that could be frozen."""
    domain = facts.domain
    if facts.level == "crash":
        raise Refused(
            f"Snapshot {facts.snapshot!r} of domain {domain.name!r} is only crash-consistent; quiesce is required",
            advice="Take a quiesced snapshot, or use quiesce: auto",
        )
    level = consistency.level(domain.state, managed_save=domain.managed_save)
    if facts.level is None and not domain.state.active and level != "offline":
        raise Refused(
            f"Domain {domain.name!r} is shut off, and not known to have been shut down cleanly"
            f" ({'saved' if domain.managed_save else domain.state.reason}); quiesce is required",
            advice="Start it and shut it down, or use quiesce: auto to accept a crash-consistent image",
        )


def _disk_plan(request: Request, facts: Facts, disk: Disk) -> DiskPlan:
    name = facts.domain.name
    if disk.encrypted:
        raise Unsupported(
            f"Disk {disk.target!r} of domain {name!r} is encrypted; an image of it would hold its data in the clear",
            advice="Leave it out with exclude_disks",
        )
    if disk.active is None or disk.target not in facts.sizes:
        raise Unsupported(
            f"The virtual size of disk {disk.target!r} of domain {name!r} cannot be read",
            advice="See that its image exists",
        )
    size = -(-facts.sizes[disk.target] // 512) * 512  # QEMU shows the guest whole sectors
    return DiskPlan(
        target=disk.target,
        bus=disk.bus if disk.bus in manifests.BUSES else "virtio",
        source=disk.active,
        size=size,
        estimate=room_for(min(facts.allocated.get(disk.target, size), size), size),
        file=f"{disk.target}.{manifests.FORMATS[request.format]}",
        serial=disk.serial if manifests.is_serial(disk.serial) else None,
    )
