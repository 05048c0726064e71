# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ticket between the one who freezes and the guard: who is frozen, for how long, by whom.

A ticket is a file under ``/run``: it means nothing after a reboot.  ``<id>.json`` is written by the owner before the guard is
started and never again; removing it sends the guard home.  ``<id>.phase`` is the log of the window: appended to by the
owner inside the window and by the guard when it acts (tmpfs writes, no fsync), so that their order tells what still held
when.  It outlives the window, for whoever has to judge the cut.

Phases: ``freeze`` and ``suspend`` (about to; the deadline runs from the first of them), ``frozen``, ``suspended``, ``cut``,
``cut-done``, ``held:<uuid>`` (proved frozen after the cut), ``standing`` (a freeze on request that outlives its owner),
``fired`` (the guard is about to thaw), ``thawed``.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from . import places
from .processes import ProcessIdentity


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
class Moment:
    """When a phase was entered: on CLOCK_MONOTONIC, which all processes of this boot share, and for people."""

    monotonic: float
    wall: float


@dataclass(frozen=True)
class Ticket:
    """``seconds`` is how long a freeze or pause may last; ``mountpoints`` are empty when all filesystems are meant.

    ``adopted``: somebody else had frozen the guest before; what of it is frozen, the agent cannot tell.
    """

    path: str
    uri: str
    wards: tuple[Ward, ...]
    seconds: float
    purpose: str
    owner: tuple[int, str]
    mountpoints: tuple[str, ...] = field(default=())
    adopted: bool = False

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
        """Write the ticket, before its guard is started."""
        places.write_json(self.path, asdict(self))

    @classmethod
    def read(cls, path: str) -> Ticket | None:
        """The ticket at ``path``; None once it is torn up."""
        content = places.read_json(path)
        if not isinstance(content, dict):
            return None
        content["wards"] = tuple(Ward(**ward) for ward in content["wards"])
        content["owner"] = tuple(content["owner"])
        content["mountpoints"] = tuple(content["mountpoints"])
        return cls(**content)

    @property
    def exists(self) -> bool:
        """Not torn up yet."""
        return os.path.lexists(self.path)

    @property
    def whole(self) -> bool:
        """Whether the freeze is ours and of all filesystems."""
        return not self.mountpoints and not self.adopted

    @property
    def owner_alive(self) -> bool:
        """The run that armed the guard is still there."""
        return ProcessIdentity(*self.owner).alive

    def watched(self) -> bool:
        """Whether a guard holds this ticket now."""
        return places.is_held(self.path)

    def thaws(self, uuid: str, runtime_id: int | None) -> bool:
        """Whether this ticket is about that very run of a domain, and ends with its thaw."""
        return any((ward.uuid, ward.runtime_id) == (uuid, runtime_id) and ward.thaw for ward in self.wards)

    def enter_phase(self, phase: str) -> None:
        """Note that owner or guard got there. Survives both, not the host."""
        descriptor = os.open(self._stem + ".phase", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, f"{phase} {time.monotonic():.6f} {time.time():.3f}\n".encode())
        finally:
            os.close(descriptor)

    def phases(self) -> dict[str, Moment]:
        """Phase -> when it was first entered."""
        return phases_of(self.path)

    def began(self) -> Moment | None:
        """When the first guest was about to be frozen or paused."""
        phases = self.phases()
        begun = [phases[name] for name in ("freeze", "suspend") if name in phases]
        return min(begun, key=lambda moment: moment.monotonic) if begun else None

    def overdue(self) -> bool:
        """Whether the deadline has passed. It does not run before anything is frozen."""
        began = self.began()
        return began is not None and time.monotonic() >= began.monotonic + self.seconds

    def deadline_at(self) -> str | None:
        """The deadline in ISO 8601, once it runs."""
        began = self.began()
        if began is None:
            return None
        moment = datetime.datetime.fromtimestamp(began.wall + self.seconds, datetime.timezone.utc)
        return moment.isoformat(timespec="seconds")

    def standing(self) -> bool:
        """Whether the freeze is meant to outlive its owner."""
        return "standing" in self.phases()

    def fired(self) -> bool:
        """Whether the guard broke the window."""
        return "fired" in self.phases()

    def tear_up(self) -> None:
        """Everybody is safe, or looked after by another. The phases stay until :func:`forget`."""
        for suffix in (".json", ".zip"):
            places.unlink_quietly(self._stem + suffix)


def phases_of(path: str) -> dict[str, Moment]:
    """The phases of a ticket that may be torn up already."""
    found: dict[str, Moment] = {}
    with contextlib.suppress(OSError), open(path[: -len(".json")] + ".phase", encoding="ascii") as stream:
        for line in stream:
            parts = line.split()
            if len(parts) == 3:
                found.setdefault(parts[0], Moment(float(parts[1]), float(parts[2])))
    return found


def forget(path: str) -> None:
    """Remove the phases of a ticket, once the cut is judged."""
    places.unlink_quietly(path[: -len(".json")] + ".phase")


def tickets_of(uuid: str, *, directory: str = places.GUARDS) -> Sequence[Ticket]:
    """The tickets that name a domain."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    except OSError:
        return []
    found = []
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(Ticket.read(os.path.join(directory, name)))
    return [ticket for ticket in found if ticket is not None and any(ward.uuid == uuid for ward in ticket.wards)]
