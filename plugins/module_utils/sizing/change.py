# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One change of a domain's size: what, from and to, how, why, and the live steps. The order of preference is decided here.

A thing has three values: configured (the next start), live (QEMU now) and what the guest sees.  A change is due when one of
them is not what was asked.  The order of preference is: live, at a restart if the task allows one, at the next boot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .._errors import Refused
from .definition import Wish
from .facts import Facts
from .guest_filesystem import Filesystem
from .request import Request

LIVE = "live"
OFFLINE = "offline"
RESTART = "restart"
NEXT_BOOT = "next_boot"
NONE = "none"


@dataclass(frozen=True)
class VcpuAction:
    """Live steps: how many vCPUs QEMU shall have (None: as now), how many the guest shall have online."""

    plug_to: int | None
    online: int


@dataclass(frozen=True)
class MemoryAction:
    """Live steps in bytes; devices by alias. ``online``: the guest's offline blocks are brought online."""

    balloon: int | None = None
    virtio_mem: tuple[tuple[str, int], ...] = ()
    dimm: int = 0
    unplug: tuple[str, ...] = ()
    online: bool = False


@dataclass(frozen=True)
class DiskGrowth:
    """A disk's virtual size, from and to, in bytes; ``path``, ``format`` and ``kind`` (file, block) of its top image when it is off."""

    target: str
    size: int
    path: str | None
    format: str | None
    kind: str


@dataclass(frozen=True)
class FilesystemGrowth:
    """A filesystem that shall fill its disk of ``disk_size`` bytes."""

    filesystem: Filesystem
    disk_size: int


@dataclass(frozen=True)
class DiskShrink:
    """A disk's smaller virtual size in bytes; ``path`` and ``format`` of its only image."""

    target: str
    size: int
    path: str
    format: str


@dataclass(frozen=True)
class Change:
    """One thing: ``how`` is live, offline (now, on the stopped domain), restart, next_boot or none (``why`` says why)."""

    what: str
    before: int | None
    after: int | None
    how: str
    why: str
    action: Any = None
    ends_checkpoints: tuple[str, ...] = ()
    completes_at_restart: bool = False
    restart_helps: bool = True  #: whether another start could bring what the guest does not take live
    warn: bool = False  #: that nothing is done is no success

    @property
    def due(self) -> bool:
        """Whether something will be done."""
        return self.how != NONE

    def as_result(self, *, applied: str | None = None, guest_sees: int | None = None, why: str = "") -> dict[str, Any]:
        """One entry of ``changes``."""
        return {
            "what": self.what,
            "before": self.before,
            "after": self.after,
            "guest_sees": guest_sees,
            "applied": applied or self.how,
            "why": why or self.why,
            "ends_checkpoints": list(self.ends_checkpoints),
        }


@dataclass(frozen=True)
class ChangeSet:
    """Everything that will be done to one domain. ``wish`` is what its definition shall say."""

    changes: tuple[Change, ...]
    wish: Wish
    pending: tuple[str, ...] = ()  #: why the next boot will differ from now
    definition: str | None = None  #: of the next start; None of a transient domain

    @property
    def due(self) -> tuple[Change, ...]:
        """The changes of which something will be done."""
        return tuple(change for change in self.changes if change.due)

    @property
    def shrinks(self) -> tuple[DiskShrink, ...]:
        """The disks that get smaller."""
        return tuple(change.action for change in self.changes if isinstance(change.action, DiskShrink))

    @property
    def restart(self) -> bool:
        """Whether the domain is shut down and started again."""
        return any(change.how == RESTART for change in self.changes)


@dataclass(frozen=True)
class Decision:
    """How one thing is changed, and why; ``pending``: the next boot will differ from now."""

    how: str
    why: str
    pending: bool = False


def decide(
    request: Request, facts: Facts, what: str, *, in_force: bool, configured: bool, live: bool, obstacle: str, why: str
) -> Decision:
    """The order of preference, for one thing. ``obstacle`` is why it cannot be done live."""
    persistent = facts.configured.persistent
    if facts.live is None:
        return Decision(NONE, "") if configured else Decision(NEXT_BOOT, "the domain is shut off")
    if in_force:
        if configured or not persistent:
            return Decision(NONE, "")
        return Decision(NEXT_BOOT, "the guest has it already; only the definition did not say so")
    if request.apply == NEXT_BOOT:
        return Decision(NONE if configured else NEXT_BOOT, "apply: next_boot", pending=True)
    if live:
        return Decision(LIVE, why)
    if request.apply == LIVE or not persistent:
        raise Refused(
            f"{what} of domain {facts.name!r} cannot be changed live: {obstacle}",
            advice="Use apply: auto, with allow_restart to have it at once"
            if persistent
            else "It is transient: define it to change it at a restart",
        )
    if request.allow_restart:
        return Decision(RESTART, obstacle)
    return Decision(NONE if configured else NEXT_BOOT, obstacle, pending=True)
