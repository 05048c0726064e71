# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots as libvirt knows them, with our labels, as frozen dataclasses parsed from the snapshot XML."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from xml.etree import ElementTree

from .._errors import UNCHANGED, VmkeeperError
from ..hypervisor import chain
from ..hypervisor.connection import constant, explaining
from ..hypervisor.definition import with_layers
from ..hypervisor.domain_model import Layer, parse_disk, volume_path
from ..safety.checkpoints_aside import set_aside

#: Our element in the ``<metadata>`` of the domain definition that libvirt keeps inside each snapshot.  The metadata of
#: the domain itself would die with its next define.
NAMESPACE = "urn:vmkeeper:libvirt:snapshot:1"
_ENDED = ".ended"
_LABEL = f"{{{NAMESPACE}}}snapshot"


@dataclass(frozen=True)
class Labels:
    """What libvirt has no field for. ``frozen_ms`` and ``paused_ms`` are None when nothing was frozen or paused."""

    consistency: str
    frozen_ms: int | None = None
    paused_ms: int | None = None
    mode_reason: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    not_captured: tuple[Mapping[str, str], ...] = ()
    protected: bool = False
    #: The copy of the UEFI variables of that moment, where it holds them.
    nvram: str | None = None
    #: Its layers are being merged: what it held may be overwritten already, so nothing may go back to it.
    ending: bool = False

    def to_text(self) -> str:
        """As stored."""
        return json.dumps(
            {
                "format": 1,
                "consistency": self.consistency,
                "frozen_ms": self.frozen_ms,
                "paused_ms": self.paused_ms,
                "mode_reason": self.mode_reason,
                "tags": dict(self.tags),
                "not_captured": [dict(part) for part in self.not_captured],
                "protected": self.protected,
                "nvram": self.nvram,
                "ending": self.ending,
            },
            sort_keys=True,
        )

    @classmethod
    def from_text(cls, text: str) -> Labels | None:
        """The stored labels, or None when they cannot be understood."""
        try:
            content = json.loads(text)
            return cls(
                consistency=content["consistency"],
                frozen_ms=content["frozen_ms"],
                paused_ms=content["paused_ms"],
                mode_reason=content.get("mode_reason", ""),
                tags=content.get("tags", {}),
                not_captured=tuple(content.get("not_captured", ())),
                protected=bool(content.get("protected", False)),
                nvram=content.get("nvram"),
                ending=bool(content.get("ending", False)),
            )
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class SnapshotDisk:
    """One disk of a snapshot: ``base`` holds the snapshot's content, ``overlay`` what was written after it."""

    target: str
    mode: str
    base: str | None
    base_format: str | None
    overlay: str | None


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of one domain. ``created`` is in UTC; ``state`` is libvirt's (``running``, ``disk-snapshot``, ...)."""

    name: str
    created: datetime.datetime
    state: str
    disks: tuple[SnapshotDisk, ...]
    parent: str | None = None
    current: bool = False
    description: str = ""
    memory_mode: str = "no"
    memory_file: str | None = None
    labels: Labels | None = None

    @property
    def mode(self) -> str:
        """``internal`` if anything lies inside an image, else ``external``."""
        internal = self.memory_mode == "internal" or any(disk.mode == "internal" for disk in self.disks)
        return "internal" if internal else "external"

    @property
    def captured(self) -> tuple[SnapshotDisk, ...]:
        """The disks that it holds."""
        return tuple(disk for disk in self.disks if disk.mode in ("internal", "external", "manual"))

    @property
    def nvram(self) -> str | None:
        """The copy of the UEFI variables that it holds."""
        return self.labels.nvram if self.labels is not None else None

    @property
    def side_files(self) -> tuple[str, ...]:
        """What it holds beside layers: the memory and the UEFI variables."""
        return tuple(path for path in (self.memory_file, self.nvram) if path)

    @property
    def consistency(self) -> str:
        """The level that was recorded, else the most that libvirt's state allows to say."""
        if self.labels is not None:
            return self.labels.consistency
        if self.memory_mode in ("internal", "external") and self.state in ("running", "paused"):
            return "memory"
        return "crash"  # libvirt says shutoff of a destroyed guest too

    def as_result(self, domain: str) -> dict[str, Any]:
        """The ``snapshot`` of a module's result (DESIGN: public interface)."""
        labels = self.labels
        return {
            "name": self.name,
            "domain": domain,
            "mode": self.mode,
            "mode_reason": labels.mode_reason if labels else "",
            "consistency": self.consistency,
            "frozen_ms": labels.frozen_ms if labels else None,
            "paused_ms": labels.paused_ms if labels else None,
            "created": self.created.isoformat(timespec="seconds"),
            "description": self.description,
            "tags": dict(labels.tags) if labels else {},
            "protected": labels.protected if labels else False,
            "disks": [
                {
                    "target": disk.target,
                    "mode": disk.mode,
                    "base": disk.base,
                    "base_format": disk.base_format,
                    "overlay": disk.overlay,
                }
                for disk in self.captured
            ],
            "memory": self.memory_file
            if self.memory_mode == "external"
            else (True if self.memory_mode == "internal" else None),
            "nvram": self.nvram,
            "not_captured": [dict(part) for part in labels.not_captured] if labels else [],
            "parent": self.parent,
            "current": self.current,
        }


def parse_snapshot(xml: str, *, current: bool = False) -> Snapshot:
    """A snapshot from ``virDomainSnapshotGetXMLDesc`` (https://libvirt.org/formatsnapshot.html)."""
    root = ElementTree.fromstring(xml)
    memory = root.find("memory")
    bases = {}
    for element in root.iterfind("domain/devices/disk"):
        disk = parse_disk(element)
        bases[disk.target] = disk
    disks = []
    for element in root.iterfind("disks/disk"):
        target = element.get("name", "")
        source = element.find("source")
        base = bases.get(target)
        overlay = (source.get("file") or source.get("dev")) if source is not None else None
        disks.append(
            SnapshotDisk(
                target=target,
                mode=element.get("snapshot", "no"),
                base=base.path if base else None,
                base_format=base.format if base else None,
                overlay=overlay
                if element.get("snapshot") == "external" and not (overlay or "").endswith(_ENDED)
                else None,
            )
        )
    label = root.find(f"domain/metadata/{_LABEL}")
    return Snapshot(
        name=root.findtext("name", ""),
        created=datetime.datetime.fromtimestamp(int(root.findtext("creationTime", "0")), datetime.timezone.utc),
        state=root.findtext("state", ""),
        disks=tuple(disks),
        parent=root.findtext("parent/name"),
        current=current,
        description=root.findtext("description", ""),
        memory_mode=memory.get("snapshot", "no") if memory is not None else "no",
        memory_file=memory.get("file") if memory is not None else None,
        labels=Labels.from_text(label.text or "") if label is not None else None,
    )


def with_labels(xml: str, labels: Labels, *, description: str | None = None) -> str:
    """The snapshot XML with our labels in it (and another description, if one is given), for a REDEFINE."""
    ElementTree.register_namespace("vmkeeper", NAMESPACE)
    root = ElementTree.fromstring(xml)
    domain = root.find("domain")
    if domain is not None:
        metadata = domain.find("metadata")
        if metadata is None:
            metadata = ElementTree.SubElement(domain, "metadata")
        for old in metadata.findall(_LABEL):
            metadata.remove(old)
        ElementTree.SubElement(metadata, _LABEL).text = labels.to_text()
    if description is not None:
        element = root.find("description")
        if element is None:
            element = ElementTree.Element("description")
            root.insert(1, element)
        element.text = description
    return ElementTree.tostring(root, encoding="unicode")


def with_ending(xml: str, ending: bool) -> str:
    """The snapshot XML of one that is being removed, or is no longer, for a REDEFINE.

    Removing the record of an external snapshot, libvirt 9.0 tells every child that its content lies where this one's did, as if
    its overlay had been merged.  It finds them by the overlay's path, so that is made one which nothing has.
    """
    root = ElementTree.fromstring(xml)
    for source in root.iterfind("disks/disk[@snapshot='external']/source"):
        for attribute in ("file", "dev"):
            path = source.get(attribute)
            if path is not None:
                plain = path.removesuffix(_ENDED)
                source.set(attribute, plain + _ENDED if ending else plain)
    ElementTree.register_namespace("vmkeeper", NAMESPACE)
    return ElementTree.tostring(root, encoding="unicode")


def with_base(xml: str, target: str, layer: Layer) -> str:
    """The snapshot XML with the content of one disk lying in another image, for a REDEFINE."""
    ElementTree.register_namespace("vmkeeper", NAMESPACE)
    root = ElementTree.fromstring(xml)
    for tag in ("domain", "inactiveDomain"):
        domain = root.find(tag)
        if domain is not None:
            with_layers(domain, {target: layer})
    return ElementTree.tostring(root, encoding="unicode")


def _flags(*names: str) -> int:
    return sum(constant(name, 0) or 0 for name in names)


def read_snapshot(snapshot: Any) -> Snapshot:
    """Read one libvirt snapshot."""
    with explaining("Reading a snapshot"):
        xml = snapshot.getXMLDesc(0)
        parsed = parse_snapshot(xml, current=bool(snapshot.isCurrent()))
    return replace(parsed, disks=tuple(_with_base(disk, xml, snapshot) for disk in parsed.disks))


def _with_base(disk: SnapshotDisk, xml: str, snapshot: Any) -> SnapshotDisk:
    """A disk in a storage pool is recorded by the names of pool and volume: its overlay knows the path, pool or no pool, and
    where a revert has discarded that overlay, the pool does."""
    if disk.base is not None or disk.overlay is None:
        return disk
    try:
        layers = chain.follow(Layer(disk.overlay, "qcow2"))
    except VmkeeperError:
        layers = ()
    base = layers[1].path if len(layers) > 1 else _path_of_volume(disk.target, xml, snapshot)
    return replace(disk, base=base) if base is not None else disk


def _path_of_volume(target: str, xml: str, snapshot: Any) -> str | None:
    """Where the volume that the snapshot's definition names for a disk lies; None when its pool does not say."""
    source = ElementTree.fromstring(xml).find(f"domain/devices/disk/target[@dev='{target}']/../source")
    pool, volume = (source.get("pool"), source.get("volume")) if source is not None else (None, None)
    return volume_path(snapshot.getConnect(), pool, volume) if pool and volume else None


def read_snapshots(domain: Any) -> tuple[Snapshot, ...]:
    """All snapshots of a domain, parents before children."""
    with explaining(f"Reading the snapshots of domain {domain.name()!r}"):
        return tuple(
            read_snapshot(snapshot)
            for snapshot in domain.listAllSnapshots(_flags("VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL"))
        )


def write_labels(
    domain: Any, name: str, labels: Labels, *, description: str | None = None, state: str = UNCHANGED
) -> None:
    """Store labels in a snapshot; fetched with its secrets, so that none is lost, and left current if it was."""
    with explaining(f"Labelling the snapshot {name!r} of domain {domain.name()!r}", state=state):
        snapshot = domain.snapshotLookupByName(name)
        xml = with_labels(
            snapshot.getXMLDesc(_flags("VIR_DOMAIN_SNAPSHOT_XML_SECURE")), labels, description=description
        )
        xml = with_ending(xml, labels.ending)
        flags = _flags("VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE")
        if snapshot.isCurrent():
            flags |= _flags("VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT")
        with set_aside(domain):
            domain.snapshotCreateXML(xml, flags)


def by_name(snapshots: Sequence[Snapshot], name: str) -> Snapshot | None:
    """The snapshot of that name."""
    return next((snapshot for snapshot in snapshots if snapshot.name == name), None)
