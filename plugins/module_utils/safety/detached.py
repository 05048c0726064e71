# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes that outlive the module: the guard of a frozen guest, the worker of a long job.

Ansible unpacks a module into a temporary archive that is gone when the module ends, and sshd may end everything in the
session.  So the archive is copied, and a fresh interpreter is started from the copy: as a transient systemd unit where
systemd runs (outside the session's control group), else by a double fork into a session of its own.  Either way every
inherited descriptor is closed, so that the ssh connection can close too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from .._errors import VmkeeperError
from . import places

_PACKAGE_DEPTH = 6  # ansible_collections/vmkeeper/libvirt/plugins/module_utils/safety

_BOOTSTRAP = "import sys; sys.path.insert(0, {payload!r}); from {entry} import main; main({ticket!r})"

# The first fork's parent ends at once, so that the worker is adopted by init and nobody waits for it.
_DOUBLE_FORK = "import os, sys; os.fork() and os._exit(0); os.setsid(); os.umask(0o077); " + _BOOTSTRAP


def payload_root() -> str:
    """The archive or directory that this code was imported from: what belongs on ``sys.path``."""
    path = os.path.abspath(__file__)
    for _level in range(_PACKAGE_DEPTH + 1):
        path = os.path.dirname(path)
    return path


def keep_payload(destination: str) -> str:
    """Copy the code to ``destination`` if it lives in Ansible's temporary archive; returns what to import from."""
    root = payload_root()
    if not os.path.isfile(root):
        return root
    # Another worker may be importing from an older copy: it keeps the old file, and never sees half of a new one.
    new = f"{destination}.{os.getpid()}"
    shutil.copyfile(root, new)
    os.chmod(new, 0o600)
    os.replace(new, destination)
    return destination


def launch(
    entry: str, ticket: str, *, payload: str, unit: str, description: str, before_end_of: Sequence[str] = ()
) -> str:
    """Start ``entry.main(ticket)`` detached; returns how (``systemd`` or ``fork``).

    ``entry`` is the absolute name of a module of this collection, which the caller must import itself, or Ansible ships
    the caller's module without it; ``ticket`` the path of the file that tells it what to do.  The caller must wait for
    its own sign that the process is at work.  ``before_end_of`` names systemd services that must still be there when the
    process is told to end.
    """
    values = {"payload": payload, "entry": entry, "ticket": ticket}
    runner = shutil.which("systemd-run")
    if runner and os.path.isdir("/run/systemd/system") and os.geteuid() == 0:
        command = [
            runner,
            "--quiet",
            "--collect",
            f"--unit={unit}",
            f"--description={description}",
            "--property=UMask=0077",
        ]
        # Ordered after them at start means ended before them at shutdown.
        command += [f"--property=After={service}" for service in before_end_of]
        if _run([*command, sys.executable, "-I", "-c", _BOOTSTRAP.format(**values)]) == 0:
            return "systemd"
    if _run([sys.executable, "-I", "-c", _DOUBLE_FORK.format(**values)]) != 0:
        raise VmkeeperError(f"Could not start {description}", advice="See the system log")
    return "fork"


def _run(command: list[str]) -> int:
    return subprocess.run(  # pylint: disable=ansible-bad-function
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=True,
        cwd="/",
        start_new_session=True,
        check=False,
        timeout=30,
    ).returncode


def module_name(relative: str) -> str:
    """The absolute name of a module of ``module_utils`` for :func:`launch`, such as ``safety.watch``."""
    return f"{__name__.rpartition('.safety.')[0]}.{relative}"


def path_of_worker(identifier: str) -> str:
    """Where :func:`worker_directory` makes that of a worker."""
    return os.path.join(places.WORKERS, identifier)


def worker_directory(identifier: str) -> str:
    """A private directory for one worker's ticket, payload and progress; survives a reboot."""
    return places.private_directory(path_of_worker(identifier))
