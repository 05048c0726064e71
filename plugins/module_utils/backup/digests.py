# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Digests of what the guest sees in a stored disk, in chunks of 1 MiB, and of everything else in its file.

The sidecar ``<target>.sums`` is text: a JSON line ``{format, algorithm, chunk, size, complete}``, then ``<index> <hex>``
in order.  A full is ``complete``: a chunk that it does not list is zero.  An increment lists the chunks that it
touches, each as a whole, so that the digests of a chain are those of its layers laid over each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from .._errors import Refused, Unsupported
from ..hypervisor import image_node, nbd, qemu_img
from ..hypervisor.image_node import Image, Keys

FORMAT = 1
ALGORITHM = "sha256"
CHUNK = 1 << 20

#: hashlib releases the interpreter lock; more threads than this only compete with the guests.
_THREADS = 2


@dataclass(frozen=True)
class Extent:
    """A run of guest bytes. ``depth`` 0 is the top layer; ``offset`` is its place in that layer's file.

    It is None for zeros, and for what the file holds otherwise than as it is (``coded``: compressed or encrypted).
    """

    start: int
    length: int
    depth: int
    offset: int | None
    coded: bool = False

    @property
    def data(self) -> bool:
        """Whether anything must be read to know it."""
        return self.coded or self.offset is not None


@dataclass(frozen=True)
class Sums:
    """Digests of chunks by index. ``size`` is the disk's virtual size in bytes."""

    size: int
    complete: bool
    chunks: Mapping[int, str]
    algorithm: str = ALGORITHM
    chunk: int = CHUNK

    def over(self, below: Sums) -> Sums:
        """The digests of this layer standing on ``below``."""
        if self.complete:
            return self
        if (below.algorithm, below.chunk) != (self.algorithm, self.chunk):
            raise Unsupported("The layers of this chain have digests of different kinds")
        chunks = {**below.chunks, **self.chunks}
        if below.size > self.size:
            chunks = {index: digest for index, digest in chunks.items() if index * self.chunk < self.size}
        return Sums(self.size, below.complete, chunks, self.algorithm, self.chunk)


class Content(Protocol):
    """Where the bytes of a disk come from. Several threads read at once."""

    def read(self, start: int, length: int, depth: int, offset: int | None) -> bytes:
        """Guest bytes from ``start``, which are in layer ``depth`` at ``offset`` of its file, if that is known."""


class Files:
    """The files of a chain that holds guest data as it is, topmost first."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._descriptors = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]

    def read(self, start: int, length: int, depth: int, offset: int | None) -> bytes:
        """Straight from the file, past QEMU."""
        if offset is None:
            raise Unsupported("The image holds compressed or encrypted clusters where none are expected")
        del start
        return os.pread(self._descriptors[depth], length, offset)

    def close(self) -> None:
        """Close them."""
        for descriptor in self._descriptors:
            os.close(descriptor)


class _Decoded:
    def __init__(self, clients: Sequence[nbd.Client]) -> None:
        self._idle: queue.SimpleQueue[nbd.Client] = queue.SimpleQueue()
        for client in clients:
            self._idle.put(client)

    def read(self, start: int, length: int, depth: int, offset: int | None) -> bytes:
        del depth, offset
        client = self._idle.get()
        try:
            return client.read(start, length)
        finally:
            self._idle.put(client)


@contextlib.contextmanager
def content_of(layers: Sequence[Image], extents: Sequence[Extent]) -> Iterator[Content]:
    """The content of a chain, topmost layer first: from its files, or through QEMU where it alone can decode them."""
    if any(extent.coded for extent in extents):
        with nbd.reading(layers, connections=_THREADS, doing=f"Reading {layers[0].path}") as clients:
            yield _Decoded(clients)
        return
    files = Files([layer.path for layer in layers])
    try:
        yield files
    finally:
        files.close()


def extents_of(layers: Sequence[Image]) -> list[Extent]:
    """What the guest sees in a chain, topmost layer first, as ``qemu-img map`` tells it. All layers are given."""
    with Keys() as keys:
        text = qemu_img.run(
            ["map", "--output=json", image_node.as_name(image_node.node(layers, keys))],
            doing=f"Reading which parts of {layers[0].path} are in use",
            keys=keys,
        )
    found = []
    for entry in json.loads(text):
        offset = entry.get("offset") if entry["data"] else None
        coded = bool(entry["data"]) and offset is None
        found.append(Extent(entry["start"], entry["length"], entry["depth"], offset, coded))
    return found


def touched(extents: Iterable[Extent], size: int) -> list[int]:
    """Indexes of the chunks that the top layer holds any part of."""
    chunks: set[int] = set()
    for extent in extents:
        if extent.depth == 0:
            chunks.update(range(extent.start // CHUNK, (extent.start + extent.length - 1) // CHUNK + 1))
    return sorted(index for index in chunks if index * CHUNK < size)


def with_data(extents: Iterable[Extent]) -> list[int]:
    """Indexes of the chunks that hold anything but zeros that need no reading."""
    chunks: set[int] = set()
    for extent in extents:
        if extent.data:
            chunks.update(range(extent.start // CHUNK, (extent.start + extent.length - 1) // CHUNK + 1))
    return sorted(chunks)


@dataclass(frozen=True)
class _Piece:
    """A part of an extent that lies in one chunk. ``start`` counts from the chunk's begin."""

    start: int
    length: int
    extent: Extent
    offset: int | None


def digest_chunks(content: Content, extents: Sequence[Extent], indexes: Sequence[int], size: int) -> dict[int, str]:
    """Read and digest whole chunks."""
    pieces = _pieces(extents, frozenset(indexes))
    zeros = bytes(CHUNK)

    def digest(index: int) -> tuple[int, str]:
        length = min(CHUNK, size - index * CHUNK)
        parts = [piece for piece in pieces.get(index, ()) if piece.extent.data]
        if not parts:
            return index, hashlib.sha256(zeros[:length]).hexdigest()
        buffer = bytearray(length)
        for piece in parts:
            data = content.read(index * CHUNK + piece.start, piece.length, piece.extent.depth, piece.offset)
            # A cluster at the end of a file may be shorter than promised; the rest reads as zero.
            buffer[piece.start : piece.start + len(data)] = data
        return index, hashlib.sha256(buffer).hexdigest()

    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return dict(pool.map(digest, indexes, chunksize=8))


def _pieces(extents: Sequence[Extent], wanted: frozenset[int]) -> dict[int, list[_Piece]]:
    found: dict[int, list[_Piece]] = {}
    for extent in extents:
        position, end = extent.start, extent.start + extent.length
        while position < end:
            index = position // CHUNK
            stop = min(end, (index + 1) * CHUNK)
            if index in wanted:
                offset = None if extent.offset is None else extent.offset + position - extent.start
                found.setdefault(index, []).append(_Piece(position - index * CHUNK, stop - position, extent, offset))
            position = stop
    return found


def sums_of(
    content: Content, extents: Sequence[Extent], size: int, *, complete: bool, grown_from: int | None = None
) -> Sums:
    """The sums of the top layer: of all that is not zero for a full, of what it touches for an increment.

    ``grown_from`` is the size of the layer below, if smaller: its last chunk is longer now.
    """
    indexes = with_data(extents) if complete else touched(extents, size)
    if grown_from is not None and grown_from % CHUNK and grown_from // CHUNK not in indexes:
        indexes.append(grown_from // CHUNK)
    return Sums(size, complete, digest_chunks(content, extents, indexes, size))


def write_sums(path: str, sums: Sums) -> None:
    """Write a sidecar durably."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        header = {
            "format": FORMAT,
            "algorithm": sums.algorithm,
            "chunk": sums.chunk,
            "size": sums.size,
            "complete": sums.complete,
        }
        stream.write(json.dumps(header, sort_keys=True) + "\n")
        for index, digest in sorted(sums.chunks.items()):
            stream.write(f"{index} {digest}\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_sums(path: str) -> Sums:
    """Read a sidecar; raises :class:`Refused` when it is damaged."""
    try:
        with open(path, encoding="ascii") as stream:
            header = json.loads(next(stream, ""))
            if header["format"] != FORMAT or header["algorithm"] != ALGORITHM or header["chunk"] != CHUNK:
                raise Unsupported(f"{path} has digests of a kind that this version does not know")
            chunks = {}
            for line in stream:
                index, digest = line.split()
                chunks[int(index)] = digest
            return Sums(header["size"], header["complete"], chunks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error


def differences(sums: Sums, content: Content, extents: Sequence[Extent], *, most: int = 16) -> list[int]:
    """Indexes of chunks whose content is not what the sums say, at most ``most`` of them; ``sums`` must be complete."""
    indexes = sorted(set(sums.chunks) | set(with_data(extents)))
    found = digest_chunks(content, extents, indexes, sums.size)
    wrong = []
    for index in indexes:
        length = min(CHUNK, sums.size - index * CHUNK)
        expected = sums.chunks.get(index) or hashlib.sha256(bytes(max(0, length))).hexdigest()
        if found[index] != expected:
            wrong.append(index)
    return wrong[:most]


def metadata_digest(path: str, extents: Iterable[Extent]) -> str:
    """SHA-256 of all bytes of the top layer's file that are not guest data as it is; of coded data, all bytes."""
    taken = sorted(
        (extent.offset, extent.offset + extent.length)
        for extent in extents
        if extent.depth == 0 and extent.offset is not None
    )
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        end = os.fstat(stream.fileno()).st_size
        for start, stop in _gaps(taken, end):
            stream.seek(start)
            left = stop - start
            while left > 0:
                data = stream.read(min(left, CHUNK))
                if not data:
                    break
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()


def _gaps(taken: Sequence[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    position = 0
    for start, stop in taken:
        if start > position:
            yield position, min(start, end)
        position = max(position, stop)
    if position < end:
        yield position, end


def file_digest(path: str) -> str:
    """SHA-256 of a small file."""
    with open(path, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()
