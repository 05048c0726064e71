# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What taking a snapshot will do, decided from facts alone: which mode and why, which files, what already exists."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from xml.etree import ElementTree

from .._errors import Busy, Conflict, InvalidInput, Refused, Unsupported
from ..hypervisor.agent import AgentInfo
from ..hypervisor.capture import Capture, choose
from ..hypervisor.chain import MAXIMUM_DEPTH
from ..hypervisor.domain_model import Domain
from ..safety import consistency
from ..safety.names import file_stem
from .model import Labels, Snapshot, by_name

#: Where overlays of disks go that do not lie in a directory (block devices): libvirt's own default pool.
BLOCK_OVERLAYS = "/var/lib/libvirt/images"

#: Room that an overlay must find: enough that the guest does not stop on a full disk at once.
LEAST_RESERVE = 64 << 20
LARGEST_RESERVE = 1 << 30
RESERVE_SHARE = 20  # one twentieth of the virtual size


@dataclass(frozen=True)
class Request:
    """The task's options, checked. ``deadline`` in seconds; ``tags`` and ``description`` are None when not given."""

    name: str
    mode: str = "auto"
    memory: bool = False
    quiesce: str = "auto"
    disks: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    directory: str | None = None
    description: str | None = None
    tags: Mapping[str, str] | None = None
    deadline: float = 60.0
    protected: bool | None = None


@dataclass(frozen=True)
class Facts:
    """One domain as it is now. ``sizes`` are virtual sizes by target; ``job`` names what libvirt is busy with.

    ``frozen``: the agent says that filesystems are frozen already; ``frozen_whole``: by the fsfreeze module, and all of them.
    ``next_start`` is the persistent definition of a running domain. ``layers`` counts each disk's by target; ``longest_startable``
    is how many this libvirt starts a guest on.
    """

    domain: Domain
    snapshots: tuple[Snapshot, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    agent: AgentInfo | None = None
    agent_problem: str | None = None
    job: str | None = None
    frozen: bool = False
    frozen_whole: bool = False
    next_start: Domain | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    longest_startable: int = MAXIMUM_DEPTH


@dataclass(frozen=True)
class OverlayPlan:
    """One overlay to make: ``path`` above ``base``. ``size`` is the virtual size in bytes."""

    target: str
    path: str
    base: str
    base_format: str
    size: int


@dataclass(frozen=True)
class NvramCopy:
    """UEFI variables to keep: ``source`` is the domain's file, ``path`` the copy."""

    source: str
    path: str


@dataclass(frozen=True)
class TakePlan:
    """Everything that will be done to one domain."""

    domain: Domain
    name: str
    mode: str
    mode_reason: str
    memory: bool
    freeze: bool
    standing: bool
    why_not_frozen: str | None
    shutdown: bool
    overlays: tuple[OverlayPlan, ...]
    memory_file: str | None
    nvram: NvramCopy | None
    capture: Capture
    description: str
    tags: Mapping[str, str]
    protected: bool = False

    @property
    def expected_level(self) -> str:
        """The level that it will have if all goes as planned."""
        if self.shutdown:
            return "offline"
        return consistency.level(
            self.domain.state,
            frozen_over_cut=self.freeze or self.standing,
            with_memory=self.memory,
            managed_save=self.domain.managed_save,
        )

    def labels(self, level: str, frozen_ms: int | None, paused_ms: int | None) -> Labels:
        """The labels of the finished snapshot."""
        return Labels(
            consistency=level,
            frozen_ms=frozen_ms,
            paused_ms=paused_ms,
            mode_reason=self.mode_reason,
            tags=self.tags,
            protected=self.protected,
            nvram=self.nvram.path if self.nvram else None,
            not_captured=tuple(part.as_result() for part in self.capture.left_out),
        )

    def needs(self) -> list[tuple[str, int]]:
        """``(directory, bytes)`` that must be free."""
        needs = [(os.path.dirname(overlay.path), reserve(overlay.size)) for overlay in self.overlays]
        if self.memory_file:
            needs.append((os.path.dirname(self.memory_file), self.domain.memory_max + LEAST_RESERVE))
        return needs


def reserve(virtual_size: int) -> int:
    """Bytes that must be free for an overlay of a disk of that size."""
    return max(LEAST_RESERVE, min(LARGEST_RESERVE, virtual_size // RESERVE_SHARE))


def refuse_unsafe(facts: Facts) -> None:
    """Raise where no snapshot may be taken now, whatever was asked."""
    domain = facts.domain
    if domain.managed_save:
        raise Refused(
            f"Domain {domain.name!r} has a managed-save image: its RAM would resume on disks that have moved on",
            advice=f"Start it, or drop the saved state (virsh managedsave-remove {domain.name}), then run this again",
        )
    if facts.job:
        raise Busy(
            f"Domain {domain.name!r} is busy: {facts.job}",
            advice="Wait for it (domain_job shows it), then run this again",
        )
    for disk in domain.disks:
        if disk.job is not None:
            raise Busy(
                f"Disk {disk.target!r} of domain {domain.name!r} has a running block job ({disk.job.job})",
                advice="Wait for it (domain_job shows it), then run this again",
            )


def plan_take(request: Request, facts: Facts, exists: Callable[[str], bool] = os.path.lexists) -> TakePlan:
    """Decide what ``state: present`` does to a domain that does not have the snapshot yet."""
    domain = facts.domain
    refuse_unsafe(facts)
    memory = request.memory and domain.state.active
    if request.memory and request.quiesce == "shutdown":
        raise InvalidInput(
            "quiesce: shutdown and memory: true exclude each other",
            advice="A guest that is shut down has no memory to keep",
        )
    shutdown = request.quiesce == "shutdown" and domain.state.active
    if shutdown and not domain.persistent:
        raise Refused(
            f"Domain {domain.name!r} is transient and would be gone once it is shut down",
            advice="Use another quiesce",
        )
    if shutdown and not domain.state.running:
        raise Refused(
            f"Domain {domain.name!r} is {domain.state.name} and cannot be shut down cleanly",
            advice="Resume it first, or use quiesce: auto",
        )
    if request.quiesce == "required" and not domain.state.active and consistency.level(domain.state) != "offline":
        raise Refused(
            f"Domain {domain.name!r} is shut off, and not known to have been shut down cleanly"
            f" ({domain.state.reason}); quiesce is required",
            advice="Start it and shut it down, or use quiesce: auto to accept a crash-consistent snapshot",
        )
    kept_nvram = _can_keep_nvram(request, domain, exists)
    capture = choose(domain, disks=request.disks, exclude=request.exclude, carries_nvram=kept_nvram)
    if not capture.disks:
        raise Refused(
            f"Domain {domain.name!r} has no disk that a snapshot can hold",
            advice="See not_captured for the reasons",
            not_captured=[part.as_result() for part in capture.left_out],
        )
    if shutdown and facts.next_start is not None:
        refuse_other_disks(domain, facts.next_start, [disk.target for disk in capture.disks])
    mode, reason = choose_mode(request, facts, capture, memory=memory, offline=shutdown or not domain.state.active)
    if facts.frozen and (memory or shutdown):
        raise Refused(
            f"The guest of domain {domain.name!r} is frozen: its memory would come back frozen, and it cannot shut down",
            advice="Thaw it first (vmkeeper.libvirt.fsfreeze with state: thawed)",
        )
    if facts.frozen:
        freeze = consistency.respect_freeze(request.quiesce, domain, whole=facts.frozen_whole)
    elif domain.state.active:
        obstacle = consistency.agent_obstacle(domain, facts.agent, facts.agent_problem)
        freeze = consistency.decide_freeze(request.quiesce, domain, obstacle, with_memory=request.memory)
    else:
        freeze = consistency.FreezeDecision(False)
    overlays = _overlays(request, facts, capture, exists) if mode == "external" else ()
    memory_file, nvram = None, None
    if mode == "external":
        directory, stem = os.path.dirname(overlays[0].path), file_stem(domain.name, request.name)
        if memory:
            memory_file = unused_path(directory, stem, ".memory", exists)
        if kept_nvram and domain.nvram is not None:
            nvram = NvramCopy(domain.nvram.path, unused_path(directory, stem, ".nvram", exists))
    return TakePlan(
        domain=domain,
        name=request.name,
        mode=mode,
        mode_reason=reason,
        memory=memory,
        freeze=freeze.freeze,
        standing=facts.frozen_whole,
        why_not_frozen=freeze.why_not,
        shutdown=shutdown,
        overlays=overlays,
        memory_file=memory_file,
        nvram=nvram,
        capture=capture,
        description=request.description or "",
        tags=request.tags or {},
        protected=bool(request.protected),
    )


def _can_keep_nvram(request: Request, domain: Domain, exists: Callable[[str], bool]) -> bool:
    """Raw UEFI variables are copied beside the overlays. Internal snapshots hold them themselves, or are refused.

    In qcow2 they are metadata of a file that QEMU has open, and no copy of it would be sure to be whole.  A domain that was
    never started has none.
    """
    if domain.nvram is None or request.mode == "internal":
        return False
    return domain.nvram.format == "raw" and exists(domain.nvram.path)


def refuse_other_disks(live: Domain, next_start: Domain, targets: Sequence[str]) -> None:
    """What is cut or merged after a shutdown is the persistent definition's; it must stand on the same images."""
    for target in targets:
        now, then = live.disk(target), next_start.disk(target)
        if now is None or then is None or (now.path, now.format) != (then.path, then.format):
            raise Refused(
                f"Disk {target!r} of domain {live.name!r} will be another one at its next start",
                advice="Shut it down, or bring definition and running guest together, then run this again",
            )


def choose_mode(request: Request, facts: Facts, capture: Capture, *, memory: bool, offline: bool) -> tuple[str, str]:
    """``external`` or ``internal``, and why."""
    obstacles = internal_obstacles(facts, capture, memory=memory, offline=offline)
    if request.mode == "internal":
        if obstacles:
            raise Unsupported(
                f"An internal snapshot of domain {facts.domain.name!r} would hurt: {'; '.join(obstacles)}",
                advice="Use mode: external",
                obstacles=obstacles,
            )
        return "internal", "asked for"
    if request.mode == "external":
        return "external", "asked for"
    return (
        "external",
        "external: the guest keeps running, any base format will do, and incremental backups go on",
    )


def internal_obstacles(facts: Facts, capture: Capture, *, memory: bool, offline: bool) -> list[str]:
    """Why an internal snapshot must not be taken. libvirt allows some of these, and the guest pays later."""
    domain = facts.domain
    found = []
    if domain.nvram is not None and domain.nvram.format != "qcow2":
        found.append("its UEFI variables are in a raw file, which internal snapshots cannot hold")
    if domain.checkpoints:
        found.append("it has checkpoints, and reverting to an internal snapshot under active bitmaps kills QEMU")
    found += [
        f"disk {disk.target} is {disk.format or 'of unknown format'}, not qcow2"
        for disk in capture.disks
        if disk.format != "qcow2"
    ]
    if any(part.kind == "disk" and part.reason in ("excluded", "snapshot-no") for part in capture.left_out):
        found.append("it always holds every writable disk, and some are left out")
    if any(disk.mode == "external" for snapshot in facts.snapshots for disk in snapshot.disks):
        found.append(
            "it has external snapshots, and removing one could take the internal one with it (libvirt before 11.0)"
        )
    if not offline and not memory:
        found.append("libvirt takes internal snapshots of a running guest only together with its memory (memory: true)")
    return found


def _overlays(
    request: Request, facts: Facts, capture: Capture, exists: Callable[[str], bool]
) -> tuple[OverlayPlan, ...]:
    overlays = []
    for disk in capture.disks:
        path = disk.path
        if path is None or disk.target not in facts.sizes:
            raise Unsupported(
                f"The virtual size of disk {disk.target!r} of domain {facts.domain.name!r} cannot be read",
                advice="See that its image exists",
            )
        if disk.encrypted:
            raise Unsupported(
                f"Disk {disk.target!r} of domain {facts.domain.name!r} is encrypted; a plain overlay would hold its data in the clear",
                advice="Leave it out with exclude_disks",
            )
        if facts.layers.get(disk.target, 1) >= facts.longest_startable:
            raise Refused(
                f"Disk {disk.target!r} of domain {facts.domain.name!r} has {facts.layers[disk.target]} layers; with one more, the"
                " libvirt of this host could not start the guest again",
                advice="Shorten the chain with vmkeeper.libvirt.blockcommit, which works while the guest runs, then run this again",
                longest_startable=facts.longest_startable,
            )
        directory = request.directory or overlay_directory(path)
        stem = file_stem(facts.domain.name, disk.target, request.name)
        overlays.append(
            OverlayPlan(
                target=disk.target,
                path=unused_path(directory, stem, ".qcow2", exists),
                base=path,
                base_format=disk.format or "raw",
                size=facts.sizes[disk.target],
            )
        )
    return tuple(overlays)


def overlay_directory(path: str) -> str:
    """Where the overlay of an image goes: beside it where it lies in a directory, else libvirt's default pool."""
    return BLOCK_OVERLAYS if path.startswith("/dev/") else os.path.dirname(path)


def unused_path(directory: str, stem: str, suffix: str, exists: Callable[[str], bool]) -> str:
    """A path that does not exist yet: ``stem`` and, if that is taken, a number."""
    number = 1
    while True:
        path = os.path.join(directory, f"{stem}{'' if number == 1 else f'.{number}'}{suffix}")
        if not exists(path):
            return path
        number += 1


@dataclass(frozen=True)
class Existing:
    """The snapshot is there already; ``relabel`` holds the labels to store when only those differ."""

    snapshot: Snapshot
    relabel: Labels | None = None
    description: str | None = None


def compare_existing(request: Request, facts: Facts) -> Existing | None:
    """What ``state: present`` finds: None (to be taken), or the snapshot, which must be the one asked for."""
    found = by_name(facts.snapshots, request.name)
    if found is None:
        return None
    if found.labels is not None and found.labels.ending:
        raise Conflict(
            f"The removal of snapshot {request.name!r} of domain {facts.domain.name!r} was begun: nobody can go back to it any more",
            advice="Finish that with state: absent, then run this again",
        )
    differences = []
    wanted = {disk.target for disk in choose(facts.domain, disks=request.disks, exclude=request.exclude).disks}
    held = {disk.target for disk in found.captured}
    if (request.disks is not None or request.exclude is not None) and wanted != held:
        differences.append(f"it holds {', '.join(sorted(held)) or 'no disk'} and not {', '.join(sorted(wanted))}")
    if request.memory and found.memory_mode == "no" and found.state in ("running", "paused", "disk-snapshot"):
        differences.append("it has no memory")
    if request.mode != "auto" and request.mode != found.mode:
        differences.append(f"it is {found.mode}")
    if request.quiesce == "required" and found.consistency not in consistency.CLEAN:
        differences.append(f"its consistency is {found.consistency} and quiesce is required")
    if request.quiesce == "shutdown" and found.consistency != "offline":
        differences.append(f"its consistency is {found.consistency}, and the guest was not shut down for it")
    if differences:
        raise Conflict(
            f"Domain {facts.domain.name!r} has a snapshot {request.name!r} from {found.created.isoformat()} with other content: "
            + "; ".join(differences),
            advice="Choose another name, or remove it first with state: absent",
            snapshot=found.as_result(facts.domain.name),
        )
    labels = found.labels or Labels(consistency=found.consistency)
    new = replace(
        labels,
        tags=request.tags if request.tags is not None else labels.tags,
        protected=request.protected if request.protected is not None else labels.protected,
    )
    description = request.description if request.description not in (None, found.description) else None
    if new != labels or description is not None:
        return Existing(found, relabel=new, description=description)
    return Existing(found)


def check_group(existing: Sequence[tuple[str, Existing | None]], name: str) -> None:
    """A group has the snapshot everywhere or nowhere: the missing ones could not be of the same instant."""
    have = [domain for domain, found in existing if found is not None]
    lack = [domain for domain, found in existing if found is None]
    if have and lack:
        raise Conflict(
            f"The snapshot {name!r} exists on {', '.join(have)} and not on {', '.join(lack)}; one instant cannot be completed later",
            advice="Choose another name, or remove it there first",
        )


def snapshot_xml(plan: TakePlan) -> str:
    """The ``<domainsnapshot>`` to hand to libvirt."""
    root = ElementTree.Element("domainsnapshot")
    ElementTree.SubElement(root, "name").text = plan.name
    if plan.description:
        ElementTree.SubElement(root, "description").text = plan.description
    if plan.mode == "internal":
        if plan.memory:
            ElementTree.SubElement(root, "memory", snapshot="internal")
    elif plan.memory_file:
        ElementTree.SubElement(root, "memory", snapshot="external", file=plan.memory_file)
    else:
        ElementTree.SubElement(root, "memory", snapshot="no")
    disks = ElementTree.SubElement(root, "disks")
    overlays = {overlay.target: overlay for overlay in plan.overlays}
    for disk in plan.domain.disks:
        if disk.target in overlays:
            element = ElementTree.SubElement(disks, "disk", name=disk.target, snapshot="external", type="file")
            ElementTree.SubElement(element, "driver", type="qcow2")
            ElementTree.SubElement(element, "source", file=overlays[disk.target].path)
        elif plan.mode == "internal" and any(disk.target == taken.target for taken in plan.capture.disks):
            ElementTree.SubElement(disks, "disk", name=disk.target, snapshot="internal")
        elif disk.chain:
            ElementTree.SubElement(disks, "disk", name=disk.target, snapshot="no")
    return ElementTree.tostring(root, encoding="unicode")
