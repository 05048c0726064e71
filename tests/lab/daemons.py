# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""virtlogd and libvirtd of the private host, started without an init system."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

RUN = Path("/run")
MARKER = RUN / "vmkeeper-lab" / "host"
LIBVIRTD_SOCKET = RUN / "libvirt" / "libvirt-sock"
LIBVIRTD_PID = RUN / "libvirtd.pid"
VIRTLOGD_PID = RUN / "virtlogd.pid"
LOGS = Path("/var/log/libvirt")


def seed_run(host_name: str) -> None:
    """Fill an empty ``/run`` with what a freshly booted host has there."""
    for name, mode in (("lock", 0o1777), ("user", 0o755), ("log", 0o755)):
        directory = RUN / name
        directory.mkdir(exist_ok=True)
        directory.chmod(mode)
    if not (RUN / "shm").is_symlink():
        (RUN / "shm").symlink_to("/dev/shm")
    MARKER.parent.mkdir(exist_ok=True)
    MARKER.write_text(host_name + "\n")


def running_pid(pid_file: Path, program: str) -> int | None:
    """The pid in ``pid_file`` if that process is alive and runs ``program``, else None."""
    try:
        pid = int(pid_file.read_text())
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return pid if comm == program[:15] and not _is_zombie(pid) else None


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return True


def start_virtlogd(system: Path | None = None) -> None:
    """Start virtlogd unless it runs, on the root file system that the host has its hypervisor from."""
    if running_pid(VIRTLOGD_PID, "virtlogd") is None:
        subprocess.run([*_daemon("virtlogd", system), "-d"], check=True, stdin=subprocess.DEVNULL)


def start_libvirtd(timeout: float = 60.0, system: Path | None = None) -> None:
    """Start libvirtd unless it runs, and wait until it answers on its socket.

    Raises TimeoutError with the end of its log when it does not within ``timeout`` seconds.
    """
    if running_pid(LIBVIRTD_PID, "libvirtd") is None:
        subprocess.run([*_daemon("libvirtd", system), "-d"], check=True, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if _accepts(LIBVIRTD_SOCKET) and running_pid(LIBVIRTD_PID, "libvirtd") is not None:
            return
        time.sleep(0.02)
    raise TimeoutError(f"libvirtd did not answer within {timeout:.0f} s; its log ends: {log_tail()}")


def stop(pid_file: Path, program: str, how: signal.Signals, timeout: float = 60.0) -> None:
    """Send ``how`` to a daemon and wait until it has ended; quiet when it does not run."""
    pid = running_pid(pid_file, program)
    if pid is None:
        return
    os.kill(pid, how)
    wait_gone([pid], timeout)
    pid_file.unlink(missing_ok=True)


def wait_gone(pids: list[int], timeout: float = 60.0) -> None:
    """Wait until none of ``pids`` is a live process; raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while any(not _is_zombie(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes did not end within {timeout:.0f} s: {pids}")
        time.sleep(0.02)


def log_tail(lines: int = 30) -> str:
    """The end of libvirtd's log."""
    try:
        return "\n".join((LOGS / "libvirtd.log").read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(no log: {error})"


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _daemon(name: str, system: Path | None) -> list[str]:
    if system is None and os.environ.get("VMK_LAB_SYSTEM"):
        system = Path(os.environ["VMK_LAB_SYSTEM"])
    if system is not None:
        return ["chroot", str(system), f"/usr/sbin/{name}"]
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/usr/local/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return [found]
