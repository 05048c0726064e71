# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A repository: a directory of restore points, whose tree is the only index."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .._errors import NotFound, Refused, Unsupported, VmkeeperError
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety import locks, places
from ..safety.names import check_directory
from . import manifest
from .manifest import ID, Point, StoredDisk

FORMAT = 1
NEW = ".new-"
GONE = ".gone-"
MANIFEST = "manifest.json"
#: The manifest of a point that is being removed: it is offered no more, and newer ones are still read through it.
GOING = "going.json"

#: The ``reason`` of a disk whose older points were removed.
MERGED = "the points that it stood on were removed and merged into it"
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_LINK = re.compile(rf"\.\./({ID.pattern})/[^/]+")

#: A mounted filesystem may bring these along.
_NOT_CONTENT = ("lost+found",)


@dataclass(frozen=True)
class BrokenPoint:
    """A directory that is named like a point and cannot be read as one."""

    id: str
    problem: str


@dataclass(frozen=True)
class History:
    """All points of one domain, oldest first."""

    points: tuple[Point, ...] = ()
    broken: tuple[BrokenPoint, ...] = ()
    #: Points whose removal was begun: they are restored no more, but still hold layers of ``points``.
    going: tuple[Point, ...] = ()
    #: Ids of ``points`` whose manifests speak of points in ``going``, or of images that were merged since.
    lagging: frozenset[str] = frozenset()

    def point(self, identifier: str) -> Point | None:
        """The point with that id."""
        return next((point for point in self.points if point.id == identifier), None)

    def holder(self, identifier: str) -> Point | None:
        """The point with that id, also when it is being removed."""
        return self.point(identifier) or next((point for point in self.going if point.id == identifier), None)

    @property
    def next_sequence(self) -> int:
        """The number of the next point."""
        return max((point.sequence for point in (*self.points, *self.going)), default=0) + 1

    def children(self, identifier: str) -> list[str]:
        """The points that stand on it."""
        return [point.id for point in self.points if identifier in point.parents]

    def lineage(self, point: Point, target: str) -> list[Point]:
        """The points that hold the layers of a disk, from ``point`` down to its full.

        Raises :class:`Refused` naming the first one that is missing.
        """
        line = [point]
        while True:
            disk = line[-1].disk(target)
            if disk is None:
                raise Refused(f"Point {line[-1].id} does not hold disk {target!r}, and {line[-2].id} stands on it")
            if disk.parent is None:
                return line
            below = self.holder(disk.parent)
            if below is None or below in line:
                raise Refused(
                    f"Disk {target!r} of point {point.id} stands on point {disk.parent}, which is missing or damaged",
                    missing=disk.parent,
                )
            line.append(below)


@dataclass(frozen=True)
class Repository:
    """An opened repository. ``fresh``: it has no repository.json yet (check mode, before the first point)."""

    path: str
    uuid: str
    fresh: bool = False

    @property
    def short(self) -> str:
        """Eight characters that tell it from others, in names of checkpoints."""
        return self.uuid.replace("-", "")[:8]

    def checkpoint_name(self, identifier: str) -> str:
        """The libvirt checkpoint of a point."""
        return f"{self.checkpoint_prefix}{identifier}"

    @property
    def checkpoint_prefix(self) -> str:
        """What the names of all its checkpoints begin with."""
        return f"vmk-{self.short}-"

    def domain_directory(self, domain_uuid: str) -> str:
        """Where the points of a domain lie."""
        return os.path.join(self.path, domain_uuid)

    def point_directory(self, domain_uuid: str, identifier: str) -> str:
        """Where a point lies."""
        return os.path.join(self.path, domain_uuid, identifier)

    def new_directory(self, domain_uuid: str, identifier: str) -> str:
        """Where a point is made: at the same depth, so that its relative links hold before and after."""
        return os.path.join(self.path, domain_uuid, NEW + identifier)

    def domain_uuids(self) -> list[str]:
        """The domains that have a directory here."""
        return sorted(name for name in os.listdir(self.path) if _UUID.fullmatch(name))

    def history(self, domain_uuid: str) -> History:
        """Read the points of a domain; one that cannot be read does not hide the others."""
        directory = self.domain_directory(domain_uuid)
        try:
            names = sorted(name for name in os.listdir(directory) if ID.fullmatch(name))
        except FileNotFoundError:
            return History()
        points: list[Point] = []
        going: list[Point] = []
        broken = []
        for name in names:
            where = os.path.join(directory, name, MANIFEST)
            leaving = os.path.join(directory, name, GOING)
            is_going = not os.path.lexists(where) and os.path.lexists(leaving)
            try:
                (going if is_going else points).append(_read_point(leaving if is_going else where, name, domain_uuid))
            except VmkeeperError as error:
                broken.append(BrokenPoint(name, error.problem))
            except (OSError, ValueError) as error:
                broken.append(BrokenPoint(name, f"{where} cannot be read: {error}"))
        points.sort(key=lambda point: point.sequence)
        going.sort(key=lambda point: point.sequence)
        history = History(tuple(points), tuple(broken), tuple(going))
        return _as_it_lies(directory, history) if going else history

    def grounds(self, domain_uuid: str, broken: Sequence[BrokenPoint]) -> dict[str, list[str]]:
        """Id -> the unreadable points whose images' headers say that they stand on it."""
        found: dict[str, list[str]] = {}
        for one in broken:
            directory = self.point_directory(domain_uuid, one.id)
            for name in sorted(os.listdir(directory)):
                with contextlib.suppress(OSError, BadHeader):
                    link = _LINK.fullmatch(read_qcow2(os.path.join(directory, name)).backing_file or "")
                    if link is not None and one.id not in found.setdefault(link[1], []):
                        found[link[1]].append(one.id)
        return found

    @contextlib.contextmanager
    def locked(self, domain_uuid: str, operation: str, *, shared: bool = False) -> Iterator[None]:
        """Hold the lock of a domain's points here: shared to read them, alone to add or remove some."""
        key = f"chain-{self.uuid}-{domain_uuid}"
        with locks.hold([(key, f"set of restore points in {self.path}")], operation, shared=shared):
            yield


def _read_point(where: str, name: str, domain_uuid: str) -> Point:
    content = places.read_json(where)
    if content is None:
        raise Refused(f"{where} is missing")
    point = manifest.from_json(content, where)
    if point.id != name or point.domain_uuid != domain_uuid:
        raise Refused(f"{where} belongs to point {point.id} of domain {point.domain_uuid}")
    return point


def _as_it_lies(directory: str, history: History) -> History:
    """A removal that was interrupted: what the manifests say of merged images is older than the images' headers.

    So every point is read right at each step of a removal, also where nobody may write to finish it, and where the next
    removal takes in points that the first had not yet described.
    """
    going = {point.id: point for point in history.going}
    lagging = frozenset(point.id for point in history.points if point.parents & going.keys())

    def as_it_lies(point: Point) -> Point:
        return point.with_disks(_disk_as_it_lies(directory, point, disk, going) for disk in point.disks)

    points = (as_it_lies(point) if point.id in lagging else point for point in history.points)
    leaving = (
        point.with_disks(_grown(directory, point, disk) for disk in point.disks)
        for point in map(as_it_lies, history.going)
    )
    return History(tuple(points), history.broken, tuple(leaving), lagging)


def _disk_as_it_lies(directory: str, point: Point, disk: StoredDisk, going: Mapping[str, Point]) -> StoredDisk:
    """``going`` as their manifests say it, which together name all that the image ever stood on."""
    if disk.parent not in going:
        return disk
    try:
        header = read_qcow2(os.path.join(directory, point.id, disk.file))
    except (OSError, BadHeader):
        return disk
    layers, ground = [disk], disk.parent
    while header.backing_file != disk.link(ground):
        below = going[ground].disk(disk.target) if ground is not None and ground in going else None
        if below is None or below in layers:
            ground = disk.parent  # a link to anywhere else is left for the checks to find
            break
        layers.append(below)
        ground = below.parent
    if ground == disk.parent:
        return replace(disk, metadata=None)  # its tables may have been written to
    compressed = any(layer.compression is not None for layer in layers)
    return replace(
        disk,
        type="incremental" if ground else "full",
        reason=MERGED,
        parent=ground,
        metadata=None,
        # An image has one way of compressing; that of the file which took this one's place holds.
        compression=header.compression if compressed else None,
    )


def _grown(directory: str, point: Point, disk: StoredDisk) -> StoredDisk:
    """A newer disk, which may be larger, is perhaps partly merged into this image."""
    with contextlib.suppress(OSError, BadHeader):
        size = read_qcow2(os.path.join(directory, point.id, disk.file)).virtual_size
        return replace(disk, virtual_size=max(size, disk.virtual_size), metadata=None)
    return disk


def open_repository(path: str, *, create: bool = False, check: bool = False) -> Repository:
    """Open the repository in a directory of the hypervisor.

    ``create`` makes one of an empty directory (with ``check`` it only says that it could); anything else that is not a
    repository is refused, so that a wrong or unmounted path does not become one by accident.
    """
    directory = check_directory(path, "repository")
    marker = os.path.join(directory, "repository.json")
    try:
        content = places.read_json(marker)
    except (ValueError, OSError) as error:
        raise Refused(f"{marker} cannot be read: {error}", advice="Repair it from a copy of the repository") from error
    if create and os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise Refused(f"The repository {directory} is mounted read-only", advice="Mount it writable")
    if content is not None:
        return _opened(directory, marker, content)
    if not create:
        raise NotFound(
            f"{directory} is not a repository: it has no repository.json",
            advice="Look whether the right filesystem is mounted there; the first backup makes a repository",
        )
    others = [name for name in os.listdir(directory) if name not in _NOT_CONTENT and not name.startswith(".")]
    # Another task may have made the repository since its marker was looked for; it is looked at again below.
    if others and not os.path.exists(marker):
        raise Refused(
            f"{directory} is no repository and not empty ({', '.join(sorted(others)[:3])})",
            advice="Give an empty directory, or the directory of an existing repository",
        )
    fresh = Repository(directory, str(uuids.uuid4()), fresh=True)
    if not check:
        try:
            written = places.write_json_once(marker, {"format": FORMAT, "uuid": fresh.uuid})
        except OSError as error:
            raise Refused(f"{directory} cannot be written: {error}", advice="See its mount and permissions") from error
        return _opened(directory, marker, written)
    return fresh


def is_there(path: str, uuid: str) -> bool:
    """Whether that very repository lies at ``path`` now; where it is not mounted, there is an empty directory, or another one."""
    try:
        content = places.read_json(os.path.join(path, "repository.json"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("uuid") == uuid


def _opened(directory: str, marker: str, content: object) -> Repository:
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise Refused(f"{marker} is damaged", advice="Repair it from a copy of the repository")
    if content["format"] > FORMAT:
        raise Unsupported(
            f"The repository {directory} has format {content['format']}, made by a newer version",
            advice="Use that version or a later one",
            format=content["format"],
        )
    if not _UUID.fullmatch(str(content.get("uuid"))):
        raise Refused(f"{marker} is damaged: it has no UUID", advice="Repair it from a copy of the repository")
    return Repository(directory, content["uuid"])


def new_id(taken: Sequence[str] = ()) -> str:
    """An id for a point that is cut now."""
    while True:
        identifier = f"{manifest.now_utc():%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        if identifier not in taken:
            return identifier


def make_domain_directory(repository: Repository, domain_uuid: str) -> str:
    """The directory of a domain's points: QEMU passes through it, nobody else can list it."""
    directory = repository.domain_directory(domain_uuid)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o711)
        os.chmod(directory, 0o711)
        places.fsync_directory(repository.path)
    return directory


def discard(directory: str) -> None:
    """Remove a directory of a point that is not (or no longer) one, and make that durable."""
    if os.path.isdir(directory):
        shutil.rmtree(directory)
        places.fsync_directory(os.path.dirname(directory))


def put_away(repository: Repository, domain_uuid: str, identifier: str) -> None:
    """Remove a point's directory: one rename ends it, what an interruption leaves after that is swept."""
    gone = os.path.join(repository.domain_directory(domain_uuid), GONE + identifier)
    os.rename(repository.point_directory(domain_uuid, identifier), gone)
    places.fsync_directory(repository.domain_directory(domain_uuid))
    discard(gone)


def sweep(repository: Repository, domain_uuid: str) -> None:
    """Finish removals that were interrupted. Call it with the lock of the domain's points held alone."""
    directory = repository.domain_directory(domain_uuid)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            if name.startswith(GONE):
                discard(os.path.join(directory, name))
