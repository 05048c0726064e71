# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one family of failures.

Every failure that reaches a user is a :class:`VmkeeperError`: a sentence that says what was wrong with what,
the state that everything is in now, and the way out.  ``_module`` turns it into ``fail_json``; nothing else does.
"""

from __future__ import annotations

from typing import Any

UNCHANGED = "Nothing was changed."


class VmkeeperError(Exception):
    """A failure that a person can act on.

    ``problem`` says what was being done to what, and why it failed; ``state`` what is true now; ``advice`` what to do.
    ``facts`` are machine-readable details, returned beside the message under ``error``.
    """

    kind = "failed"

    def __init__(self, problem: str, *, advice: str = "", state: str = UNCHANGED, **facts: Any) -> None:
        self.problem = problem.strip()
        self.advice = advice.strip()
        self.state = state.strip()
        self.facts = facts
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = (self.problem, self.state, self.advice)
        return " ".join(part if part[-1] in ".!?" else f"{part}." for part in parts if part)

    def now(self, state: str) -> None:
        """Say another state: what was true when it was raised is not any more."""
        self.state = state.strip()
        self.args = (str(self),)

    def as_result(self) -> dict[str, Any]:
        """The ``error`` key of a failed module: ``{kind, problem, state, advice, ...facts}``."""
        return {
            "kind": self.kind,
            "problem": self.problem,
            "state": self.state,
            "advice": self.advice,
            **self.facts,
        }


class InvalidInput(VmkeeperError):
    """An option that cannot mean anything, or means something unsafe."""

    kind = "invalid_input"


class NotFound(VmkeeperError):
    """Something named does not exist; ``facts['existing']`` holds the names that do."""

    kind = "not_found"


class Unsupported(VmkeeperError):
    """This host, libvirt, QEMU or guest cannot do it."""

    kind = "unsupported"


class Refused(VmkeeperError):
    """It could be done and would hurt."""

    kind = "refused"


class Conflict(VmkeeperError):
    """What exists under that name differs from what was asked."""

    kind = "conflict"


class Busy(VmkeeperError):
    """Another run, job or process holds what is needed; ``facts['holder']`` names it."""

    kind = "busy"


class NoSpace(VmkeeperError):
    """A filesystem has too little room; ``facts`` hold ``path``, ``needed`` and ``free`` in bytes."""

    kind = "no_space"


class AgentSilent(VmkeeperError):
    """The guest agent is missing, does not answer, or may not do what is needed."""

    kind = "agent"


class Unfinished(VmkeeperError):
    """An earlier operation on the domain was interrupted and must be settled first."""

    kind = "unfinished"


class LibvirtFailed(VmkeeperError):
    """libvirt refused or failed; ``facts['libvirt']`` is its own message."""

    kind = "libvirt"
