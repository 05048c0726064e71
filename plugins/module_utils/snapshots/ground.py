# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What stands on what: the facts for everything that merges, reverts or removes. Read once, under the lock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .._errors import UNCHANGED, Busy, Refused, VmkeeperError
from ..hypervisor import apparmor, chain
from ..hypervisor.block_jobs import running_job
from ..hypervisor.domain_model import Disk, Domain, Layer, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety.domain_jobs import block_jobs_of
from ..safety.host_graph import HostGraph, Reader, canonical, openers, read_graph
from ..safety.space import allocated, free_bytes
from .model import Snapshot, read_snapshots


@dataclass(frozen=True)
class Image:
    """What the header of one image says, and its filesystem. Sizes in bytes; ``size`` is None where it cannot be read.

    ``allocated``: what it takes up; ``free``: what its filesystem (``device``) has left.
    """

    size: int | None = None
    internal_snapshots: int = 0
    bitmaps: tuple[str, ...] = ()
    exists: bool = True
    allocated: int = 0
    device: int = 0
    free: int = 0


@dataclass(frozen=True)
class Ground:
    """One domain, its snapshots and every image that has to do with them.

    ``chains``: target -> layers of the present state, from the active one down.  ``broken``: target -> why its chain
    cannot be followed.  ``opened``: path -> foreign processes that have it open.  ``denied``: canonical paths that the
    security profile of the running guest forbids to write.  ``job`` is the domain-wide job; ``jobs``: target -> type of the
    disk's block job.  ``next_start``: the definition of a running domain's next start, where it has one.  ``resumed``: what
    the memory that one goes back to has besides the disks of its snapshot, on the images that it would open.
    """

    domain: Domain
    snapshots: tuple[Snapshot, ...] = ()
    graph: HostGraph = field(default_factory=HostGraph)
    chains: Mapping[str, tuple[Layer, ...]] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Image] = field(default_factory=dict)
    opened: Mapping[str, tuple[Reader, ...]] = field(default_factory=dict)
    denied: frozenset[str] = frozenset()
    job: str | None = None
    resumed: tuple[Disk, ...] = ()
    jobs: Mapping[str, str] = field(default_factory=dict)
    next_start: Domain | None = None

    def image(self, path: str) -> Image:
        """The image at ``path``; one that was never seen does not exist."""
        return self.images.get(canonical(path), Image(exists=False))

    def in_use(self, target: str) -> tuple[str, ...]:
        """The canonical paths of a disk's present chain, from the active layer down."""
        return tuple(canonical(layer.path) for layer in self.chains.get(target, ()) if layer.path)


def read_ground(handle: Any) -> Ground:
    """Read the facts of one domain. Reads every definition of the host, since any of them may use its images."""
    # First: a job that ends in between has changed the chain before it went.
    jobs = {job["disk"]: job["type"] for job in block_jobs_of(handle)}
    domain = read_domain(handle)
    snapshots = read_snapshots(handle)
    graph = read_graph(handle.connect())
    chains: dict[str, tuple[Layer, ...]] = {}
    broken: dict[str, str] = {}
    for disk in domain.disks:
        if disk.active is None or disk.device in ("cdrom", "floppy"):
            continue
        try:
            # A chain recorded in the definition of a stopped domain may be out of date; the headers are not.
            chains[disk.target] = chain.chain_of(disk) if domain.state.active else chain.follow(disk.active)
        except VmkeeperError as error:
            broken[disk.target] = error.problem
    formats = {
        canonical(layer.path): layer.format for layers in chains.values() for layer in layers if layer.path is not None
    }
    for snapshot in snapshots:
        for held in snapshot.captured:
            if held.base is not None:
                formats.setdefault(canonical(held.base), held.base_format)
    for path in [path for known in list(formats) for path in (*graph.chain(known), *graph.above(known))]:
        formats.setdefault(path, "qcow2" if path in graph.below else None)
    return Ground(
        domain=domain,
        snapshots=snapshots,
        graph=graph,
        chains=chains,
        broken=broken,
        images={path: _image(path, image_format) for path, image_format in formats.items()},
        opened=openers(formats, besides=domain.uuid),
        denied=apparmor.read_denied(handle) if domain.state.active else frozenset(),
        job=running_job(handle),
        jobs=jobs,
        next_start=read_domain(handle, inactive=True) if domain.state.active and domain.persistent else None,
    )


def _image(path: str, image_format: str | None) -> Image:
    kind = "block" if path.startswith("/dev/") else "file"
    size = chain.virtual_size(Layer(path, image_format or "raw", kind))
    if size is None:
        return Image(exists=False)
    image = Image(size)
    with contextlib.suppress(OSError):
        image = Image(
            size,
            allocated=min(size, allocated(path)),  # a device may be larger than the image in it
            device=os.stat(path).st_dev,
            free=free_bytes(os.path.dirname(path)) if kind == "file" else 0,
        )
    if image_format != "qcow2":
        return image
    try:
        header = read_qcow2(path)
    except (OSError, BadHeader):
        return image
    return replace(
        image, internal_snapshots=header.internal_snapshots, bitmaps=tuple(one.name for one in header.bitmaps)
    )


def refuse_saved(domain: Domain, *, state: str = UNCHANGED) -> None:
    """Raise where the domain has a saved state; ``state`` is what was done so far. Looked at again before each step that matters."""
    if domain.managed_save:
        raise Refused(
            f"Domain {domain.name!r} has a managed-save image: its RAM would resume on disks that have moved on",
            state=state,
            advice=f"Start it, or drop the saved state (virsh managedsave-remove {domain.name}), then run this again",
        )


def refuse_unsettled(ground: Ground) -> None:
    """Raise where a domain's images may not be moved now, whatever was asked."""
    domain = ground.domain
    refuse_saved(domain)
    if ground.job:
        raise Busy(
            f"Domain {domain.name!r} is busy: {ground.job}",
            advice="Wait for it (domain_job shows it), then run this again",
        )
