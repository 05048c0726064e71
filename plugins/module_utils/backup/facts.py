# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read what the decisions about one domain's backup need, once."""

from __future__ import annotations

import os
import stat
from typing import Any

from .._errors import Refused, Unsupported
from ..hypervisor import agent, chain, libvirt_secret
from ..hypervisor.binding import libvirt
from ..hypervisor.block_jobs import running_job
from ..hypervisor.domain_model import Disk, Domain, Layer, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety import space, standing_freeze
from . import checkpoints
from .manifest import Point
from .plan import DiskFacts, Facts, LayerFacts
from .repository import Repository

_SECTOR = 512


def read_facts(handle: Any, repository: Repository, *, repair: bool) -> Facts:
    """The facts of one domain. ``repair``: put a checkpoint back that libvirt forgot (not in check mode)."""
    domain = read_domain(handle)
    info, problem, frozen = None, None, False
    if domain.state.running and domain.agent_configured:
        info, problem, frozen = agent.ask(handle)
    history = repository.history(domain.uuid)
    last = next((point for point in reversed(history.points) if point.checkpoint), None)
    ours = _our_checkpoints(handle, domain, repository, last, repair=repair)
    return Facts(
        domain=domain,
        disks={disk.target: facts for disk in domain.disks if (facts := read_disk(handle, domain, disk)) is not None},
        history=history,
        last=last,
        checkpoint=ours.get(last.checkpoint) if last and last.checkpoint else None,
        our_checkpoints=tuple(sorted(ours)),
        agent=info,
        agent_problem=problem,
        job=running_job(handle),
        frozen=frozen,
        frozen_whole=frozen and standing_freeze.is_whole(domain.uuid),
    )


def _our_checkpoints(
    handle: Any, domain: Domain, repository: Repository, last: Point | None, *, repair: bool
) -> dict[str, checkpoints.Checkpoint]:
    if not domain.persistent or repository.fresh:
        return {}
    ours = checkpoints.read_ours(handle, repository.checkpoint_prefix, domain.state.active)
    if not (repair and domain.state.active and last and last.checkpoint and last.checkpoint not in ours):
        return ours
    kept = os.path.join(repository.point_directory(domain.uuid, last.id), "checkpoint.xml")
    try:
        with open(kept, encoding="utf-8") as stream:
            xml = stream.read()
    except OSError:
        return ours
    if checkpoints.put_back(handle, xml):
        ours = checkpoints.read_ours(handle, repository.checkpoint_prefix, domain.state.active)
    return ours


def read_disk(handle: Any, domain: Domain, disk: Disk) -> DiskFacts | None:
    """The facts of one disk, or None where there is no readable local image."""
    if disk.active is None or disk.path is None or disk.device not in ("disk", "lun"):
        return None
    try:
        layers = tuple(_read_layer(layer) for layer in chain.chain_of(disk) if layer.path is not None)
    except (Refused, Unsupported, OSError, BadHeader):
        return None
    if not layers:
        return None
    size = layers[0].size
    if domain.state.active:
        try:
            size = int(handle.blockInfo(disk.target)[0])
        except libvirt.libvirtError:
            return None
    passphrase = libvirt_secret.value_of(handle.connect(), disk.encryption) if disk.encryption is not None else None
    return DiskFacts(disk, size, layers, passphrase)


def whole_sectors(length: int) -> int:
    """The size that QEMU gives a raw image of that length: one that ends within a sector goes on with zeros to the end of it."""
    return -(-length // _SECTOR) * _SECTOR


def _read_layer(layer: Layer) -> LayerFacts:
    path = layer.path or ""
    status = os.stat(path)
    inode = 0 if stat.S_ISBLK(status.st_mode) else status.st_ino  # a device node's changes with every boot
    allocated = space.allocated(path)
    if layer.format != "qcow2":
        return LayerFacts(path, layer.format, inode, whole_sectors(chain.virtual_size(layer) or 0), allocated)
    header = read_qcow2(path)
    data_file = chain.data_file(header)
    return LayerFacts(
        path,
        layer.format,
        inode,
        header.virtual_size,
        allocated + (space.allocated(data_file) if data_file is not None else 0),
        header.version,
        frozenset(bitmap.name for bitmap in header.bitmaps if bitmap.enabled and not bitmap.in_use),
        header.encrypted,
        data_file,
    )
