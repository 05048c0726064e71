# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``qemu-img``, called with explicit formats and understood errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

from .._errors import Unsupported, VmkeeperError
from . import image_node
from .confinement import Confinement
from .image_node import Image, Keys
from .lifeline import end_with_caller

# Messages are shown to people; C.UTF-8 keeps them in one language.
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class ImageToolFailed(VmkeeperError):
    """qemu-img ended with an error; ``facts['stderr']`` is what it said."""

    kind = "qemu_img"


def run(
    arguments: Sequence[str],
    *,
    doing: str,
    timeout: float | None = None,
    pass_fds: Sequence[int] = (),
    confined: Confinement | None = None,
    keys: Keys | None = None,
    with_caller: bool = False,
) -> str:
    """Run ``qemu-img`` and return its standard output; raises :class:`ImageToolFailed` beginning with ``doing``.

    ``keys`` are the passphrases that the arguments name.  ``with_caller``: it dies with this process, for work that must
    not go on when the locks that protect it are gone.  ``facts['status']`` is its exit status (negative: the signal
    that ended it).
    """
    program = shutil.which("qemu-img", path=_ENVIRONMENT["PATH"])
    if program is None:
        raise Unsupported(
            "qemu-img is not installed on this host",
            advice="Install it (Debian: qemu-utils, Fedora and RHEL: qemu-img)",
        )
    try:
        finished = subprocess.run(  # pylint: disable=ansible-bad-function
            [program, arguments[0], *(keys.arguments if keys is not None else ()), *arguments[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_ENVIRONMENT,
            timeout=timeout,
            check=False,
            umask=0o077,
            pass_fds=(*pass_fds, *(keys.descriptors if keys is not None else ())),
            preexec_fn=_before(confined, end_with_caller() if with_caller else None),
        )
    except subprocess.TimeoutExpired as error:
        raise ImageToolFailed(f"{doing}: qemu-img did not finish within {timeout:.0f} s") from error
    if finished.returncode:
        said = " ".join(finished.stderr.decode(errors="replace").split()) or f"exit status {finished.returncode}"
        raise ImageToolFailed(f"{doing}: {said}", stderr=said, status=finished.returncode)
    return finished.stdout.decode(errors="replace")


def _before(confined: Confinement | None, tie: Callable[[], None] | None) -> Callable[[], None] | None:
    """What the child does before the program. Tied last: the kernel unties a process that changes its user."""
    steps = [step for step in (confined.apply if confined is not None else None, tie) if step is not None]

    def apply() -> None:
        for step in steps:
            step()

    return apply if steps else None


def create(path: str, size: int, owner: tuple[int, int]) -> None:
    """Make an empty private qcow2 of ``size`` bytes at ``path``, which must not exist, owned as QEMU needs it."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    run(["create", "-q", "-f", "qcow2", path, str(size)], doing=f"Making the image {path}")
    os.chown(path, *owner)
    os.chmod(path, 0o600)


def create_overlay(path: str, *, backing: str, backing_format: str, size: int | None, owner: tuple[int, int]) -> None:
    """Make a private qcow2 overlay of ``backing`` at ``path``, which must not exist, owned as QEMU needs it.

    The name is claimed with O_EXCL first, so that two runs cannot make the same file and nothing is overwritten, and
    everything else goes through that descriptor: whoever may write to the directory cannot put a link in its place.
    ``-u`` leaves the backing file closed: it may be in use by the running guest.  Raises FileExistsError.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        claimed = f"/proc/self/fd/{descriptor}"
        arguments = ["create", "-q", "-f", "qcow2", "-u", "-F", backing_format, "-b", backing, claimed]
        if size is not None:
            arguments.append(str(size))
        run(arguments, doing=f"Making the overlay {path}", pass_fds=(descriptor,))
        os.fchown(descriptor, *owner)
        os.fchmod(descriptor, 0o600)
        os.fsync(descriptor)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


#: Milliseconds of this machine's time that guessing one passphrase costs whoever tries, and opening one layer costs us.
#: QEMU's own 2000 would make a chain of 16 layers take half a minute to open. A passphrase of 16 random characters needs none.
LUKS_MILLISECONDS = 200


#: The same for a random key, which nobody can guess; the least that QEMU can measure.
KEY_MILLISECONDS = 10

#: What QEMU before 9.1 says now and then on a busy host, whose accounting of processor time goes in steps, when it measures
#: how many iterations take that long. The next try succeeds.
_NO_CPU_TIME = "Unable to get accurate CPU usage"
_LUKS_TRIES = 100


def create_layer(
    target: Image,
    size: int,
    *,
    backing: str | None = None,
    compression: str | None = None,
    milliseconds: int = LUKS_MILLISECONDS,
    owner: tuple[int, int] | None = None,
) -> None:
    """Make an empty private qcow2 of ``size`` bytes, which must not exist; encrypted when ``target`` has a passphrase.

    ``backing`` is the name of the layer below, which is not opened.  ``milliseconds`` may be :data:`KEY_MILLISECONDS` for a
    passphrase that is a random key.  ``owner`` is the uid and gid that it is given to, where it is not for us.
    """
    os.close(os.open(target.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    options = []
    with Keys() as keys:
        if target.passphrase is not None:
            options += ["encrypt.format=luks", f"encrypt.key-secret={keys.name(target.passphrase)}"]
            options += [f"encrypt.iter-time={milliseconds}"]
        if compression is not None:
            options.append(f"compression_type={compression}")
        arguments = [
            *("create", "-q", "-f", "qcow2"),
            *(("-u", "-F", "qcow2", "-b", backing) if backing is not None else ()),
            *(("-o", ",".join(options)) if options else ()),
            *(target.path, str(size)),
        ]
        for left in reversed(range(_LUKS_TRIES)):
            try:
                run(arguments, doing=f"Making the image {target.path}", keys=keys)
                break
            except ImageToolFailed as error:
                if not left or _NO_CPU_TIME not in str(error.facts.get("stderr")):
                    raise
    if owner is not None:
        os.chown(target.path, *owner)


def copy_chain(
    source: Sequence[Image], target: Image, *, compression: str | None = None, doing: str, bandwidth: int = 0
) -> None:
    """Copy the content of a chain, topmost layer first, into an empty layer that stands on nothing.

    ``bandwidth`` in bytes per second, 0 for no limit.  It dies with this process.
    """
    with Keys() as keys:
        run(
            [
                *("convert", "-n", "--target-is-zero", "-q", *_writing(compression), *limiting(bandwidth)),
                "--target-image-opts",
                image_node.as_name(image_node.node(source, keys)),
                image_node.as_options(image_node.node([target], keys)),
            ],
            doing=doing,
            keys=keys,
            with_caller=True,
        )


def copy_layer(
    source: Image,
    target: Image,
    size: int,
    *,
    backing: str,
    below: Sequence[Image] = (),
    compression: str | None = None,
    over: bool = False,
    doing: str,
    bandwidth: int = 0,
) -> None:
    """Copy what one layer itself holds, zeros that it states included, into another.

    ``over``: the target holds something already. Compressed clusters do not overwrite anything: :func:`discard` them first. What
    is not compressed is written one request at a time then, since QEMU (seen with 7.2) damages a compressed cluster of which two
    requests write a part each at the same time.

    ``below`` are the layers that ``source`` stands on, topmost first. They are opened only where it is compressed and the last
    cluster is not a whole one, which QEMU then writes also where the layer does not hold it: with what is seen there through
    ``below``, so without them as zeros (see :func:`writes_last_cluster`).  Neither backing file is opened otherwise.  Never copy
    more than one layer with ``-B``: the lower ones are lost without a word.  ``bandwidth`` as for :func:`copy_chain`; it
    dies with this process, too.
    """
    layers = [source, *(below if writes_last_cluster(size, compression) else ())]
    blank = image_node.blank_descriptor(size)
    try:
        with Keys() as keys:
            ground = image_node.blank_node(blank)
            run(
                [
                    *("convert", "-n", "-B", backing, "-F", "qcow2", "-q"),
                    *(
                        ("-m", "1")
                        if over and compression is None and target.passphrase is None
                        else _writing(compression)
                    ),
                    # Else, by default, nothing is flushed, and a host that goes down leaves tables that contradict each other.
                    *(("-t", "writeback") if over else ()),
                    *limiting(bandwidth),
                    "--target-image-opts",
                    image_node.as_name(image_node.node(layers, keys, below=ground if len(layers) == 1 else None)),
                    image_node.as_options(image_node.node([target], keys, below=ground)),
                ],
                doing=doing,
                pass_fds=(blank,),
                keys=keys,
                with_caller=True,
            )
    finally:
        os.close(blank)


#: Of qcow2, as everywhere here.
_CLUSTER = 65536


def writes_last_cluster(size: int, compression: str | None) -> bool:
    """Whether :func:`copy_layer` writes the last cluster of a layer of ``size`` bytes also where the layer does not hold it.

    QEMU compresses whole clusters, and takes an unallocated area that is shorter than one for data (qemu-img.c,
    ``convert_iteration_sectors``).
    """
    return compression is not None and size % _CLUSTER != 0


def held_ranges(image: Image) -> list[tuple[int, int]]:
    """``(start, length)`` in guest bytes of what this one layer itself holds, zeros that it states included."""
    with Keys() as keys:
        text = run(
            ["map", "--output=json", image_node.as_name(image_node.node([image], keys))],
            doing=f"Reading which parts {image.path} holds",
            keys=keys,
        )
    # ``present`` came with QEMU 6.1; before, everything that is not data counts as a stated zero.
    return [(one["start"], one["length"]) for one in json.loads(text) if one.get("present", one["data"] or one["zero"])]


def discard(path: str, ranges: Sequence[tuple[int, int]], *, doing: str) -> None:
    """Make whole clusters of an unencrypted qcow2 read as zeros and free them. It dies with this process."""
    program = shutil.which("qemu-io", path=_ENVIRONMENT["PATH"])
    if program is None:
        raise Unsupported(
            "qemu-io is not installed on this host", advice="Install it (Debian: qemu-utils, Fedora and RHEL: qemu-img)"
        )
    commands = "".join(f"write -z -u {start} {length}\n" for start, length in ranges)
    finished = subprocess.run(  # pylint: disable=ansible-bad-function
        [program, "-d", "unmap", "-f", "qcow2", path],
        input=commands.encode(),
        capture_output=True,
        env=_ENVIRONMENT,
        check=False,
        preexec_fn=end_with_caller(),
    )
    said = " ".join(finished.stderr.decode(errors="replace").split())
    if finished.returncode or said:
        raise ImageToolFailed(f"{doing}: {said or finished.returncode}", stderr=said, status=finished.returncode)


def _writing(compression: str | None) -> tuple[str, ...]:
    # Compressed clusters are written in order; else several requests at once.
    return ("-c",) if compression is not None else ("-W", "-m", "16")


def limiting(bandwidth: int) -> tuple[str, ...]:
    """The options of ``convert`` that limit what it writes, in bytes per second (QEMU 5.2); 0 for no limit."""
    return ("-r", str(bandwidth)) if bandwidth else ()


def opens(image: Image) -> bool:
    """Whether the passphrase opens the image; what it stands on is left alone."""
    with Keys() as keys:
        try:
            run(
                ["map", "--output=json", "--max-length=65536", image_node.as_name(image_node.node([image], keys))],
                doing=f"Opening {image.path}",
                keys=keys,
            )
        except ImageToolFailed as error:
            # QEMU's crypto/block-luks.c; the one message of it that must be told from the others.
            if "Invalid password" in str(error.facts.get("stderr")):
                return False
            raise
    return True
