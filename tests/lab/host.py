# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The private test host as seen from inside: its daemons, and the ways in which they end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import libvirt

from . import daemons

URI = "qemu:///system"


class NotInsideError(RuntimeError):
    """Raised when a test would act on the real hypervisor."""


def is_inside() -> bool:
    """Whether this process runs inside a private host (see ``tests/lab/enter``)."""
    return bool(os.environ.get("VMK_LAB_HOST")) and daemons.MARKER.exists()


class TestHost:
    """The host that ``tests/lab/enter`` made around this process. One instance per test session is enough."""

    __test__ = False  # not a test class, whatever its name tells pytest

    def __init__(self) -> None:
        if not is_inside():
            raise NotInsideError("not inside a private test host; run: tests/lab/enter -- python -m pytest ...")
        self.name = os.environ["VMK_LAB_HOST"]
        # libvirt calls back into this loop for agent and job events; without it connections still work.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)

    def start(self) -> None:
        """Start virtlogd and libvirtd unless they run; returns when libvirtd answers."""
        daemons.start_virtlogd()
        daemons.start_libvirtd()

    def stop_libvirtd(self) -> None:
        """Stop libvirtd as its service would (SIGTERM). Guests keep running."""
        daemons.stop(daemons.LIBVIRTD_PID, "libvirtd", signal.SIGTERM)

    def kill_libvirtd(self) -> None:
        """SIGKILL libvirtd. Guests keep running; call start() to have it back."""
        daemons.stop(daemons.LIBVIRTD_PID, "libvirtd", signal.SIGKILL)

    def restart_libvirtd(self) -> None:
        """Stop libvirtd and start it again. Guests keep running."""
        self.stop_libvirtd()
        daemons.start_libvirtd()

    def libvirtd_pid(self) -> int | None:
        """The pid of libvirtd, None when it does not run."""
        return daemons.running_pid(daemons.LIBVIRTD_PID, "libvirtd")

    def power_cut(self) -> None:
        """SIGKILL everything that a power cut ends, and empty ``/run``.

        That is: QEMU, libvirtd, virtlogd, every detached process, and every child of this process. What
        survives is this process, its ancestors and their other children (a shell pipeline, for example).
        One thing differs from a real power cut: what was written but not synced stays in the page cache.
        """
        doomed = _processes_of_the_host()
        for pid in doomed:
            _kill(pid)
        daemons.wait_gone(doomed)
        for entry in daemons.RUN.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        daemons.seed_run(self.name)

    def reboot(self) -> None:
        """A power cut, then a boot: daemons start, domains marked autostart with them."""
        self.power_cut()
        self.start()

    def connect(self) -> libvirt.virConnect:
        """A new connection to ``qemu:///system`` of this host."""
        return libvirt.open(URI)

    def qemu_pids(self) -> dict[str, int]:
        """Domain name -> pid of every QEMU that runs under this host's libvirt."""
        found = {}
        for pid, arguments in _command_lines().items():
            if "qemu-system" in os.path.basename(arguments[0]):
                for option, value in zip(arguments, arguments[1:]):
                    if option == "-name" and value.startswith("guest="):
                        found[value[len("guest=") :].split(",")[0]] = pid
        return found

    def libvirtd_log(self, lines: int = 60) -> str:
        """The end of libvirtd's log."""
        return daemons.log_tail(lines)


def _command_lines() -> dict[int, list[str]]:
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if arguments[0]:
            found[int(directory.name)] = arguments
    return found


def _processes_of_the_host() -> list[int]:
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(directory.name)] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    me = os.getpid()
    line = [me]
    while line[-1] in parents and parents[line[-1]] > 1:
        line.append(parents[line[-1]])
    ancestors = set(line[1:])

    def is_spared(pid: int) -> bool:
        """Whether the nearest of its forebears that is in our line is an ancestor of ours, not us or init."""
        while pid > 1:
            if pid == me:
                return False
            if pid in ancestors:
                return True
            pid = parents.get(pid, 1)
        return False

    return [pid for pid in parents if pid not in (1, me) and not is_spared(pid)]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
