# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An image as an OCI image: one layer for each disk, and one for the manifest.

The disks lie where KubeVirt's containerDisk expects them (``/disk/<target>.qcow2``, owned by its QEMU user 107), so that the
same reference serves both.  Layers are plain tar without times, so that equal images have equal digests everywhere.
Media types and layout: https://github.com/opencontainers/image-spec
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from .._errors import InvalidInput, Unsupported
from ..safety import places
from . import bundle, strict_json
from . import manifest as manifests
from .manifest import Manifest, refuse

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"

#: sha256 of our manifest, so that a pull knows what it will get before it fetches a byte of it.
ANNOTATION = "org.vmkeeper.image.manifest"

DISK_FOLDER = "disk"
OUR_FOLDER = "vmkeeper"
KUBEVIRT_USER = 107
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_CHUNK = 1 << 20
_BLOCK = 512

_REFERENCE = re.compile(
    r"(?P<host>[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::\d{1,5})?)/"
    r"(?P<path>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """``host[:port]/path[:tag][@digest]``."""

    host: str
    path: str
    tag: str | None
    digest: str | None

    @property
    def repository(self) -> str:
        """Without tag and digest."""
        return f"{self.host}/{self.path}"

    def __str__(self) -> str:
        if self.digest:
            return f"{self.repository}@{self.digest}"
        return f"{self.repository}:{self.tag or 'latest'}"


def parse_reference(text: str) -> Reference:
    """A reference with its registry spelled out: a missing one would mean a public registry."""
    match = _REFERENCE.fullmatch(text)
    if not match or len(text) > 512 or not re.search(r"[.:]|^localhost$", match["host"]):
        raise InvalidInput(
            f"reference {text!r} is not understood",
            advice="Use registry.example.com/path/name:tag, or ...@sha256:<digest>",
        )
    return Reference(match["host"], match["path"], match["tag"], match["digest"])


@dataclass(frozen=True)
class Blob:
    """A part of an OCI image. ``size`` in bytes."""

    media_type: str
    digest: str
    size: int

    def as_json(self) -> dict[str, Any]:
        """An OCI descriptor."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


def _header(name: str, size: int, *, folder: bool = False) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, 0
    info.uid = info.gid = KUBEVIRT_USER
    info.mode = 0o755 if folder else 0o440
    info.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return info.tobuf(tarfile.GNU_FORMAT)


def layer(folder: str, name: str, size: int, content: Iterator[bytes]) -> Iterator[bytes]:
    """A tar with one folder and one file in it, piece by piece."""
    yield _header(folder, 0, folder=True) + _header(f"{folder}/{name}", size)
    yield from content
    yield bytes(-size % _BLOCK + 2 * _BLOCK)


def _pieces(stream: IO[bytes], name: str, sha256: str) -> Iterator[bytes]:
    """A file's content; raises at its end if it is not what the manifest says."""
    value = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        value.update(chunk)
        yield chunk
    if value.hexdigest() != sha256:
        raise refuse(f"{name} is not what the manifest says (its sha256 differs)")


class Layout:
    """An OCI image layout, written to ``directory``, or only summed up when that is None."""

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        if directory is not None:
            os.makedirs(os.path.join(directory, "blobs", "sha256"), mode=0o700)

    def add(self, media_type: str, pieces: Iterator[bytes]) -> Blob:
        """Store one blob under its digest."""
        value, size = hashlib.sha256(), 0
        path = os.path.join(self._directory, "blobs", "growing") if self._directory is not None else os.devnull
        with open(path, "wb") as stream:
            for piece in pieces:
                value.update(piece)
                size += len(piece)
                stream.write(piece)
        if self._directory is not None:
            os.rename(path, os.path.join(self._directory, "blobs", "sha256", value.hexdigest()))
        return Blob(media_type, f"sha256:{value.hexdigest()}", size)

    def finish(self, manifest: Blob) -> None:
        """Write what makes the directory a layout with that one image in it."""
        if self._directory is None:
            return
        places.write_new(os.path.join(self._directory, "oci-layout"), b'{"imageLayoutVersion": "1.0.0"}')
        index = {"schemaVersion": 2, "manifests": [manifest.as_json()]}
        places.write_new(os.path.join(self._directory, "index.json"), json.dumps(index).encode())


def build(opened: bundle.Opened, manifest: Manifest, digest: str, layout: Layout) -> Blob:
    """The OCI image of a bundle; returns the descriptor of its OCI manifest. Equal bundles give equal digests."""
    layers = []
    for disk in manifest.disks:
        if disk.format not in ("qcow2", "raw"):
            raise Unsupported(
                f"Disk {disk.target} of the image is {disk.format}, which cannot be launched from a registry",
                advice="Export it with format: qcow2",
            )
        with opened.open(disk.file, disk.stored_size) as stream:
            pieces = _pieces(stream, disk.file, disk.sha256)
            layers.append(layout.add(LAYER_TYPE, layer(DISK_FOLDER, disk.file, disk.stored_size, pieces)))
    if manifest.nvram is not None:
        nvram = manifest.nvram
        with opened.open(nvram.file, nvram.size) as stream:
            pieces = _pieces(stream, nvram.file, nvram.sha256)
            layers.append(layout.add(LAYER_TYPE, layer(OUR_FOLDER, nvram.file, nvram.size, pieces)))
    content = manifest.to_bytes()
    if bundle.sha256_of_bytes(content) != digest:
        raise refuse("its manifest is not written as this version writes it")
    layers.append(layout.add(LAYER_TYPE, layer(OUR_FOLDER, manifests.FILE_NAME, len(content), iter([content]))))
    config = {
        "architecture": _ARCHITECTURES.get(manifest.machine.arch, manifest.machine.arch),
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [one.digest for one in layers]},
    }
    config_blob = layout.add(CONFIG_TYPE, iter([_json(config)]))
    image = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": config_blob.as_json(),
        "layers": [one.as_json() for one in layers],
        "annotations": {ANNOTATION: f"sha256:{digest}", "org.opencontainers.image.title": manifest.name},
    }
    blob = layout.add(MANIFEST_TYPE, iter([_json(image)]))
    layout.finish(blob)
    return blob


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Remote:
    """An image as a registry describes it: checked, and not yet believed."""

    digest: str
    manifest_digest: str
    layers: tuple[Blob, ...]

    @property
    def size(self) -> int:
        """Bytes of all its layers."""
        return sum(one.size for one in self.layers)


def parse_remote(raw: bytes, reference: str) -> Remote:
    """The OCI manifest that a registry sent; raises :class:`Refused` where it is not one of our images."""
    value = strict_json.read(raw, f"The manifest of {reference}")
    annotations = value.get("annotations") if isinstance(value, dict) else None
    named = annotations.get(ANNOTATION) if isinstance(annotations, dict) else None
    if not isinstance(named, str) or not _DIGEST.fullmatch(named):
        raise Unsupported(
            f"{reference} is not an image of vmkeeper.libvirt: it lacks our manifest",
            advice="Push it with vmkeeper.libvirt.push_image",
        )
    layers = value.get("layers")
    if not isinstance(layers, list) or not 2 <= len(layers) <= manifests.MOST_DISKS + 2:
        raise refuse(f"{reference} has no layers, or too many")
    return Remote(f"sha256:{bundle.sha256_of_bytes(raw)}", named, tuple(_blob(one) for one in layers))


def _blob(value: Any) -> Blob:
    if not isinstance(value, dict):
        raise refuse("a layer is not described as one")
    kind, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if kind != LAYER_TYPE or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise refuse("a layer is not a plain tar named by its sha256")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < manifests.LARGEST_DISK * 2:
        raise refuse("a layer's size is out of range")
    return Blob(kind, digest, size)


def unpack(layout: str, remote: Remote, destination: str) -> Manifest:
    """Write the bundle's files out of fetched layers to ``destination``; every one is compared with the manifest."""
    blobs = [os.path.join(layout, "blobs", "sha256", one.digest.partition(":")[2]) for one in remote.layers]
    manifest_path = os.path.join(destination, manifests.FILE_NAME)
    _unpack_one(blobs[-1], OUR_FOLDER, manifests.FILE_NAME, manifest_path, strict_json.LARGEST)
    with open(manifest_path, "rb") as stream:
        content = stream.read()
    if f"sha256:{bundle.sha256_of_bytes(content)}" != remote.manifest_digest:
        raise refuse("its manifest is not the one that the registry named")
    manifest = manifests.parse(content)
    files = manifest.files()
    if len(files) != len(blobs) - 1:
        raise refuse("its layers are not those of its manifest")
    for blob, (name, size, sha256) in zip(blobs, files):
        path = os.path.join(destination, name)
        _unpack_one(blob, OUR_FOLDER if name == manifests.NVRAM_FILE else DISK_FOLDER, name, path, size)
        if os.stat(path).st_size != size or bundle.digest_of(path) != sha256:
            raise refuse(f"{name} is not what the manifest says (its sha256 or size differs)")
    return manifest


def _unpack_one(blob: str, folder: str, name: str, destination: str, limit: int) -> None:
    """The one file of a layer. Its name is ours to say, so nothing in the layer decides where anything is written."""
    try:
        with open(blob, "rb") as archive:
            # One header after the other, by hand: tarfile would read extended headers into memory, however long they say they are.
            member = _next_header(archive)
            if member.type == tarfile.DIRTYPE and member.size == 0 and member.name.rstrip("/") == folder:
                member = _next_header(archive)
            if member.type != tarfile.REGTYPE or member.name != f"{folder}/{name}" or member.size > limit:
                raise refuse(f"the layer of {name} holds something else")
            descriptor = os.open(
                destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            with os.fdopen(descriptor, "wb", buffering=0) as target:
                left = member.size
                while left:
                    chunk = archive.read(min(_CHUNK, left))
                    if not chunk:
                        raise refuse(f"the layer of {name} ends too early")
                    left -= len(chunk)
                    if chunk.count(0) == len(chunk):
                        target.seek(len(chunk), os.SEEK_CUR)
                    else:
                        target.write(chunk)
                target.truncate(member.size)
    except tarfile.TarError as error:
        raise refuse(f"the layer of {name} is not a tar archive: {error}") from error


def _next_header(archive: IO[bytes]) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(archive.read(tarfile.BLOCKSIZE), "utf-8", "strict")
