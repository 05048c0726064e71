# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which image of this host stands on which, and who reads each: the answer to "may this layer be written, or deleted?".

A layer is written only by its one rightful writer, and deleted only when nobody mentions it.  Mentioned means: named by a
live or inactive definition, by a managed-save image, as the content of a snapshot, as the backing file of any image that
lies beside it or in a storage pool, or open in a process.

A file has as many names as there are hard links and bind mounts, so files are compared and not names.  A backing name that
:mod:`..hypervisor.chain` does not understand counts as a reader of each local file that it mentions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from xml.etree import ElementTree

from .._errors import LibvirtFailed, VmkeeperError
from ..hypervisor import chain
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import explaining, is_gone
from ..hypervisor.domain_model import Disk, Layer, parse_disk, read_domain, resolve_volume, volume_path
from ..hypervisor.image_header import BadHeader, is_qcow2, read_qcow2
from . import views

#: Files of one directory that are looked at; a directory with more is no place for images.
_MOST_FILES = 20_000

#: Stands for the device and inode of a file that is not there; none has these.
_NO_FILE = (0, 0)


@dataclass(frozen=True)
class Reader:
    """Who names an image. ``kind`` is domain, saved, job, snapshot, file or process; ``uuid`` the domain it belongs to."""

    kind: str
    name: str
    uuid: str | None = None
    domain: str | None = None

    def __str__(self) -> str:
        if self.kind == "domain":
            return f"domain {self.name!r}"
        if self.kind == "job":
            return f"a block job of domain {self.name!r}"
        if self.kind == "saved":
            return f"the saved state of domain {self.name!r}"
        if self.kind == "snapshot":
            return f"snapshot {self.name!r} of domain {self.domain!r}"
        return f"the image {self.name}" if self.kind == "file" else f"process {self.name}"

    def as_result(self) -> dict[str, Any]:
        """``{kind, name, domain}`` for a module's result."""
        return {"kind": self.kind, "name": self.name, "domain": self.domain or self.name if self.uuid else None}


@dataclass(frozen=True)
class HostGraph:
    """All images that were found. Paths are canonical (:func:`canonical`).

    ``named``: path -> who names it directly.  ``below``: path -> its backing file, for every image that has one.
    ``files``: device and inode -> the paths in ``named`` and ``below`` that lead to it.
    """

    named: Mapping[str, tuple[Reader, ...]] = field(default_factory=dict)
    below: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)

    def names(self, path: str) -> tuple[str, ...]:
        """``path`` and the other names by which this graph knows the same file."""
        path = canonical(path)
        return tuple(dict.fromkeys((path, *self.files.get(_file(path), ()))))

    def chain(self, path: str) -> tuple[str, ...]:
        """``path`` and everything below it."""
        layers = [canonical(path)]
        while True:
            base = next((self.below[name] for name in self.names(layers[-1]) if name in self.below), None)
            if base is None or base in layers:
                return tuple(layers)
            layers.append(base)

    def children(self, path: str) -> tuple[str, ...]:
        """The images that stand directly on ``path``."""
        names = self.names(path)
        return tuple(sorted(child for child, base in self.below.items() if base in names))

    def above(self, path: str) -> tuple[str, ...]:
        """``path`` and every image that stands on it, at whatever distance."""
        found = [canonical(path)]
        for layer in found:
            found += [child for child in self.children(layer) if child not in found]
        return tuple(found)

    def readers(self, path: str) -> tuple[Reader, ...]:
        """Everybody whose content is read from ``path``; an image that nobody names stands for itself."""
        found: dict[Reader, None] = {}
        for layer in self.above(path):
            for reader in self.named_by(layer):
                found[reader] = None
            if layer != canonical(path) and not self.children(layer) and not self.named.get(layer):
                found[Reader("file", layer)] = None
        return tuple(found)

    def named_by(self, path: str) -> tuple[Reader, ...]:
        """Who names the file at ``path`` itself."""
        return tuple(dict.fromkeys(reader for name in self.names(path) for reader in self.named.get(name, ())))

    def strangers(self, path: str, uuid: str) -> tuple[Reader, ...]:
        """The readers of ``path`` that do not belong to the domain with that UUID."""
        return tuple(reader for reader in self.readers(path) if reader.uuid != uuid)

    def without(self, readers: Iterable[Reader]) -> HostGraph:
        """The graph as it will be when these readers are gone."""
        gone = set(readers)
        kept = {path: tuple(one for one in by if one not in gone) for path, by in self.named.items()}
        return replace(self, named={path: by for path, by in kept.items() if by})

    def without_files(self, paths: Iterable[str]) -> HostGraph:
        """The graph as it will be when these files are deleted."""
        gone = {canonical(path) for path in paths}
        return replace(self, below={path: base for path, base in self.below.items() if path not in gone})


def canonical(path: str) -> str:
    """One name for one file, whatever symbolic links lead to it, or whichever view shows it."""
    return views.origin_of(os.path.realpath(path))


def _file(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return _NO_FILE
    return status.st_dev, status.st_ino


def unneeded(graph: HostGraph, candidates: Sequence[str]) -> tuple[str, ...]:
    """Those overlays among ``candidates`` that nobody reads, from the top down. Pure.

    An image without a backing file is never among them: it is somebody's disk, not a layer that was put over one.
    """
    gone: list[str] = []
    progress = True
    while progress:
        progress = False
        for path in candidates:
            real = canonical(path)
            if real in gone or real not in graph.below:
                continue
            if not graph.named_by(real) and not graph.children(real):
                gone.append(real)
                graph = graph.without_files([real])
                progress = True
    return tuple(gone)


# --- reading it ------------------------------------------------------------------------------------------------------


class _Collector:
    """Gathers names and links; broken chains are kept as far as they can be read."""

    def __init__(self) -> None:
        self.named: dict[str, list[Reader]] = {}
        self.below: dict[str, str] = {}
        self.raw: set[str] = set()
        self.directories: set[str] = set()
        self.files: dict[tuple[int, int], list[str]] = {}
        self._known: set[str] = set()
        self._unlinked: dict[tuple[str, str | None], tuple[Layer, ...]] = {}

    def name(self, path: str, reader: Reader) -> None:
        path = canonical(path)
        self._know(path)
        readers = self.named.setdefault(path, [])
        if reader not in readers:
            readers.append(reader)

    def disk(self, disk: Disk, reader: Reader, *, live: bool = False) -> None:
        """``live``: the chain in the XML is what QEMU uses now; one in any other XML may be long out of date."""
        if disk.path is None or disk.active is None:
            return
        self.name(disk.path, reader)
        if disk.active.format == "raw":
            self.raw.add(canonical(disk.path))
        self.image(disk.active, reader)
        if live:
            self.links(disk.chain)
        if disk.job is not None and disk.job.destination:
            # Written already, by the very job that may be taken up.
            self.name(disk.job.destination, Reader("job", reader.name, reader.uuid))

    def image(self, top: Layer, reader: Reader) -> None:
        """What ``top`` stands on. Where ``below`` has no place for it, ``reader`` names it."""
        key = (str(top.path), top.format)
        if key not in self._unlinked:
            layers = follow_names(top)
            self.links(layers)
            # A relative name means another file where the image is opened by way of a link that lies elsewhere.
            others = [
                lower
                for upper, lower in zip(layers, layers[1:])
                if self.below[canonical(str(upper.path))] != canonical(str(lower.path))
            ]
            self._unlinked[key] = (*others, *chain.mentioned(layers[-1]))
        for layer in self._unlinked[key]:
            if layer.path is not None and reader not in self.named.get(canonical(layer.path), ()):
                self.name(layer.path, reader)
                self.image(layer, reader)

    def links(self, layers: Sequence[Layer]) -> None:
        paths = [canonical(layer.path) for layer in layers if layer.path]
        for path in paths:
            self._know(path)
        for upper, lower in zip(paths, paths[1:]):
            self.below.setdefault(upper, lower)
        self.directories.update(os.path.dirname(path) for path in paths if not path.startswith("/dev/"))

    def scan(self, directory: str) -> None:
        """Links of every qcow2 image in a directory, also of those that no definition names."""
        try:
            names = sorted(os.listdir(directory))[:_MOST_FILES]
        except OSError:
            return
        for name in names:
            path = canonical(os.path.join(directory, name))
            # A guest that owns a raw disk can write any header into it.
            if path in self.below or path in self.raw or (path, "qcow2") in self._unlinked or not os.path.isfile(path):
                continue
            with contextlib.suppress(OSError, BadHeader):
                if is_qcow2(path) and read_qcow2(path).backing_file is not None and not self._is_known(path):
                    self.image(Layer(path, "qcow2"), Reader("file", path))

    def _know(self, path: str) -> None:
        if path not in self._known:
            self._known.add(path)
            self.files.setdefault(_file(path), []).append(path)

    def _is_known(self, path: str) -> bool:
        """By another name: as a guest's raw disk, or as an image that is mounted twice. A second link is an image of its own."""
        names = self.files.get(_file(path), ())
        return any(name in self.raw or (name in self.below and os.stat(path).st_nlink == 1) for name in names)


def follow_names(top: Layer) -> tuple[Layer, ...]:
    """The layers from ``top`` down. A missing file is the last one; below a view that is not open the files it shows follow."""
    layers = [top]
    while True:
        try:
            return (*layers[:-1], *chain.follow(layers[-1]))
        except VmkeeperError:
            last = layers[-1]
            if last.path is None or last.format != "qcow2" or len(layers) > chain.MAXIMUM_DEPTH:
                return tuple(layers)
            try:
                below = chain.below(Layer(canonical(last.path), "qcow2"))
            except (OSError, BadHeader, VmkeeperError):
                return tuple(layers)
            if below is None or below.path in [layer.path for layer in layers]:
                return tuple(layers)
            layers.append(below)


def read_graph(connection: Any, directories: Iterable[str] = ()) -> HostGraph:
    """Read every definition, snapshot, saved state, pool and the directories of their images. Call it under the locks."""
    found = _Collector()
    with explaining("Listing the domains of this host"):
        domains = connection.listAllDomains()
    for handle in domains:
        _read_domain(handle, found)
    places = {*directories, *_pool_directories(connection)}
    seen: set[str] = set()
    while places | found.directories > seen:
        # A chain that leads elsewhere brings that directory in, too.
        for directory in (places | found.directories) - seen:
            seen.add(directory)
            found.scan(directory)
    return HostGraph(
        {path: tuple(readers) for path, readers in found.named.items()},
        dict(found.below),
        {file: tuple(paths) for file, paths in found.files.items() if file != _NO_FILE},
    )


def _read_domain(handle: Any, found: _Collector) -> None:
    try:
        name, uuid = handle.name(), handle.UUIDString()
        model = read_domain(handle)
        for disk in model.disks:
            found.disk(disk, Reader("domain", name, uuid), live=model.state.active)
        if model.persistent and model.state.active:
            for disk in read_domain(handle, inactive=True).disks:
                found.disk(disk, Reader("domain", name, uuid))
        path_of = partial(volume_path, handle.connect())
        if model.managed_save:
            root = ElementTree.fromstring(handle.managedSaveGetXMLDesc(0))
            for element in root.iterfind("devices/disk"):
                found.disk(resolve_volume(parse_disk(element), path_of), Reader("saved", name, uuid))
        for snapshot in handle.listAllSnapshots():
            _read_snapshot(snapshot, name, uuid, found)
    except (libvirt.libvirtError, LibvirtFailed) as error:
        # A transient domain that ended meanwhile names nothing any more; anything else must not be overlooked.
        if not is_gone(error):
            raise VmkeeperError(f"Reading which images domain {handle.name()!r} uses: {error}") from error


def _read_snapshot(snapshot: Any, domain: str, uuid: str, found: _Collector) -> None:
    root = ElementTree.fromstring(snapshot.getXMLDesc(0))
    path_of = partial(volume_path, snapshot.getConnect())
    reader = Reader("snapshot", snapshot.getName(), uuid, domain)
    held = {
        element.get("name")
        for element in root.iterfind("disks/disk")
        if element.get("snapshot") in ("external", "internal", "manual")
    }
    for element in root.iterfind("domain/devices/disk"):
        disk = parse_disk(element)
        if disk.target in held:
            found.disk(resolve_volume(disk, path_of), reader)
    memory = root.find("memory")
    if memory is not None and memory.get("file"):
        found.name(str(memory.get("file")), reader)


def _pool_directories(connection: Any) -> set[str]:
    directories = set()
    with contextlib.suppress(libvirt.libvirtError):
        for pool in connection.listAllStoragePools():
            root = ElementTree.fromstring(pool.XMLDesc(0))
            path = root.findtext("target/path")
            if root.get("type") in ("dir", "fs", "netfs") and path:
                directories.add(path)
    return directories


def openers(paths: Iterable[str], *, besides: str) -> dict[str, tuple[Reader, ...]]:
    """Processes that have one of ``paths`` open, except the QEMU of the domain with UUID ``besides``.

    Image locks alone do not tell who: a lock is seen through the process that holds the file open.
    """
    wanted: dict[tuple[int, int], set[str]] = {}
    for path in paths:
        wanted.setdefault(_file(path), set()).add(canonical(path))
    wanted.pop(_NO_FILE, None)
    found: dict[str, list[Reader]] = {}
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        for path in _open_files(pid, wanted):
            command = _command(pid)
            if besides not in command and int(pid) != os.getpid():
                program = os.path.basename(command[0]) if command else "unknown"
                found.setdefault(path, []).append(Reader("process", f"{program} ({pid})"))
    return {path: tuple(readers) for path, readers in found.items()}


def _open_files(pid: str, wanted: Mapping[tuple[int, int], set[str]]) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{descriptor}")
                found |= wanted.get((status.st_dev, status.st_ino), set())
    return found


def _command(pid: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return [word for word in stream.read().decode(errors="replace").split("\0") if word]
    except OSError:
        return []
