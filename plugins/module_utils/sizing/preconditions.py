# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What must hold before a domain's size is changed: its own condition, what the host has left, who tells whether it is well."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from .._errors import AgentSilent, Busy, Refused
from ..safety import space
from ..safety.space import human
from . import shrinking
from .change import LIVE, NEXT_BOOT, Change, DiskGrowth, DiskShrink
from .facts import Facts
from .request import Request


def check_condition(request: Request, facts: Facts) -> None:
    """Raise for a domain in whose condition nothing may change, or that could not take it."""
    domain = facts.live or facts.configured
    if domain.managed_save:
        raise Refused(
            f"Domain {domain.name!r} has a saved state, whose RAM would resume on other hardware",
            advice="Start it, or drop the saved state (virsh managedsave-remove), then run this again",
        )
    if facts.job:
        raise Busy(f"Domain {domain.name!r} is busy with {facts.job}", advice="Wait for it to end, then run this again")
    if facts.frozen:
        raise Refused(
            f"The filesystems of domain {domain.name!r} are frozen", advice="Thaw it with fsfreeze: state: thawed"
        )
    if facts.live is not None and not facts.live.state.running and request.apply != NEXT_BOOT:
        raise Refused(
            f"Domain {domain.name!r} is {domain.state.name} ({domain.state.reason}), so its guest cannot take anything",
            advice="Resume it first, or use apply: next_boot",
        )
    if not domain.persistent and request.apply == NEXT_BOOT:
        raise Refused(
            f"Domain {domain.name!r} is transient: it has no next boot", advice="Use apply: live, or define it first"
        )


def check_limit(facts: Facts, changes: Iterable[Change]) -> None:
    """Raise where the kernel would end QEMU as soon as its guest uses the memory that it gets; hugepages are not counted there."""
    for change in changes:
        if change.what != "memory" or not change.due or facts.configured.hugepages is not None:
            continue
        # Live memory is in the definition of the next start, too.
        bounded = [facts.configured, *([facts.live] if facts.live is not None and change.how == LIVE else [])]
        limit = min((domain.hard_limit for domain in bounded if domain.hard_limit is not None), default=None)
        before, after = change.before or 0, change.after or 0
        if limit is not None and before < after >= limit:
            raise Refused(
                f"Domain {facts.name!r} would have {human(after)} of memory, and its QEMU may use {human(limit)}"
                " (hard_limit of its memtune), its own needs included",
                advice=f"Raise the limit first (virsh memtune {facts.name} --hard-limit ... --config"
                f"{' --live' if facts.live is not None else ''}), or give less",
            )


def check_host(request: Request, planned: Iterable[tuple[Facts, Iterable[Change]]]) -> None:
    """Raise where the host has less than all these domains together would take, unless the task over-commits."""
    if request.overcommit:
        return
    memory: dict[int | None, int] = {}  # by the size of its pages, None for ordinary memory
    disks: list[tuple[str, int]] = []
    names = []
    host = None
    for facts, changes in planned:
        host = facts.host
        names.append(repr(facts.name))
        for change in changes:
            if not change.due:
                continue
            disks += _room(change)
            if change.before is None or change.after is None or change.after <= change.before:
                continue
            if change.what == "vcpus" and change.after > host.cpus:
                raise Refused(
                    f"Domain {facts.name!r} would have {change.after} vCPUs, and this host has {host.cpus} CPUs",
                    advice="Give fewer, or overcommit: true",
                )
            if change.what == "memory":
                page = host.page_of(facts.configured)
                memory[page] = memory.get(page, 0) + change.after - change.before
    if host is None:
        return
    who = f"Domain{'s' if len(names) > 1 else ''} {', '.join(names)}"
    for page, growth in memory.items():
        free = host.free_memory if page is None else host.free_hugepages.get(page, 0) * page
        if free is not None and growth > free:
            kind = "memory" if page is None else f"hugepages of {human(page)}"
            raise Refused(
                f"{who} would take {human(growth)} more, and this host has {human(free)} of {kind} available",
                advice="Give less, or overcommit: true",
            )
    space.require(
        disks,
        f"Resizing disks of {who[0].lower()}{who[1:]}",
        advice="Make room there, or use overcommit: true to promise more than there is",
    )


def _room(change: Change) -> list[tuple[str, int]]:
    """``(directory, bytes)`` that a disk's change may take in time, or takes at once."""
    action = change.action
    if isinstance(action, DiskGrowth) and action.kind == "file" and action.path is not None:
        return [(os.path.dirname(os.path.realpath(action.path)), (change.after or 0) - (change.before or 0))]
    if isinstance(action, DiskShrink):
        with contextlib.suppress(OSError):  # whoever copies it says what is wrong with it
            return [shrinking.room_for_copy(action.path, action.format)]
    return []


def check_restart(request: Request, facts: Facts) -> None:
    """Before a restart there must be a way to tell whether it went well."""
    if facts.live is None:
        # Only a shrink starts a domain that is off. What its agent allows is known when it answers.
        if not facts.configured.agent_configured:
            raise AgentSilent(
                f"Domain {facts.name!r} must be started, and nothing would tell whether it is well then:"
                " it has no guest agent channel",
                advice="Give it one, and qemu-guest-agent in the guest",
            )
        return
    if request.health_command is not None:
        if facts.agent is None or not facts.agent.can_execute:
            raise AgentSilent(
                f"health_command cannot be run in domain {facts.name!r}: "
                + (facts.agent_problem or "the guest agent does not allow guest-exec"),
                advice="Enable guest-exec in the guest's agent, or leave health_command out",
            )
        return
    if request.rollback and facts.agent is None:
        raise AgentSilent(
            f"Domain {facts.name!r} must be restarted, and nothing would tell whether it is well then: {facts.agent_problem}",
            advice="Install qemu-guest-agent in the guest, or use rollback: false",
        )
