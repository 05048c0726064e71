# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``qemu-img``, called with explicit formats and understood errors."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence

from .._errors import Unsupported, VmkeeperError
from .confinement import Confinement

# Messages are shown to people and matched nowhere; C.UTF-8 keeps them in one language.
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
    with_caller: bool = False,
) -> str:
    """Run ``qemu-img`` and return its standard output; raises :class:`ImageToolFailed` beginning with ``doing``.

    ``with_caller``: it dies with this process, for work that must not go on when the locks that protect it are gone.

    ``facts['status']`` is its exit status (negative: the signal that ended it).
    """
    program = shutil.which("qemu-img", path=_ENVIRONMENT["PATH"])
    if program is None:
        raise Unsupported(
            "qemu-img is not installed on this host",
            advice="Install it (Debian: qemu-utils, Fedora and RHEL: qemu-img)",
        )
    try:
        finished = subprocess.run(  # pylint: disable=ansible-bad-function
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_ENVIRONMENT,
            timeout=timeout,
            check=False,
            umask=0o077,
            pass_fds=pass_fds,
            preexec_fn=_end_with(os.getpid()) if with_caller else confined.apply if confined is not None else None,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageToolFailed(f"{doing}: qemu-img did not finish within {timeout:.0f} s") from error
    if finished.returncode:
        said = " ".join(finished.stderr.decode(errors="replace").split()) or f"exit status {finished.returncode}"
        raise ImageToolFailed(f"{doing}: {said}", stderr=said, status=finished.returncode)
    return finished.stdout.decode(errors="replace")


def _end_with(parent: int) -> Callable[[], None]:
    """What the child does before the program, so that the kernel kills it when ``parent`` dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def apply() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before it could be told

    return apply


def create(path: str, size: int, owner: tuple[int, int]) -> None:
    """Make an empty private qcow2 of ``size`` bytes at ``path``, which must not exist, owned as QEMU needs it."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    run(["create", "-q", "-f", "qcow2", path, str(size)], doing=f"Making the image {path}")
    os.chown(path, *owner)
    os.chmod(path, 0o600)


def holds_data(path: str) -> bool:
    """Whether anything was ever written to this qcow2 layer itself. Its backing file is not opened; nobody may hold it."""
    image = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": path}}
    extents = run(["map", "--output=json", f"json:{json.dumps(image)}"], doing=f"Reading the map of {path}")
    # ``present`` came with QEMU 6.1; before, an untouched layer cannot be told from one full of zeroes.
    return any(extent.get("present", extent["data"] or extent["zero"]) for extent in json.loads(extents))


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
