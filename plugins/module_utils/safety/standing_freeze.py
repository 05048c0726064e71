# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Freeze guests on request and leave them frozen, with a deadline that the hypervisor keeps; thaw them again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import AgentSilent, NotFound, VmkeeperError
from ..hypervisor import agent
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import message_of
from ..hypervisor.domain_model import Domain, read_domain
from . import consistency, guard, locks, release
from .ticket import Ticket, Ward, tickets_of

_FREEZE_SHARE = 0.6
_LONGEST_LIST = 256
_LONGEST_NAME = 1024


@dataclass(frozen=True)
class Condition:
    """One domain's answer. ``filesystems`` are the guest's mountpoints concerned; ``deadline_at`` is ISO 8601."""

    domain: str
    frozen: bool
    filesystems: tuple[str, ...]
    deadline_at: str | None
    changed: bool
    was_frozen: bool = False

    def as_result(self) -> dict[str, Any]:
        """``{domain, frozen, filesystems, deadline_at}``."""
        return {
            "domain": self.domain,
            "frozen": self.frozen,
            "filesystems": list(self.filesystems),
            "deadline_at": self.deadline_at,
        }


def mountpoints_of(handle: Any) -> tuple[str, ...]:
    """The guest's mounted filesystems as the agent lists them, bounded; empty when it cannot say."""
    try:
        filesystems = handle.fsInfo()
    except libvirt.libvirtError:
        return ()
    names = [str(filesystem[0])[:_LONGEST_NAME] for filesystem in filesystems[:_LONGEST_LIST]]
    return tuple(name for name in names if name.isprintable())


def standing_ticket(uuid: str) -> Ticket | None:
    """The ticket of a freeze on request that is still under guard."""
    return next((ticket for ticket in tickets_of(uuid) if ticket.owner is None and ticket.watched()), None)


def freeze(
    uri: str,
    handles: Sequence[Any],
    *,
    mountpoints: Sequence[str] | None,
    deadline: float,
    check: bool = False,
) -> list[Condition]:
    """``state: frozen``. All domains or none: where one cannot be frozen, those that were are thawed again."""
    with _locked(handles, "fsfreeze", check):
        readied = [_ready(handle, check) for handle in handles]
        domains = [domain for domain, _info in readied]
        present = [agent.is_frozen(handle) for handle in handles]
        tickets = [standing_ticket(domain.uuid) for domain in domains]
        missing = [number for number, frozen in enumerate(present) if not (frozen and tickets[number])]
        lists = [
            _check_mountpoints(domains[n], () if present[n] else mountpoints_of(handles[n]), mountpoints)
            for n in range(len(handles))
        ]
        new: Ticket | None = None
        if missing and not check:
            for number in missing:
                if not present[number]:
                    agent.flush(handles[number], readied[number][1])
            new = _freeze_under_guard(uri, handles, domains, missing, present, mountpoints, deadline)
        conditions = []
        for number, domain in enumerate(domains):
            ticket = new if number in missing else tickets[number]
            conditions.append(
                Condition(
                    domain.name,
                    frozen=True,
                    filesystems=tuple(mountpoints or lists[number] or (ticket.mountpoints if ticket else ())),
                    deadline_at=ticket.deadline_at if ticket else None,
                    changed=number in missing,
                    was_frozen=present[number],
                )
            )
        return conditions


def _locked(handles: Sequence[Any], operation: str, check: bool) -> Any:
    if check:
        return contextlib.nullcontext()
    return locks.hold([(handle.UUIDString(), handle.name()) for handle in handles], operation)


def _ready(handle: Any, check: bool) -> tuple[Domain, agent.AgentInfo | None]:
    domain = read_domain(handle)
    if not check:
        release.release_orphans(domain.uuid)
    info, problem = None, None
    if domain.state.running and domain.agent_configured:
        try:
            info = agent.ask_info(handle)
        except AgentSilent as error:
            problem = error.problem
    obstacle = consistency.agent_obstacle(domain, info, problem)
    if obstacle:
        raise AgentSilent(
            f"Domain {domain.name!r} cannot be frozen: {obstacle}",
            advice="It must run, with qemu-guest-agent started in the guest and its channel in the definition",
        )
    return domain, info


def _check_mountpoints(domain: Domain, existing: tuple[str, ...], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The agent silently ignores mountpoints that do not exist; a person who named one believes that it is frozen."""
    unknown = [name for name in wanted or () if existing and name not in existing]
    if unknown:
        raise NotFound(
            f"The guest of domain {domain.name!r} has nothing mounted on {', '.join(unknown)}",
            advice="Its mountpoints are: " + ", ".join(existing),
            existing=list(existing),
        )
    return existing


def _freeze_under_guard(
    uri: str,
    handles: Sequence[Any],
    domains: Sequence[Domain],
    missing: Sequence[int],
    present: Sequence[bool],
    mountpoints: Sequence[str] | None,
    deadline: float,
) -> Ticket:
    wards = [
        Ward(
            domains[n].uuid,
            domains[n].name,
            domains[n].runtime_id,
            True,
            False,
            agent.response_timeout(handles[n]),
        )
        for n in missing
    ]
    ticket = guard.arm(
        uri,
        wards,
        seconds=deadline,
        purpose="fsfreeze",
        bound_to_this_run=False,
        mountpoints=mountpoints or (),
    )
    begun: list[Any] = []
    try:
        for number in missing:
            handle = handles[number]
            if present[number]:
                continue  # frozen by other means, without a deadline: now it has one
            begun.append(handle)
            with agent.finite_timeout(handle, max(2, int(deadline * _FREEZE_SHARE))):
                frozen = handle.fsFreeze(list(mountpoints) if mountpoints else None)
            if not frozen:
                raise AgentSilent(f"The guest agent of domain {domains[number].name!r} froze no filesystem", state="")
    except BaseException as error:
        # Thaw always, also when the freeze failed, and then twice: it may have frozen all the same.
        thawed = [_thaw_surely(handle) for handle in begun]
        if all(thawed):
            ticket.tear_up()
        if isinstance(error, (libvirt.libvirtError, VmkeeperError)):
            raise AgentSilent(
                f"Freezing {', '.join(domains[n].name for n in missing)} failed: {message_of(error)}",
                state="Every guest was thawed." if not ticket.watched() else "The guard on this host goes on thawing.",
                advice="See the guest agent's log in the guest",
            ) from error
        raise
    return ticket


def _thaw_surely(handle: Any) -> bool:
    for _time in range(2):
        with (
            contextlib.suppress(libvirt.libvirtError, VmkeeperError),
            agent.finite_timeout(handle, agent.PROMPT_SECONDS),
        ):
            handle.fsThaw()
    try:
        return not agent.is_frozen(handle)
    except VmkeeperError:
        return not handle.isActive()


def thaw(handles: Sequence[Any], *, check: bool = False) -> list[Condition]:
    """``state: thawed``. A domain that does not run is thawed by definition."""
    with _locked(handles, "fsfreeze", check):
        return [_thaw_one(handle, check) for handle in handles]


def _thaw_one(handle: Any, check: bool) -> Condition:
    domain = read_domain(handle)
    tickets = tickets_of(domain.uuid)
    if not domain.state.active or not domain.agent_configured:
        return Condition(domain.name, frozen=False, filesystems=(), deadline_at=None, changed=False)
    if not domain.state.running:
        raise AgentSilent(
            f"Domain {domain.name!r} is {domain.state.name}, so its agent cannot thaw",
            advice="Resume it first",
        )
    was_frozen = agent.is_frozen(handle)
    if was_frozen and not check:
        try:
            with agent.finite_timeout(handle, agent.PROMPT_SECONDS):
                handle.fsThaw()
        except libvirt.libvirtError as error:
            raise AgentSilent(
                f"Thawing domain {domain.name!r} failed: {message_of(error)}",
                state="The guest may be frozen; a guard on this host goes on thawing."
                if tickets
                else "The guest may be frozen.",
                advice="Run this again; if the agent hangs, restart qemu-guest-agent in the guest",
            ) from error
        if agent.is_frozen(handle):
            raise AgentSilent(
                f"Domain {domain.name!r} is still frozen after the thaw", state="", advice="Run this again"
            )
    if not check:
        for ticket in tickets:
            if len(ticket.wards) == 1 or not any(
                _other_frozen(handle, ward.uuid) for ward in ticket.wards if ward.uuid != domain.uuid
            ):
                ticket.tear_up()
    filesystems = mountpoints_of(handle) if was_frozen and not check else ()
    return Condition(
        domain.name,
        frozen=False,
        filesystems=filesystems,
        deadline_at=None,
        changed=was_frozen,
        was_frozen=was_frozen,
    )


def _other_frozen(handle: Any, uuid: str) -> bool:
    """Whether another ward of a shared ticket still needs its guard."""
    try:
        other = handle.connect().lookupByUUIDString(uuid)
        return bool(other.isActive()) and agent.is_frozen(other)
    except libvirt.libvirtError:
        return False
    except VmkeeperError:
        return True
