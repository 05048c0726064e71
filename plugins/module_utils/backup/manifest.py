# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The manifest of a restore point: what is stored, of what, how consistent, standing on what. Schema: docs/repository-format.md."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .._errors import Refused, Unsupported

FORMAT = 1

#: An id sorts by time for people; ``parent`` and ``sequence`` are the truth, since clocks lie.
ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{4}")
_TARGET = re.compile(r"[A-Za-z0-9]{1,32}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

#: ``StoredDisk.encryption`` of a disk that is encrypted; qcow2 knows no other format that is worth its name.
LUKS: Mapping[str, str] = {"format": "luks"}
COMPRESSIONS = ("zstd", "zlib")


@dataclass(frozen=True)
class SourceLayer:
    """One image of the source's chain at the instant, topmost first. ``size`` is its virtual size in bytes."""

    path: str
    format: str | None
    inode: int
    size: int


@dataclass(frozen=True)
class StoredDisk:
    """One disk of a point, sizes in bytes.

    ``parent`` is the id of the point whose file of the same name this one stands on; None for a full.  ``metadata`` is
    the SHA-256 of all bytes of the file that are not guest data stored as it is (None once the file was folded): where
    the file is compressed or encrypted, of all its bytes.  ``encrypted_source``: the guest's own disk was encrypted.
    """

    target: str
    type: str
    reason: str
    parent: str | None
    virtual_size: int
    stored_bytes: int
    changed_bytes: int
    metadata: str | None = None
    source_format: str | None = None
    source: tuple[SourceLayer, ...] = ()
    compression: str | None = None
    encryption: Mapping[str, str] | None = None
    encrypted_source: bool = False

    @property
    def coded(self) -> bool:
        """Whether its file holds guest data otherwise than as it is."""
        return self.compression is not None or self.encryption is not None

    @property
    def file(self) -> str:
        """Name of the image in the point's directory."""
        return f"{self.target}.qcow2"

    def link(self, ground: str | None) -> str | None:
        """The backing file of an image that stands on the point ``ground``, as its header says it; None for a full."""
        return f"../{ground}/{self.file}" if ground else None

    @property
    def sums(self) -> str:
        """Name of the sidecar with the digests of the guest's content."""
        return f"{self.target}.sums"


@dataclass(frozen=True)
class Point:
    """A restore point. ``files`` maps the names of the other files to their SHA-256; times are ISO 8601 in UTC."""

    id: str
    sequence: int
    domain: str
    domain_uuid: str
    created: str
    type: str
    reason: str
    parent: str | None
    consistency: str
    disks: tuple[StoredDisk, ...]
    frozen_ms: int | None = None
    paused_ms: int | None = None
    checkpoint: str | None = None
    group: tuple[str, ...] = ()
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    protected: bool = False
    not_captured: tuple[Mapping[str, str], ...] = ()
    nvram: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    stored_bytes: int = 0
    changed_bytes: int = 0

    def disk(self, target: str) -> StoredDisk | None:
        """The disk with that target, if the point holds it."""
        return next((disk for disk in self.disks if disk.target == target), None)

    @property
    def parents(self) -> frozenset[str]:
        """The points that any of its disks stands on."""
        return frozenset(disk.parent for disk in self.disks if disk.parent)

    def with_disks(self, disks: Iterable[StoredDisk]) -> Point:
        """The same point with its disks stored otherwise: its type, parent and sizes follow."""
        stored = tuple(disks)
        parents = {disk.parent for disk in stored if disk.parent}
        before = {disk.target: disk.parent for disk in self.disks}
        moved = [disk.reason for disk in stored if disk.parent != before.get(disk.target)]
        return replace(
            self,
            disks=stored,
            type="incremental" if parents else "full",
            parent=self.parent if self.parent in parents else max(parents, default=None),
            reason=moved[0] if moved and not parents else self.reason,
            stored_bytes=sum(disk.stored_bytes for disk in stored),
            changed_bytes=sum(disk.changed_bytes for disk in stored),
        )

    @property
    def created_at(self) -> datetime.datetime:
        """When it was cut."""
        return parse_time(self.created)

    def as_result(self) -> dict[str, Any]:
        """The ``restore_point`` of a module's result."""
        return {
            "id": self.id,
            "sequence": self.sequence,
            "domain": self.domain,
            "domain_uuid": self.domain_uuid,
            "created": self.created,
            "type": self.type,
            "reason": self.reason,
            "parent": self.parent,
            "consistency": self.consistency,
            "frozen_ms": self.frozen_ms,
            "paused_ms": self.paused_ms,
            "checkpoint": self.checkpoint,
            "group": list(self.group),
            "description": self.description,
            "tags": dict(self.tags),
            "protected": self.protected,
            "nvram": self.nvram is not None,
            "stored_bytes": self.stored_bytes,
            "changed_bytes": self.changed_bytes,
            "disks": [
                {
                    "target": disk.target,
                    "type": disk.type,
                    "reason": disk.reason,
                    "parent": disk.parent,
                    "virtual_size": disk.virtual_size,
                    "stored_bytes": disk.stored_bytes,
                    "changed_bytes": disk.changed_bytes,
                    "file": disk.file,
                    "compression": disk.compression,
                    "encryption": dict(disk.encryption) if disk.encryption else None,
                }
                for disk in self.disks
            ],
            "not_captured": [dict(part) for part in self.not_captured],
        }


def now_utc() -> datetime.datetime:
    """The host's clock."""
    return datetime.datetime.now(datetime.timezone.utc)


def parse_time(text: str) -> datetime.datetime:
    """An ISO 8601 time with zone; raises ValueError."""
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment


def to_json(point: Point) -> dict[str, Any]:
    """What is written: the fields, and a digest over them that a flipped byte betrays."""
    content = {"format": FORMAT, **asdict(point)}
    return {**content, "digest": _digest(content)}


def from_json(content: Any, where: str) -> Point:
    """A manifest that was read; ``where`` names the file in errors.

    Raises :class:`Unsupported` for a newer format and :class:`Refused` for one that is damaged: every name in it becomes
    a path, so none is taken as it comes.
    """
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise _damaged(where, "it is not a manifest")
    if content["format"] > FORMAT:
        raise Unsupported(
            f"{where} has format {content['format']}, written by a newer version",
            advice="Use that version or a later one",
            format=content["format"],
        )
    fields = {key: value for key, value in content.items() if key not in ("format", "digest")}
    if content.get("digest") != _digest({"format": content["format"], **fields}):
        raise _damaged(where, "its digest does not match its content")
    try:
        disks = tuple(
            StoredDisk(**{**disk, "source": tuple(SourceLayer(**layer) for layer in disk["source"])})
            for disk in fields.pop("disks")
        )
        point = Point(disks=disks, **fields)
        _check_names(point)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise _damaged(where, str(error)) from error
    return replace(point, group=tuple(point.group), not_captured=tuple(point.not_captured))


def _check_names(point: Point) -> None:
    parse_time(point.created)
    if not _UUID.fullmatch(point.domain_uuid):
        raise ValueError("the domain's UUID is none")
    for identifier in (point.id, *([point.parent] if point.parent else ()), *point.parents):
        if not ID.fullmatch(identifier):
            raise ValueError(f"{identifier!r} is not the id of a point")
    for disk in point.disks:
        if not _TARGET.fullmatch(disk.target):
            raise ValueError(f"{disk.target!r} is not the target of a disk")
        if (disk.type == "incremental") != (disk.parent is not None):
            raise ValueError(f"disk {disk.target} is {disk.type} with parent {disk.parent}")
        if disk.compression not in (None, *COMPRESSIONS):
            raise ValueError(f"the compression of disk {disk.target} is unknown")
        if disk.encryption not in (None, LUKS):
            raise ValueError(f"the encryption of disk {disk.target} is unknown")
    if point.nvram not in (None, "raw", "qcow2"):
        raise ValueError("the format of its NVRAM is unknown")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(where: str, why: str) -> Refused:
    return Refused(
        f"{where} is damaged: {why}",
        advice="Restore another point, or read the images by hand (docs/repository-format.md)",
    )


def newest_first(points: Sequence[Point]) -> list[Point]:
    """By sequence, the last one made first."""
    return sorted(points, key=lambda point: point.sequence, reverse=True)
