# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which consistency level a point may claim, and whether to freeze for it. Pure decisions."""

from __future__ import annotations

from dataclasses import dataclass

from .._errors import AgentSilent, InvalidInput, Refused
from ..hypervisor.agent import AgentInfo
from ..hypervisor.domain_model import Domain, DomainState

LEVELS = ("application", "filesystem", "memory", "offline", "crash")
QUIESCED = ("application", "filesystem")

#: What satisfies ``quiesce: required`` in something that was made before: nothing has to be replayed.
CLEAN = (*QUIESCED, "offline")


@dataclass(frozen=True)
class FreezeDecision:
    """Whether to freeze, and the reason when a freeze that was wished for is not possible."""

    freeze: bool
    why_not: str | None = None


def agent_obstacle(domain: Domain, agent: AgentInfo | None, agent_problem: str | None = None) -> str | None:
    """Why this domain cannot be frozen now, or None."""
    if not domain.state.active:
        return "the domain is shut off"
    if not domain.state.running:
        return f"the domain is {domain.state.name}, so its agent cannot answer"
    if not domain.agent_configured:
        return "the domain has no guest agent channel"
    if agent is None:
        return agent_problem or "the guest agent does not answer"
    if not agent.can_freeze:
        return "the guest agent does not allow freezing filesystems"
    return None


def decide_freeze(policy: str, domain: Domain, obstacle: str | None, *, with_memory: bool) -> FreezeDecision:
    """Apply ``quiesce`` (auto, required, never, shutdown) to one domain."""
    if with_memory:
        if policy == "required":
            raise InvalidInput(
                f"A snapshot of {domain.name!r} with memory cannot be quiesced: it would bring back a frozen guest",
                advice="Leave out quiesce (memory and disks are from one instant anyway), or leave out memory",
            )
        return FreezeDecision(False)
    if policy == "never" or policy == "shutdown" or not domain.state.active:
        return FreezeDecision(False)
    if obstacle is None:
        return FreezeDecision(True)
    if policy == "required":
        raise AgentSilent(
            f"Domain {domain.name!r} cannot be frozen, and quiesce is required: {obstacle}",
            advice="Install and start qemu-guest-agent in the guest, or use quiesce: auto to accept a crash-consistent result",
        )
    return FreezeDecision(False, obstacle)


def respect_freeze(policy: str, domain: Domain, *, whole: bool) -> FreezeDecision:
    """Apply ``quiesce`` to a guest that is frozen already: a second freeze would fail, and the thaw belongs to whoever froze it.

    ``whole``: by the fsfreeze module, and all of it.
    """
    if not whole and policy == "required":
        raise Refused(
            f"The guest of domain {domain.name!r} is frozen already, by other means and perhaps not wholly; quiesce is required",
            advice="Thaw it first (vmkeeper.libvirt.fsfreeze with state: thawed)",
        )
    return FreezeDecision(False, None if whole else "it was frozen by other means, and perhaps not wholly")


def level(
    state: DomainState,
    *,
    frozen_over_cut: bool = False,
    hook_proved: bool = False,
    with_memory: bool = False,
    managed_save: bool = False,
) -> str:
    """The consistency level of a point taken of a domain that was in ``state`` at the cut.

    ``offline`` needs libvirt's own word that the guest shut down; after a daemon restart or a host reboot the reason is
    ``unknown``, and then only ``crash`` is true.  A paused guest still holds dirty pages in RAM.
    """
    if with_memory and state.active:
        return "memory"
    if frozen_over_cut:
        return "application" if hook_proved else "filesystem"
    if not state.active and state.reason == "shutdown" and not managed_save:
        return "offline"
    return "crash"
