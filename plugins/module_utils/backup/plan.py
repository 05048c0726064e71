# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a backup will do, decided from facts alone: full or increment for each disk and why, how much room it needs."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from .._errors import Busy, InvalidInput, Refused, Unsupported
from ..hypervisor.agent import AgentInfo
from ..hypervisor.capture import Capture, choose, require_local_chains
from ..hypervisor.domain_model import Disk, Domain
from ..hypervisor.image_node import Passphrase
from ..safety import consistency
from ..safety.space import room_for
from .checkpoints import Checkpoint
from .manifest import Point, SourceLayer, StoredDisk
from .repository import History

#: A chain in a repository is at most this long: reading through 32 layers costs twice as much as through one.
CHAIN_LIMIT = 16

#: What LUKS puts in front of an image: room for eight keys.
LUKS_TABLES = 3 << 20

#: reason -> the sentence that a person reads
REASONS = {
    "asked for": "a full was asked for",
    "first": "the repository has no point of this domain yet",
    "first of disk": "the last point does not hold this disk",
    "cold cut": "the domain is not running, so no bitmap tells what changed; the whole disk was copied",
    "transient domain": "libvirt keeps no checkpoints of a transient domain",
    "raw": "the disk's image is not qcow2 and cannot hold a bitmap",
    "old qcow2": "the disk's image is qcow2 version 2 (compat 0.10) and cannot hold a bitmap",
    "checkpoint missing": "the checkpoint of the last point is gone and could not be put back",
    "bitmap inconsistent": "the disk's bitmap is missing or inconsistent, as after a crash of QEMU or of the host",
    "reverted": "the disk stands on a new layer that knows nothing of the bitmap, as after a revert",
    "resized": "the disk was resized under a snapshot, where its bitmap may have lost changes",
    "shrunk": "the disk is smaller than it was",
    "pulled": "the layer that was written at the last point is gone, as after a block pull",
    "disk replaced": "the disk's image is another file than at the last point",
    "chain limit": f"the chain in the repository has {CHAIN_LIMIT} points",
    "chain broken": "a point that the increment would stand on is missing or damaged",
    "encryption changed": "the last point of this disk is encrypted and this one is not to be, or the other way round",
    "proved": "the bitmaps cover every change since the last point",
}


@dataclass(frozen=True)
class Request:
    """The task's options, checked. ``min_age`` and ``deadline`` in seconds; ``tags`` and ``description`` None when not given.

    With a ``passphrase`` the points are encrypted.  ``scratch``: QEMU writes there in any case, None: only where it must.
    ``bandwidth`` in bytes per second for each disk, 0 for no limit.
    """

    type: str = "auto"
    quiesce: str = "auto"
    disks: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    min_age: float | None = None
    description: str | None = None
    tags: Mapping[str, str] | None = None
    protected: bool = False
    deadline: float = 60.0
    compression: str | None = None
    passphrase: Passphrase | None = None
    scratch: str | None = None
    bandwidth: int = 0


@dataclass(frozen=True)
class LayerFacts:
    """One image of a live chain: ``size`` virtual, ``allocated`` on disk, in bytes; ``bitmaps`` as stored in its header.

    ``data_file`` holds the data, where the image itself does not.
    """

    path: str
    format: str | None
    inode: int
    size: int
    allocated: int
    qcow2_version: int | None = None
    bitmaps: frozenset[str] = frozenset()
    encrypted: bool = False
    data_file: str | None = None


@dataclass(frozen=True)
class DiskFacts:
    """A disk that can be captured, with its chain, topmost layer first. ``size`` is what the guest sees.

    ``passphrase`` is what libvirt opens it with, where it is encrypted and libvirt tells.
    """

    disk: Disk
    size: int
    layers: tuple[LayerFacts, ...]
    passphrase: Passphrase | None = None

    @property
    def allocated(self) -> int:
        """Most bytes that a full can hold."""
        if any(layer.path is None for layer in self.disk.chain):
            return self.size  # QEMU reads a layer that is not here
        return min(self.size, sum(layer.allocated for layer in self.layers))


@dataclass(frozen=True)
class Facts:
    """One domain and its points in the repository, as they are now.

    ``last`` is the newest point that made a checkpoint; ``checkpoint`` that checkpoint, if libvirt has it.  ``frozen``: the
    agent says that filesystems are frozen already; ``frozen_whole``: by the fsfreeze module, and all of them.
    """

    domain: Domain
    disks: Mapping[str, DiskFacts]
    history: History = field(default_factory=History)
    last: Point | None = None
    checkpoint: Checkpoint | None = None
    our_checkpoints: tuple[str, ...] = ()
    agent: AgentInfo | None = None
    agent_problem: str | None = None
    job: str | None = None
    frozen: bool = False
    frozen_whole: bool = False


@dataclass(frozen=True)
class DiskPlan:
    """How one disk is taken. ``parent`` is a point's id for an increment; ``estimate`` the most bytes it will need."""

    facts: DiskFacts
    type: str
    reason: str
    parent: str | None
    parent_size: int | None
    estimate: int
    tracked: bool
    compression: str | None = None
    passphrase: Passphrase | None = None

    @property
    def coded(self) -> bool:
        """Whether it is stored otherwise than QEMU pushes it."""
        return self.compression is not None or self.passphrase is not None

    @property
    def target(self) -> str:
        """The disk's target."""
        return self.facts.disk.target

    @property
    def file(self) -> str:
        """Name of its image in the point."""
        return f"{self.target}.qcow2"


@dataclass(frozen=True)
class PointPlan:
    """Everything that will be done for one domain."""

    domain: Domain
    disks: tuple[DiskPlan, ...]
    capture: Capture
    freeze: bool
    standing: bool
    why_not_frozen: str | None
    live: bool
    sequence: int
    checkpoint_parent: str | None
    retire: tuple[str, ...]

    @property
    def type(self) -> str:
        """``incremental`` if any disk is."""
        return "incremental" if any(disk.parent for disk in self.disks) else "full"

    @property
    def reason(self) -> str:
        """Why it is of that type."""
        for disk in self.disks:
            if (disk.parent is not None) == (self.type == "incremental"):
                return disk.reason
        return "first"

    @property
    def parent(self) -> str | None:
        """The point that its increments stand on."""
        return next((disk.parent for disk in self.disks if disk.parent), None)

    @property
    def tracked(self) -> tuple[str, ...]:
        """Disks that get a bitmap, so that the next point can be an increment."""
        return tuple(disk.target for disk in self.disks if disk.tracked)

    @property
    def expected_level(self) -> str:
        """The level that it will have if all goes as planned."""
        return consistency.level(
            self.domain.state,
            frozen_over_cut=self.freeze or self.standing,
            managed_save=self.domain.managed_save,
        )

    @property
    def estimate(self) -> int:
        """Most bytes that it needs in the repository."""
        return sum(disk.estimate for disk in self.disks)


def refuse_unsafe(facts: Facts) -> None:
    """Raise where no backup may begin now."""
    domain = facts.domain
    if facts.job:
        raise Busy(
            f"Domain {domain.name!r} is busy: {facts.job}",
            advice="Wait for it (virsh domjobinfo shows it), then run this again",
        )
    for disk in domain.disks:
        if disk.job is not None:
            raise Busy(
                f"Disk {disk.target!r} of domain {domain.name!r} has a running block job ({disk.job.job})",
                advice="Wait for it, then run this again",
            )


def refuse_impossible(request: Request) -> None:
    """Raise where the options contradict each other."""
    if request.compression is not None and request.passphrase is not None:
        raise InvalidInput(
            "compression and encryption exclude each other: qcow2 cannot compress what it encrypts",
            advice="Leave one of them out",
        )


def must_stage(request: Request, plans: Sequence[PointPlan], *, local: bool) -> bool:
    """Whether QEMU pushes into a scratch directory, and what it wrote is stored in the repository afterwards."""
    live = any(plan.live for plan in plans)
    coded = any(disk.coded for plan in plans if plan.live for disk in plan.disks)
    return live and (not local or coded or request.scratch is not None)


def plan_point(request: Request, facts: Facts) -> PointPlan:
    """Decide one domain's point."""
    domain = facts.domain
    refuse_unsafe(facts)
    capture = choose(domain, disks=request.disks, exclude=request.exclude, carries_nvram=True)
    if not capture.disks:
        raise Refused(
            f"Domain {domain.name!r} has no disk that a backup can hold",
            advice="See not_captured for the reasons",
            not_captured=[part.as_result() for part in capture.left_out],
        )
    if not domain.state.active:
        require_local_chains(domain, capture.disks)
    for disk in capture.disks:
        if disk.target not in facts.disks:
            raise Unsupported(
                f"The image of disk {disk.target!r} of domain {domain.name!r} cannot be read",
                advice="See that it exists (domain_info shows its chain)",
            )
        if disk.encrypted:
            _refuse_unreadable(request, domain, facts.disks[disk.target])
    freeze = _decide_freeze(request, facts)
    disks = tuple(_plan_disk(request, facts, facts.disks[disk.target]) for disk in capture.disks)
    if request.type == "incremental":
        _require_increment(facts, disks)
    parents = {disk.parent for disk in disks if disk.parent}
    return PointPlan(
        domain=domain,
        disks=disks,
        capture=capture,
        freeze=freeze.freeze,
        standing=facts.frozen_whole,
        why_not_frozen=freeze.why_not,
        live=domain.state.active,
        sequence=facts.history.next_sequence,
        checkpoint_parent=facts.last.checkpoint if facts.last and parents else None,
        # A cold cut leaves the live chain as it is: the next live point goes on with it.
        retire=facts.our_checkpoints if domain.state.active else (),
    )


def _refuse_unreadable(request: Request, domain: Domain, disk: DiskFacts) -> None:
    """What is encrypted stays encrypted, so its passphrase is needed, or another one."""
    encryption = disk.disk.encryption
    what = f"Disk {disk.disk.target!r} of domain {domain.name!r} is encrypted"
    if encryption is None or encryption.format != "luks":
        raise Unsupported(f"{what}, and not with LUKS", advice="Leave it out with exclude_disks")
    if not domain.state.active and any(layer.format != "qcow2" for layer in disk.layers):
        raise Unsupported(f"{what}, not in a qcow2, and the domain is not running", advice="Start it first")
    if disk.passphrase is None and (request.passphrase is None or not domain.state.active):
        raise Refused(
            f"{what}, and libvirt does not tell the passphrase of its secret",
            advice="Give encryption.passphrase, which the point is then encrypted with"
            if domain.state.active
            else "Start it, which needs nobody to read the secret, or give the secret private='no'",
        )


def _decide_freeze(request: Request, facts: Facts) -> consistency.FreezeDecision:
    domain = facts.domain
    if facts.frozen:
        return consistency.respect_freeze(request.quiesce, domain, whole=facts.frozen_whole)
    if domain.state.active:
        obstacle = consistency.agent_obstacle(domain, facts.agent, facts.agent_problem)
        return consistency.decide_freeze(request.quiesce, domain, obstacle, with_memory=False)
    if request.quiesce == "required" and consistency.level(domain.state, managed_save=domain.managed_save) != "offline":
        reason = "it has a saved state" if domain.managed_save else domain.state.reason
        raise Refused(
            f"Domain {domain.name!r} is shut off, and not known to have been shut down cleanly ({reason}); quiesce is required",
            advice="Start it, or use quiesce: auto to accept a crash-consistent point",
        )
    return consistency.FreezeDecision(False)


def _require_increment(facts: Facts, disks: Sequence[DiskPlan]) -> None:
    if any(disk.parent for disk in disks):
        return
    raise Refused(
        f"No disk of domain {facts.domain.name!r} can be backed up incrementally: "
        + "; ".join(f"{disk.target}: {REASONS[disk.reason]}" for disk in disks),
        advice="Use type: auto, which makes a full here",
        reasons={disk.target: disk.reason for disk in disks},
    )


def _plan_disk(request: Request, facts: Facts, disk: DiskFacts) -> DiskPlan:
    obstacle = bitmap_obstacle(facts.domain, disk)
    passphrase = request.passphrase or disk.passphrase
    # qcow2 cannot compress what it encrypts.
    compression = request.compression if passphrase is None else None
    if request.type == "full":
        reason: str | None = "asked for"
    elif not facts.domain.state.active:
        reason = "cold cut"
    else:
        reason = obstacle or why_full(facts, disk, encrypted=passphrase is not None)
    tracked = facts.domain.state.active and obstacle is None
    tables = LUKS_TABLES if passphrase is not None else 0
    if reason is None and facts.last is not None and facts.checkpoint is not None:
        before = facts.last.disk(disk.disk.target)
        dirty = facts.checkpoint.dirty[disk.disk.target]
        return DiskPlan(
            disk,
            "incremental",
            "proved",
            facts.last.id,
            before.virtual_size if before else None,
            room_for(min(dirty, disk.size), disk.size) + tables,
            tracked,
            compression,
            passphrase,
        )
    room = room_for(disk.allocated, disk.size) + tables
    return DiskPlan(disk, "full", reason or "first", None, None, room, tracked, compression, passphrase)


def bitmap_obstacle(domain: Domain, disk: DiskFacts) -> str | None:
    """Why no bitmap can be kept in this disk, or None."""
    if not domain.persistent:
        return "transient domain"
    top = disk.layers[0]
    if top.format != "qcow2":
        return "raw"
    if top.qcow2_version is not None and top.qcow2_version < 3:
        return "old qcow2"
    return None


def why_full(facts: Facts, disk: DiskFacts, *, encrypted: bool = False) -> str | None:
    """Why a running domain's disk needs a full, or None when an increment is proved to hold every change.

    The proof (DESIGN, invariant 7): libvirt found the checkpoint's bitmap recording and consistent from the top layer
    down without a gap; a layer that was there at the last point is found in the chain; and every layer from the top down
    to it holds the bitmap and has the same virtual size.  libvirt alone does not look at where the bitmap began, so that
    a pull after a resize under a snapshot loses changes without a word (9.0).
    """
    target = disk.disk.target
    last = facts.last
    if last is None:
        return "first"
    before = last.disk(target)
    if before is None:
        return "first of disk"
    if facts.checkpoint is None:
        return "checkpoint missing"
    if disk.size < before.virtual_size:
        return "shrunk"
    reason = _unproved(facts.checkpoint, target, disk, before)
    if reason is None and (before.encryption is not None) != encrypted:
        # One passphrase opens a chain or none is needed: nobody finds half of it unreadable, or half of it readable.
        return "encryption changed"
    if reason is None:
        return _chain_reason(facts.history, last, target)
    return reason


def _unproved(checkpoint: Checkpoint, target: str, disk: DiskFacts, before: StoredDisk) -> str | None:
    if target not in checkpoint.covers:
        return "checkpoint missing"
    recorded = [layer.path for layer in before.source]
    paths = [layer.path for layer in disk.layers]
    found = next((path for path in recorded if path in paths), None)
    whole = target in checkpoint.dirty
    if found is None:
        return "pulled" if whole else "disk replaced"
    depth = paths.index(found)
    if disk.layers[depth].inode != before.source[recorded.index(found)].inode:
        return "disk replaced"
    if not whole:
        return "bitmap inconsistent" if depth == 0 else "reverted"
    if any(layer.size != disk.size for layer in disk.layers[: depth + 1]):
        return "resized"
    # The top layer's bitmap is in QEMU's memory and libvirt has vouched for it; a sealed layer states its own.
    if any(checkpoint.name not in layer.bitmaps for layer in disk.layers[1 : depth + 1]):
        return "pulled"
    if recorded.index(found) > 0 and disk.size != before.virtual_size:
        return "resized"
    return None


def _chain_reason(history: History, last: Point, target: str) -> str | None:
    try:
        lineage = history.lineage(last, target)
    except Refused:
        return "chain broken"
    return "chain limit" if len(lineage) >= CHAIN_LIMIT else None


def young_enough(request: Request, facts: Facts, now: datetime.datetime) -> Point | None:
    """The newest point that is what ``request`` asks for and younger than its ``min_age`` seconds.

    One from the future proves a wrong clock, not youth.
    """
    for point in reversed(facts.history.points):
        age = (now - point.created_at).total_seconds()
        if request.min_age is not None and 0 <= age < request.min_age and _serves(request, facts, point):
            return point
    return None


def _serves(request: Request, facts: Facts, point: Point) -> bool:
    """Whether a point holds all disks of the task, is as consistent as it wants, and encrypted if and only if it wants that."""
    wanted = {disk.target for disk in choose(facts.domain, disks=request.disks, exclude=request.exclude).disks}
    if not wanted <= {disk.target for disk in point.disks}:
        return False
    if request.quiesce == "required" and point.consistency not in consistency.CLEAN:
        return False
    encrypted = request.passphrase is not None
    return all(disk.encrypted_source or (disk.encryption is not None) == encrypted for disk in point.disks)


def source_layers(disk: DiskFacts) -> tuple[SourceLayer, ...]:
    """What the manifest keeps of the source, for the next proof."""
    return tuple(SourceLayer(layer.path, layer.format, layer.inode, layer.size) for layer in disk.layers)


def backup_xml(plan: PointPlan, directory: str, secret: str | None = None) -> str:
    """The ``<domainbackup>`` that pushes into ``directory`` (https://libvirt.org/formatbackup.html).

    ``secret`` is the UUID of the libvirt secret with the key of the targets of disks that are stored encrypted.
    """
    root = ElementTree.Element("domainbackup", mode="push")
    disks = ElementTree.SubElement(root, "disks")
    planned = {disk.target: disk for disk in plan.disks}
    for disk in plan.domain.disks:
        chosen = planned.get(disk.target)
        if chosen is None:
            ElementTree.SubElement(disks, "disk", name=disk.target, backup="no")
            continue
        element = ElementTree.SubElement(disks, "disk", name=disk.target, backup="yes", type="file")
        if chosen.parent is not None and plan.checkpoint_parent is not None:
            element.set("backupmode", "incremental")
            element.set("incremental", plan.checkpoint_parent)
        else:
            element.set("backupmode", "full")
        ElementTree.SubElement(element, "driver", type="qcow2")
        target = ElementTree.SubElement(element, "target", file=f"{directory}/{chosen.file}")
        if secret is not None and chosen.passphrase is not None:
            encryption = ElementTree.SubElement(target, "encryption", format="luks")
            ElementTree.SubElement(encryption, "secret", type="passphrase", uuid=secret)
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint_xml(plan: PointPlan, name: str) -> str | None:
    """The ``<domaincheckpoint>`` made at the same instant, or None when no disk can hold a bitmap."""
    if not plan.tracked:
        return None
    root = ElementTree.Element("domaincheckpoint")
    ElementTree.SubElement(root, "name").text = name
    disks = ElementTree.SubElement(root, "disks")
    for disk in plan.domain.disks:
        kind = "bitmap" if disk.target in plan.tracked else "no"
        ElementTree.SubElement(disks, "disk", name=disk.target, checkpoint=kind)
    return ElementTree.tostring(root, encoding="unicode")
