# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sentry beside a running copy of a guest: a process of its own that aborts the job before it hurts the guest.

While a push-mode backup job runs, for a restore point or an image, QEMU copies what the guest is about to overwrite, and
when that copy fails so does the guest's write (QEMU before 10).  So the job ends as soon as the target's filesystem runs
low, or the run that would look after it is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import backup_job, block_jobs
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import open_connection
from . import detached, places
from .journal import Journal
from .processes import ProcessIdentity, myself
from .space import free_bytes, human

#: Room that is left on the target at all times, else the job is aborted: a share of the filesystem, within limits (bytes).
FLOOR_LEAST = 16 << 20
FLOOR_MOST = 256 << 20
FLOOR_SHARE = 20

_POLL_SECONDS = 0.02
_ARMING_SECONDS = 30.0
_LINGER_SECONDS = 10.0


@dataclass(frozen=True)
class Watch:
    """One job: where it pushes, and how many bytes each target has for itself (0: nothing is set aside)."""

    uuid: str
    directory: str
    reserved: Mapping[str, int]


@dataclass(frozen=True)
class Orders:
    """What the sentry must know. ``floor`` in bytes; ``owner`` is a process by number and start time."""

    uri: str
    owner: tuple[int, str]
    floor: int
    watches: tuple[Watch, ...]


def in_danger(free: int, floor: int, headroom: int) -> bool:
    """Whether the job must end: too little is free, and a target is about to need it. Pure."""
    return free < floor and headroom < floor


class Sentry:
    """The owner's side. Nothing is written before :meth:`post`, so that the journal names the directory before it is there."""

    def __init__(self, uri: str, watches: Sequence[Watch], floor: int) -> None:
        identity = myself()
        self._name = f"sentry-{secrets.token_hex(6)}"
        self._directory = detached.path_of_worker(self._name)
        self._orders = Orders(uri, (identity.pid, identity.started), floor, tuple(watches))

    @property
    def directory(self) -> str:
        """Where its orders and its verdict lie."""
        return self._directory

    def post(self) -> None:
        """Write its orders, start the process and wait until it is on watch."""
        detached.worker_directory(self._name)
        places.write_json(_orders(self._directory), asdict(self._orders))
        payload = detached.keep_payload(os.path.join(self._directory, "payload.zip"))
        detached.launch(
            detached.module_name("safety.sentry"),
            self._directory,
            payload=payload,
            unit=f"vmkeeper-{self._name}",
            description="watch over the copy of a running guest",
        )
        give_up = time.monotonic() + _ARMING_SECONDS
        while not places.is_held(_orders(self._directory)):
            if time.monotonic() > give_up:
                raise VmkeeperError(
                    f"The process that watches over the copy did not come up within {_ARMING_SECONDS:.0f} s",
                    advice="See the system log for vmkeeper-sentry",
                )
            time.sleep(0.005)

    def verdict(self) -> str | None:
        """Why it aborted the jobs, or None."""
        try:
            with open(os.path.join(self._directory, "verdict"), encoding="utf-8") as stream:
                return stream.read() or None
        except OSError:
            return None

    def dismiss(self) -> None:
        """The jobs are over."""
        dismiss(self._directory)


def dismiss(directory: str) -> None:
    """Send a sentry home, also one of a run that is dead, and forget it."""
    places.unlink_quietly(_orders(directory))
    shutil.rmtree(directory, ignore_errors=True)


def dismiss_posted(pending: Journal) -> None:
    """The same for the sentry that an operation has posted at its step ``watch``."""
    posted = pending.operation.last("watch")
    if posted and posted.get("sentry"):
        dismiss(posted["sentry"])


def floor(directory: str) -> int:
    """Bytes that stay free on the filesystem of ``directory``, so that no write of a guest can fail."""
    status = os.statvfs(directory)
    return max(FLOOR_LEAST, min(FLOOR_MOST, status.f_blocks * status.f_frsize // FLOOR_SHARE))


def _orders(directory: str) -> str:
    return os.path.join(directory, "orders.json")


def main(directory: str) -> None:
    """Entry point of the process."""
    path = _orders(directory)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    with contextlib.suppress(BlockingIOError, OSError):
        content = _read(path)
        # Everything is ready before the owner may see that we are: it freezes the guest next.
        connection = open_connection(content.uri)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _stand(path, content, connection, directory)
    os.close(descriptor)


def _read(path: str) -> Orders:
    content = places.read_json(path)
    watches = tuple(Watch(**watch) for watch in content["watches"])
    return Orders(content["uri"], (content["owner"][0], content["owner"][1]), content["floor"], watches)


def _stand(path: str, orders: Orders, connection: Any, directory: str) -> None:
    owner = ProcessIdentity(*orders.owner)
    quiet_since: float | None = None
    while os.path.exists(path):
        reason = None
        if not owner.alive:
            reason = "the run that made the copy is dead"
        for watch in orders.watches:
            with contextlib.suppress(OSError):
                free = free_bytes(watch.directory)
                if reason is None and in_danger(free, orders.floor, _headroom(watch)):
                    reason = f"the filesystem of {watch.directory} has only {human(free)} free"
        if reason is not None:
            _write_verdict(directory, reason)
            quiet_since = (quiet_since or time.monotonic()) if _abort_all(orders, connection) else None
            # A begin call of a run that died may still be on its way through libvirtd.
            if quiet_since is not None and not owner.alive and time.monotonic() - quiet_since > _LINGER_SECONDS:
                return
            connection = _reconnect(orders.uri, connection)
        time.sleep(_POLL_SECONDS)


def _headroom(watch: Watch) -> int:
    """Bytes that the target with the least of them can still take of what is set aside for it."""
    left = []
    for name, reserved in watch.reserved.items():
        try:
            left.append(max(0, reserved - os.stat(os.path.join(watch.directory, name)).st_size))
        except OSError:
            left.append(0)
    return min(left, default=0)


def _write_verdict(directory: str, reason: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(
            os.path.join(directory, "verdict"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        os.write(descriptor, reason.encode())
        os.close(descriptor)


def _abort_all(orders: Orders, connection: Any) -> bool:
    """Whether no job of ours runs any more."""
    try:
        for watch in orders.watches:
            try:
                handle = connection.lookupByUUIDString(watch.uuid)
            except libvirt.libvirtError:
                if connection.isAlive():
                    continue
                return False
            backup_job.abort(handle, watch.directory, seconds=5.0)
            block_jobs.resume_starved(handle, seconds=0.0)
    except (libvirt.libvirtError, VmkeeperError):
        return False
    return True


def _reconnect(uri: str, connection: Any) -> Any:
    try:
        if connection.isAlive():
            connection.getLibVersion()
            return connection
    except libvirt.libvirtError:
        pass
    try:
        return open_connection(uri)
    except VmkeeperError:
        return connection
