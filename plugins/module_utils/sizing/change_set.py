# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What will change, how and why: decided from facts alone, before anything is touched.

Each kind of thing has a plan of its own; here they become one set, in which a restart that one of them needs carries the others.
"""

from __future__ import annotations

from dataclasses import replace

from .._errors import InvalidInput
from ..hypervisor.domain_model import Domain, DomainState, parse_domain
from ..safety.space import human
from .change import LIVE, NEXT_BOOT, NONE, RESTART, Change, ChangeSet, decide
from .definition import Wish, resized
from .disk_plan import disk_changes
from .facts import Facts
from .memory_plan import memory_changes
from .preconditions import check_condition, check_host, check_limit, check_restart
from .request import Request
from .vcpu_plan import vcpu_changes


def compute(request: Request, facts: Facts) -> ChangeSet:
    """The change set; raises what a person must decide, before anything was changed."""
    check_condition(request, facts)
    changes: list[Change] = []
    pending: list[str] = []
    for change, waits in (vcpu_changes(request, facts), memory_changes(request, facts), _limits(request, facts)):
        changes += change
        pending += waits
    for disk in request.disks:
        disk_change, waits = disk_changes(request, disk, facts)
        changes += disk_change
        pending += waits
    if any(change.how == RESTART for change in changes):
        changes = [_carried_by_restart(change) for change in changes]
    check_limit(facts, changes)
    check_host(request, [(facts, changes)])
    wish = Wish(request.vcpus, request.max_vcpus, request.memory, request.max_memory)
    definition = resized(facts.definition, wish) if facts.definition is not None else None
    planned = ChangeSet(tuple(changes), wish, tuple(pending), definition)
    if definition is not None:
        _check_definition(request, facts, parse_domain(definition, DomainState("shutoff")))
    if planned.restart:
        check_restart(request, facts)
    return planned


def _check_definition(request: Request, facts: Facts, new: Domain) -> None:
    """Refuse what libvirt would not start, or not even store."""
    total, limit = new.memory_max, new.memory_limit
    wanted = request.max_memory
    if wanted is not None and limit is not None and (total > limit or limit > wanted):
        raise InvalidInput(
            f"max_memory {human(wanted)} is less than what domain {facts.name!r} would have, {human(total)} with what its balloon"
            " and its memory devices could give it",
            advice="Raise max_memory",
        )
    most = facts.host.most_vcpus
    if most is not None and new.vcpus_max > most and new.vcpus_max > facts.configured.vcpus_max:
        raise InvalidInput(
            f"Domain {facts.name!r} would have room for {new.vcpus_max} vCPUs, and its machine type"
            f" ({facts.configured.machine}) takes {most} on this host",
            advice="Give fewer",
        )


def _carried_by_restart(change: Change) -> Change:
    """vCPUs and memory need no hot-plug in a domain that is restarted anyway; disks grow live first."""
    if change.what in ("vcpus", "memory") and change.how in (LIVE, NEXT_BOOT):
        return replace(change, how=RESTART, why="the domain is restarted anyway", action=None)
    if change.what in ("max_vcpus", "max_memory") and change.how == NEXT_BOOT:
        return replace(change, how=RESTART, why="the domain is restarted anyway")
    return change


def _limits(request: Request, facts: Facts) -> tuple[list[Change], list[str]]:
    """``max_vcpus`` and ``max_memory``: room that only a start can make."""
    changes, pending = [], []
    conf, live = facts.configured, facts.live
    at = "only a start can make room for it"
    for what, wanted, configured, running, least in (
        (
            "max_vcpus",
            request.max_vcpus,
            conf.vcpus_max,
            live.vcpus_max if live else None,
            request.vcpus or conf.vcpus_current,
        ),
        (
            "max_memory",
            request.max_memory,
            conf.memory_limit,
            live.memory_limit if live else None,
            request.memory or conf.memory_max,
        ),
    ):
        if wanted is None:
            continue
        if wanted < least:
            raise InvalidInput(
                f"{what} {wanted} is less than domain {facts.name!r} uses ({least})", advice=f"Raise {what}"
            )
        decision = decide(
            request,
            facts,
            f"The {what}",
            in_force=running == wanted,
            configured=configured == wanted,
            live=False,
            obstacle=at,
            why="",
        )
        if decision.how != NONE:
            before = configured if running is None or running == wanted else running
            changes.append(Change(what, before, wanted, decision.how, decision.why))
        if decision.pending:
            pending.append(f"{what}: {at}")
    return changes, pending
