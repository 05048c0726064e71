# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What will change, how and why: decided from facts alone, before anything is touched.

Each kind of thing has a plan of its own; here they become one set, in which a restart that one of them needs carries the others.
"""

from __future__ import annotations

from dataclasses import replace

from .._errors import InvalidInput
from .change import LIVE, NEXT_BOOT, NONE, RESTART, Change, ChangeSet, decide
from .definition import Wish, configured_memory
from .disk_plan import disk_changes
from .facts import Facts
from .memory_plan import memory_changes
from .preconditions import check_condition, check_host, check_restart
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
        changes += disk_changes(request, disk, facts)
    if any(change.how == RESTART for change in changes):
        changes = [_carried_by_restart(change) for change in changes]
    check_host(request, facts, changes)
    wish = Wish(request.vcpus, request.max_vcpus, request.memory, request.max_memory)
    planned = ChangeSet(tuple(changes), wish, tuple(pending))
    if planned.restart:
        check_restart(request, facts)
    return planned


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
            request.memory or configured_memory(conf),
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
