# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""libguestfs: a throw-away VM in which a guest's filesystems are read and changed, so that this host never parses them.

``guestfish`` is the door to it: one process, told what to do line by line, in one boot of the appliance (seconds under KVM,
tens of seconds emulated).  It is optional: :func:`require` says what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shutil
import string
import subprocess
import tempfile
import time
from collections.abc import Iterable
from types import TracebackType
from typing import IO

from .._errors import Unsupported, VmkeeperError
from .lifeline import end_with_caller

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

#: Where an appliance has its files, unless it is told otherwise.
SCRATCH = "/var/tmp"
_PREFIX = "vmkeeper-appliance-"

#: A kernel that hangs in a broken /dev/kvm never says so.
LAUNCH_SECONDS = 600.0

#: A filesystem check of many TiB takes long; this ends only what would never end.
COMMAND_SECONDS = 24 * 3600.0

#: The most that one answer may hold: what it says comes from a guest.
LARGEST_ANSWER = 8 << 20

_PLAIN = (string.ascii_letters + string.digits + "/_.,:=*@+-").encode("ascii")


class ApplianceFailed(VmkeeperError):
    """libguestfs could not do it; ``facts['libguestfs']`` is what it said."""

    kind = "libguestfs"


def require(purpose: str) -> None:
    """Raise :class:`Unsupported` unless libguestfs is installed on this host."""
    if shutil.which("guestfish", path=_PATH) is None:
        raise Unsupported(
            f"{purpose} needs libguestfs, which this host does not have; it never parses a guest's filesystems itself",
            advice="Install it (the package guestfish of Debian, Fedora and RHEL)",
            package="guestfish",
        )


def quote(word: str | bytes) -> str:
    """A word for guestfish: in double quotes, everything unusual as an escape, so that no content can end it."""
    content = os.fsencode(word) if isinstance(word, str) else word
    if b"\0" in content:
        raise ValueError("guestfish cannot be told a NUL")
    return '"' + "".join(chr(one) if one in _PLAIN else f"\\x{one:02x}" for one in content) + '"'


def _environment(directory: str) -> dict[str, str]:
    """What guestfish sees. What a host's owner set for libguestfs and for its appliance's kernel is kept."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("LIBGUESTFS_", "SUPERMIN_"))}
    ours = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_CACHEDIR": SCRATCH, "LIBGUESTFS_TMPDIR": directory}
    return {**ours, **kept, "LC_ALL": "C.UTF-8", "PATH": _PATH, "HOME": directory}


def sweep(scratch: str = SCRATCH) -> None:
    """Remove the directories of appliances whose process was killed. Those in use are locked by theirs."""
    try:
        names = [name for name in os.listdir(scratch) if name.startswith(_PREFIX)]
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(scratch, name)
        with contextlib.suppress(OSError):  # it goes by itself, or is not ours
            if os.lstat(path).st_uid != os.geteuid():
                continue  # anybody may make a name in /var/tmp
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _private_directory(scratch: str) -> tuple[str, int]:
    """A new directory, and the descriptor that holds its lock as long as this process lives."""
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX, dir=scratch)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.isdir(path):
            return path, descriptor
        os.close(descriptor)  # somebody's sweep was between the two


class Appliance:
    """A booted appliance with disks as /dev/sda, /dev/sdb and so on, in a ``with`` block.

    ``disks`` are pairs of path and format, which nobody else may write; with ``readonly`` nothing of them is changed.
    Its own files go to a directory below ``scratch``.  Errors begin with ``doing``.  It ends with this process, whatever
    becomes of it; what a killed one left in ``scratch`` is removed first.
    """

    def __init__(
        self, disks: Iterable[tuple[str, str]], *, doing: str, readonly: bool = False, scratch: str = SCRATCH
    ) -> None:
        self._disks = tuple(disks)
        self._doing = doing
        self._readonly = readonly
        self._scratch = scratch
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Appliance:
        require(self._doing)
        sweep(self._scratch)
        self._directory, self._lock = _private_directory(self._scratch)
        self._errors: IO[bytes] = tempfile.TemporaryFile(dir=self._directory)
        try:
            self._process = subprocess.Popen(  # pylint: disable=ansible-bad-function,consider-using-with,subprocess-popen-preexec-fn
                [str(shutil.which("guestfish", path=_PATH))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(self._directory),
                cwd="/",
                umask=0o077,
                start_new_session=True,
                preexec_fn=end_with_caller(),
            )
            # Discards of any length, so that small filesystems' blocks of 1 KiB go too; QEMU's own choice is 4 KiB.
            self.do("config", "-global", "scsi-hd.discard_granularity=512", seconds=LAUNCH_SECONDS)
            options = "readonly:true" if self._readonly else "discard:besteffort"
            for path, image_format in self._disks:
                self.do("add-drive", path, f"format:{image_format}", options)
            self.do("launch", seconds=LAUNCH_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.do("umount-all")
                self.do("shutdown")  # everything is on the disks; raises where it is not
        finally:
            self._end()

    def do(self, *words: str | bytes, seconds: float = COMMAND_SECONDS) -> list[str]:
        """One command; returns the lines of its answer. Raises :class:`ApplianceFailed`."""
        return self._talk([words], seconds=seconds, ignore=False)

    def attempt(self, *words: str | bytes) -> bool:
        """One command that may fail; whether it succeeded."""
        before = os.fstat(self._errors.fileno()).st_size
        self._talk([words], seconds=COMMAND_SECONDS, ignore=True)
        return os.fstat(self._errors.fileno()).st_size == before

    def try_all(self, commands: Iterable[tuple[str | bytes, ...]]) -> None:
        """Commands of which any may fail."""
        self._talk(commands, seconds=COMMAND_SECONDS, ignore=True)

    def read(self, path: str) -> bytes:
        """The content of a guest's file, up to a few MiB."""
        return self._exchange(f"cat {quote(path)}", COMMAND_SECONDS)[
            :-1
        ]  # guestfish ends it with a line feed of its own

    def _talk(self, commands: Iterable[tuple[str | bytes, ...]], *, seconds: float, ignore: bool) -> list[str]:
        lines = [
            ("-" if ignore else "") + " ".join([str(command), *(quote(word) for word in arguments)])
            for command, *arguments in commands
        ]
        answer: list[str] = []
        # A pipe holds 64 KiB: commands in small groups, so that neither side waits for the other.
        for first in range(0, len(lines), 100):
            answer += (
                self._exchange("\n".join(lines[first : first + 100]), seconds).decode(errors="replace").splitlines()
            )
        return answer

    def _exchange(self, text: str, seconds: float) -> bytes:
        """Send lines, and read until guestfish has said a word that nothing in a guest can know."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise ApplianceFailed(f"{self._doing}: libguestfs is not running")
        mark = secrets.token_hex(16)
        end = f"\n{mark}\n".encode("ascii")
        try:
            process.stdin.write(f"{text}\necho\necho {mark}\n".encode("ascii"))
            process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("it ended") from None
        answer = b""
        give_up = time.monotonic() + seconds
        while not answer.endswith(end) and answer != end[1:]:
            waits = max(0.0, give_up - time.monotonic())
            if not select.select([process.stdout], [], [], waits)[0]:
                raise self._failure(f"it did not answer within {seconds:.0f} s")
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                raise self._failure("it ended")
            answer += chunk
            if len(answer) > LARGEST_ANSWER:
                raise self._failure("it had too much to say")
        return answer[: -len(end)]

    def _failure(self, otherwise: str) -> ApplianceFailed:
        self._errors.seek(0)
        said = self._errors.read(1 << 20).decode(errors="replace").strip().splitlines()
        # The last line that says more than how to find out more.
        wanted = [line for line in said if "error:" in line]
        why = (wanted[-1] if wanted else otherwise).rpartition("error: ")[2][:500]
        return ApplianceFailed(
            f"{self._doing}: libguestfs could not do it: {why}",
            advice="Try libguestfs-test-tool on this host",
            libguestfs="\n".join(said[-20:])[:4000],
        )

    def _end(self) -> None:
        process = self._process
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._process = None
        self._errors.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)
