# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write disks in the formats of an image, and compare what is written with what it was made of.

Every ``qemu-img`` here ends with its caller: it would go on to fill the host's disk with what nobody wants any more, and a stopped
domain whose disks it reads could not be started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator

from .._errors import Refused, VmkeeperError
from ..hypervisor import image_node, qemu_img
from ..hypervisor.confinement import Confinement
from ..hypervisor.image_node import Image, Keys


def convert(
    source: str,
    source_format: str,
    destination: str,
    destination_format: str,
    compression: str = "none",
    *,
    doing: str,
    confined: Confinement | None = None,
    bandwidth: int = 0,
) -> None:
    """Flatten ``source`` with all that it stands on into a sparse, self-contained file.

    ``bandwidth`` in bytes per second, 0 for no limit.
    ``confined``: the destination was made before, empty, since the confined program can make no file.
    """
    arguments = ["convert", "-q", "-f", source_format, "-O", destination_format, *qemu_img.limiting(bandwidth)]
    if confined is not None:
        arguments += ["-n", "--target-is-zero"]
    if destination_format == "qcow2" and compression != "none":
        arguments += ["-c", "-o", f"compression_type={compression}"]
    elif destination_format == "vmdk" and compression != "none":
        arguments += ["-o", "subformat=streamOptimized"]
    else:
        # Clusters in the order in which they are read: several requests at once, and a target that stays sparse.
        arguments += ["-W", "-m", "16"]
    qemu_img.run([*arguments, source, destination], doing=doing, confined=confined, with_caller=True)


def take_out(source: str, snapshot: str, destination: str, *, shared: bool, doing: str, bandwidth: int = 0) -> None:
    """What a qcow2 holds of an internal snapshot, flattened into a plain qcow2. ``bandwidth`` as for :func:`convert`.

    ``shared``: a running guest writes to the image. The tables and clusters of a snapshot are never written again while it
    exists: QEMU copies what the guest changes.
    """
    name = snapshot.replace(",", ",,")
    arguments = [
        "convert",
        "-q",
        *(["-U"] if shared else []),
        "-f",
        "qcow2",
        "-O",
        "qcow2",
        "-l",
        f"snapshot.name={name}",
    ]
    arguments += ["-W", "-m", "16", *qemu_img.limiting(bandwidth)]
    qemu_img.run([*arguments, source, destination], doing=doing, with_caller=True)


def content_size(path: str, image_format: str) -> int:
    """Bytes that the image's content takes as a plain qcow2."""
    said = qemu_img.run(
        ["measure", "--output=json", "-f", image_format, "-O", "qcow2", path],
        doing=f"Measuring {path}",
        with_caller=True,
    )
    return int(json.loads(said)["required"])


def encrypt(source: str, source_format: str, destination: Image, size: int, *, doing: str, bandwidth: int = 0) -> None:
    """Flatten ``source`` into a qcow2 that only its passphrase opens. ``bandwidth`` as for :func:`convert`."""
    qemu_img.create_layer(destination, size)
    with Keys() as keys:
        options = image_node.as_options(image_node.node([destination], keys))
        arguments = ["convert", "-q", "-n", "--target-is-zero", "-W", "-m", "16", "-f", source_format]
        arguments += qemu_img.limiting(bandwidth)
        qemu_img.run([*arguments, "--target-image-opts", source, options], doing=doing, keys=keys, with_caller=True)


def decrypt(source: Image, destination: str, *, doing: str, confined: Confinement) -> None:
    """The content of an encrypted qcow2 from outside in a plain one that was made before, empty.

    Raises :class:`Refused` where the passphrase is not the right one.
    """
    with Keys() as keys:
        name = image_node.as_name(image_node.node([source], keys))
        arguments = ["convert", "-q", "-n", "--target-is-zero", "-O", "qcow2", name, destination]
        try:
            qemu_img.run(arguments, doing=doing, keys=keys, confined=confined, with_caller=True)
        except qemu_img.ImageToolFailed as error:
            # QEMU's crypto/block-luks.c; the one message of it that must be told from the others.
            if "Invalid password" in str(error.facts.get("stderr")):
                raise Refused(
                    f"{doing}: the passphrase does not open it",
                    advice="Give the one that it was exported with; it is kept nowhere",
                ) from None
            raise


def same_as_encrypted(one: str, one_format: str, other: Image) -> bool:
    """Whether ``other`` opens with its passphrase and a guest would read the same from both."""
    if not qemu_img.opens(other):
        return False
    with Keys() as keys:
        first = image_node.as_options({"driver": one_format, "file": {"driver": "file", "filename": one}})
        second = image_node.as_options(image_node.node([other], keys))
        try:
            qemu_img.run(
                ["compare", "-q", "--image-opts", first, second],
                doing=f"Comparing {other.path}",
                keys=keys,
                with_caller=True,
            )
        except VmkeeperError as error:
            if error.facts.get("status") == 1:
                return False
            raise
    return True


_CHUNK = 1 << 20


def content_digest(path: str) -> str:
    """sha256 in hex of what a raw file holds: of every MiB that is not all zeroes, with its offset. Holes cost nothing."""
    value = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        value.update(size.to_bytes(8, "big"))
        for offset in _data_chunks(stream.fileno(), size):
            chunk = os.pread(stream.fileno(), _CHUNK, offset)
            if chunk.count(0) != len(chunk):
                value.update(offset.to_bytes(8, "big"))
                value.update(chunk)
    return value.hexdigest()


def _data_chunks(descriptor: int, size: int) -> Iterator[int]:
    """The offsets of the chunks in which a file has data."""
    offset = 0
    while offset < size:
        try:
            found = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: only a hole is left
        offset = found - found % _CHUNK
        yield offset
        offset += _CHUNK


def digest_as_raw(source: str, source_format: str, directory: str) -> str:
    """The :func:`content_digest` that ``source`` would have as a raw file; the copy has no name and is gone afterwards."""
    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with contextlib.closing(os.fdopen(descriptor, "r+b")):
        said = json.loads(
            qemu_img.run(["info", "--output=json", "-f", source_format, source], doing=f"Reading the size of {source}")
        )
        os.ftruncate(descriptor, int(said["virtual-size"]))
        copy = f"/proc/self/fd/{descriptor}"
        qemu_img.run(
            ["convert", "-q", "-n", "--target-is-zero", "-f", source_format, "-O", "raw", source, copy],
            doing=f"Reading {source}",
            pass_fds=(descriptor,),
            with_caller=True,
        )
        return content_digest(copy)


def same_content(one: str, one_format: str, other: str, other_format: str) -> bool:
    """Whether a guest would read the same from both, which are of the same virtual size."""
    try:
        qemu_img.run(
            ["compare", "-q", "-f", one_format, "-F", other_format, one, other],
            doing=f"Comparing {one} with {other}",
            with_caller=True,
        )
    except VmkeeperError as error:
        if error.facts.get("status") == 1:
            return False
        raise
    return True
