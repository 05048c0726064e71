# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A bundle on disk: a directory with ``manifest.json`` and the files that it names.

It appears by one rename, whole and durable, or not at all.  Reading one back trusts nothing in it: see :class:`Opened`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
from typing import IO

from .._errors import InvalidInput, NotFound, Refused
from ..safety import places
from . import manifest as manifests
from . import strict_json
from .manifest import Manifest, refuse

_CHUNK = 1 << 20
_KEYS = uuid.UUID("3f0e1a52-7d0b-5a43-9d52-1f6a0b6c9a77")


def lock_key(path: str) -> str:
    """The name under which a path is locked and journalled, where domains have their UUID."""
    return str(uuid.uuid5(_KEYS, os.path.realpath(path)))


def staging_of(path: str, identifier: str) -> str:
    """Where a bundle grows before it has its name: the same directory, so that one rename makes it appear."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.new-{identifier}")


def digest_of(path: str) -> str:
    """sha256 of a file of our own, in hex."""
    with open(path, "rb") as stream:
        return _digest(stream)


def _digest(stream: IO[bytes]) -> str:
    value = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        value.update(chunk)
    return value.hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def seal(staging: str, path: str, manifest: Manifest) -> str:
    """Write the manifest last, make everything durable and private, and give the bundle its name; returns its digest."""
    content = manifest.to_bytes()
    for name, _size, _sha256 in manifest.files():
        file = os.path.join(staging, name)
        os.chown(file, os.geteuid(), os.getegid())
        os.chmod(file, 0o600)
        places.fsync_file(file)
    places.write_new(os.path.join(staging, manifests.FILE_NAME), content)
    publish(staging, path)
    return sha256_of_bytes(content)


def publish(staging: str, path: str) -> None:
    """The one rename. The caller holds the lock of ``path`` and has seen that nothing is there."""
    os.chmod(staging, 0o700)
    places.fsync_directory(staging)
    os.rename(staging, path)
    places.fsync_directory(os.path.dirname(path))


def remove(path: str) -> None:
    """Remove a staging directory, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)


class Opened:
    """A bundle from outside, held by its directory's descriptor, so that it cannot be exchanged while it is read.

    Every file must be a regular file with one name: a symbolic link, hard link, FIFO or device could be any file of the
    host.  Nothing is read before that is known, and opening blocks on nothing.
    """

    def __init__(self, path: str) -> None:
        if not os.path.isabs(path):
            raise InvalidInput(f"src {path!r} is not an absolute path", advice="Give the whole path on the hypervisor")
        self.path = path
        try:
            self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise NotFound(
                f"There is no image at {path}", advice="See that the path is the image's own directory"
            ) from error
        except OSError as error:
            raise refuse(f"{path} is not a directory ({error.strerror})") from error

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._directory)

    def require_ours(self) -> None:
        """Raise :class:`Refused` where somebody else could exchange the files, so that using them by name is not safe."""
        status = os.fstat(self._directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise Refused(
                f"Somebody else than this user can change what is in {self.path}",
                advice="Use an image that export_image or pull_image made here; import_image takes any",
            )

    def read_manifest(self) -> tuple[Manifest, str]:
        """The checked manifest, and the sha256 of its bytes: the image's identity."""
        with self.open(manifests.FILE_NAME) as stream:
            content = stream.read(strict_json.LARGEST + 1)
        return manifests.parse(content), sha256_of_bytes(content)

    def copy(self, name: str, size: int, sha256: str, destination: str) -> None:
        """A private copy of one file, which from then on nobody else can change; its size and digest are as promised."""
        value, copied = hashlib.sha256(), 0
        descriptor = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with self.open(name, size) as source, os.fdopen(descriptor, "wb", buffering=0) as target:
            while chunk := source.read(_CHUNK):
                value.update(chunk)
                copied += len(chunk)
                if copied > size:
                    break
                if chunk.count(0) == len(chunk):
                    target.seek(len(chunk), os.SEEK_CUR)  # stays sparse
                else:
                    target.write(chunk)
            target.truncate(min(copied, size))
        if copied != size or value.hexdigest() != sha256:
            raise refuse(f"{name} is not what the manifest says (its sha256 or size differs)")

    def digest(self, name: str, size: int) -> str:
        """sha256 of one file."""
        with self.open(name, size) as stream:
            return _digest(stream)

    def open(self, name: str, size: int | None = None) -> IO[bytes]:
        """One file of the bundle for reading, of ``size`` bytes where that is known; raises where it is not a plain file."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        try:
            # Look first: merely opening some devices has an effect.
            before = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            if not stat.S_ISREG(before.st_mode):
                raise refuse(f"{name} is not a regular file")
            descriptor = os.open(name, flags, dir_fd=self._directory)
        except FileNotFoundError as error:
            raise refuse(f"it has no file {name}") from error
        except OSError as error:
            raise refuse(f"{name} cannot be opened as a regular file ({error.strerror})") from error
        status = os.fstat(descriptor)
        problem = None
        if not stat.S_ISREG(status.st_mode):
            problem = "is not a regular file"
        elif status.st_nlink != 1:
            problem = "has a second name (a hard link)"
        elif size is not None and status.st_size != size:
            problem = f"has {status.st_size} bytes, and the manifest says {size}"
        if problem:
            os.close(descriptor)
            raise refuse(f"{name} {problem}")
        return os.fdopen(descriptor, "rb")
