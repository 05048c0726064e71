# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ticket between the one who freezes and the guard: who is frozen, until when, by whom.

A ticket is a file under ``/run``, so a reboot, which also ends every freeze, removes it.  ``<id>.json`` is written by the
owner before the guard is started and never again; removing it sends the guard home.  ``<id>.phase`` is the log of the
window: appended to by the owner inside the window and by the guard when it acts (tmpfs writes, no fsync), so that their
order tells what still held when.  It outlives a run that died, for the next run to read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from . import places


@dataclass(frozen=True)
class Ward:
    """A domain under guard. ``agent_timeout`` is the value to put back; ``resume`` only if it ran before."""

    uuid: str
    name: str
    runtime_id: int | None
    thaw: bool
    resume: bool
    agent_timeout: int


@dataclass(frozen=True)
class Ticket:
    """``deadline`` is on CLOCK_MONOTONIC, shared by all processes of this boot; ``deadline_at`` is for people."""

    path: str
    uri: str
    wards: tuple[Ward, ...]
    deadline: float
    deadline_at: str
    purpose: str
    owner: tuple[int, str] | None = None
    mountpoints: tuple[str, ...] = field(default=())

    @property
    def names(self) -> str:
        """The wards' names, for messages."""
        return ", ".join(ward.name for ward in self.wards)

    @property
    def _stem(self) -> str:
        return self.path[: -len(".json")]

    @property
    def payload(self) -> str:
        """Where the guard's code is kept."""
        return self._stem + ".zip"

    @classmethod
    def new_path(cls) -> str:
        """A path for a new ticket."""
        return os.path.join(places.private_directory(places.GUARDS), secrets.token_hex(6) + ".json")

    def write(self) -> None:
        """Write or replace the ticket."""
        places.write_json(self.path, asdict(self))

    @classmethod
    def read(cls, path: str) -> Ticket | None:
        """The ticket at ``path``; None once it is torn up."""
        try:
            content = places.read_json(path)
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict):
            return None
        content["wards"] = tuple(Ward(**ward) for ward in content["wards"])
        content["owner"] = tuple(content["owner"]) if content["owner"] else None
        content["mountpoints"] = tuple(content["mountpoints"])
        return cls(**content)

    def watched(self) -> bool:
        """Whether a guard holds this ticket now."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)

    def enter_phase(self, phase: str) -> None:
        """Note that owner or guard got there. Survives both, not the host."""
        descriptor = os.open(self._stem + ".phase", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, f"{phase} {time.monotonic():.6f}\n".encode())
        finally:
            os.close(descriptor)

    def phases(self) -> dict[str, float]:
        """Phase -> when it was first entered (CLOCK_MONOTONIC, seconds)."""
        return phases_of(self.path)

    def suspending(self) -> bool:
        """Whether the owner went so far as to pause guests."""
        return "suspend" in self.phases()

    def mark_fired(self) -> None:
        """The guard is about to thaw."""
        self.enter_phase("fired")

    def fired(self) -> bool:
        """Whether the guard broke the window."""
        return "fired" in self.phases()

    def tear_up(self, *, keep_phases: bool = False) -> None:
        """Everybody is safe; the ticket itself goes first, since that is what the guard looks at."""
        for suffix in (".json", ".zip", *(() if keep_phases else (".phase",))):
            places.unlink_quietly(self._stem + suffix)


def phases_of(path: str) -> dict[str, float]:
    """The phases of a ticket that may be torn up already."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError), open(path[: -len(".json")] + ".phase", encoding="ascii") as stream:
        for line in stream:
            name, _space, moment = line.strip().rpartition(" ")
            found.setdefault(name, float(moment))
    return found


def forget(path: str) -> None:
    """Remove what a guard left of a ticket, once it was read."""
    places.unlink_quietly(path[: -len(".json")] + ".phase")


def tickets_of(uuid: str, *, directory: str = places.GUARDS) -> Sequence[Ticket]:
    """The tickets that name a domain."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    except OSError:
        return []
    found = (Ticket.read(os.path.join(directory, name)) for name in names)
    return [ticket for ticket in found if ticket is not None and any(ward.uuid == uuid for ward in ticket.wards)]
