# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What makes the copies a point: their digests, the files beside them, and the manifest that names all of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import InvalidInput
from ..hypervisor import definition
from ..hypervisor.connection import constant, dotted, explaining, version_triple
from ..hypervisor.domain_model import read_domain
from ..hypervisor.image_node import Image
from ..safety import places, reservation, targets
from ..safety.space import allocated
from . import checkpoints, digests, manifest, stored
from .manifest import Point, StoredDisk
from .plan import REASONS, DiskPlan, PointPlan, Request, source_layers
from .repository import History, Repository

#: An NVRAM larger than this is none.
_NVRAM_LIMIT = 64 << 20


@dataclass(frozen=True)
class Written:
    """What a run has written of one domain.

    ``directory`` is the point's in the repository, under its temporary name. ``pushed`` is where QEMU wrote a running domain's
    disks when that is elsewhere; ``pushed_images`` are those.
    """

    plan: PointPlan
    id: str
    directory: str
    pushed: str | None
    pushed_images: Mapping[str, Image]
    history: History
    level: str
    frozen_ms: int | None
    paused_ms: int | None
    checkpoint: str | None
    group: tuple[str, ...]


def complete(connection: Any, handle: Any, repository: Repository, written: Written, request: Request) -> Point:
    """Write what is missing of the point, its manifest last."""
    plan, directory = written.plan, written.directory
    # libvirt is asked first: digests take long, and a restart of libvirtd meanwhile ends the connection.
    versions = _versions(connection)
    for disk in plan.disks:  # what was set aside and is not needed is room for the files
        reservation.release(os.path.join(directory, disk.file))
    files = _write_files(handle, written)
    disks = tuple(_disk(repository, written, disk) for disk in plan.disks)
    point = Point(
        id=written.id,
        sequence=plan.sequence,
        domain=plan.domain.name,
        domain_uuid=plan.domain.uuid,
        created=manifest.parse_time(_time_of(written.id)).isoformat(timespec="seconds"),
        type=plan.type,
        reason=REASONS[plan.reason],
        parent=plan.parent,
        consistency=written.level,
        frozen_ms=written.frozen_ms,
        paused_ms=written.paused_ms,
        checkpoint=written.checkpoint,
        group=written.group,
        disks=disks,
        description=request.description or "",
        tags=dict(request.tags or {}),
        protected=request.protected,
        not_captured=tuple(part.as_result() for part in plan.capture.left_out),
        nvram=plan.domain.nvram.format if plan.domain.nvram and "nvram.fd" in files else None,
        files=files,
        versions=versions,
        stored_bytes=sum(disk.stored_bytes for disk in disks),
        changed_bytes=sum(disk.changed_bytes for disk in disks),
    )
    for entry in os.scandir(directory):
        status = entry.stat(follow_symlinks=False)
        if (status.st_uid, status.st_gid) != (0, 0) and targets.is_local(directory):
            os.chown(entry.path, 0, 0)  # a server may have made somebody else of root, and not let go
        os.chmod(entry.path, 0o600)
    places.write_json(os.path.join(directory, "manifest.json"), manifest.to_json(point))
    return point


def _disk(repository: Repository, written: Written, disk: DiskPlan) -> StoredDisk:
    path = os.path.join(written.directory, disk.file)
    pushed = written.pushed is not None
    layers = [written.pushed_images[disk.target] if pushed else Image(path, "qcow2", disk.passphrase)]
    layers += stored.images_below(repository, written.history, disk.parent, disk.target, disk.passphrase)
    extents = digests.extents_of(layers)
    own = [extent for extent in extents if extent.depth == 0]
    grown_from = disk.parent_size if disk.parent_size is not None and disk.parent_size < disk.facts.size else None
    with digests.content_of(layers, extents) as content:
        sums = digests.sums_of(content, extents, disk.facts.size, complete=disk.parent is None, grown_from=grown_from)
    digests.write_sums(os.path.join(written.directory, f"{disk.target}.sums"), sums)
    plain: Sequence[digests.Extent] = ()
    if not disk.coded:
        plain = digests.extents_of([Image(path)]) if pushed else own
    return StoredDisk(
        target=disk.target,
        type=disk.type,
        reason=REASONS[disk.reason],
        parent=disk.parent,
        virtual_size=disk.facts.size,
        stored_bytes=allocated(path),
        changed_bytes=sum(extent.length for extent in own if extent.data or disk.parent is not None),
        metadata=digests.metadata_digest(path, plain),
        source_format=disk.facts.layers[0].format,
        source=source_layers(disk.facts),
        compression=disk.compression,
        encryption=manifest.LUKS if disk.passphrase is not None else None,
        encrypted_source=disk.facts.disk.encrypted,
    )


def _write_files(handle: Any, written: Written) -> dict[str, str]:
    """Write what is beside the disks; its digests by name."""
    directory = written.directory
    contents = {"domain.xml": _definition(handle, written.plan)}
    if written.checkpoint:
        contents["checkpoint.xml"] = checkpoints.full_xml(handle, written.checkpoint)
    for file, text in contents.items():
        places.write_new(os.path.join(directory, file), text.encode())
    kept = os.path.join(written.pushed, "nvram.fd") if written.pushed is not None else None
    if kept is not None and os.path.exists(kept):
        copy_nvram(kept, os.path.join(directory, "nvram.fd"))
    if os.path.exists(os.path.join(directory, "nvram.fd")):
        contents["nvram.fd"] = ""
    return {file: digests.file_digest(os.path.join(directory, file)) for file in sorted(contents)}


def _time_of(identifier: str) -> str:
    stamp = identifier.partition("-")[0]
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}T{stamp[9:11]}:{stamp[11:13]}:{stamp[13:15]}+00:00"


def _definition(handle: Any, plan: PointPlan) -> str:
    """The definition of the next start; where that lacks a captured disk (plugged in live), the present one."""
    if plan.domain.persistent:
        inactive = read_domain(handle, inactive=True)
        if all(inactive.disk(disk.target) is not None for disk in plan.disks):
            return definition.persistent_xml(handle)
    flags = (constant("VIR_DOMAIN_XML_SECURE") or 0) | (constant("VIR_DOMAIN_XML_MIGRATABLE") or 0)
    with explaining(f"Reading the definition of domain {plan.domain.name!r}"):
        return str(handle.XMLDesc(flags))


def copy_nvram(source: str, destination: str) -> None:
    """Copy a domain's UEFI variables, if it has some yet."""
    try:
        if os.stat(source).st_size > _NVRAM_LIMIT:
            raise InvalidInput(f"{source} is too large for UEFI variables", advice="See the domain's definition")
    except FileNotFoundError:
        return  # a domain that was never started has none yet
    shutil.copyfile(source, destination)
    descriptor = os.open(destination, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions(connection: Any) -> dict[str, str]:
    return {
        "libvirt": dotted(version_triple(connection.getLibVersion())),
        "qemu": dotted(version_triple(connection.getVersion())),
        "host": str(connection.getHostname()),
    }
