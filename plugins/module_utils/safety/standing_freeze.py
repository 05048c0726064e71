# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Freeze guests on request and leave them frozen, with a deadline that the hypervisor keeps; thaw them again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .._errors import AgentSilent, Conflict, NotFound, Refused, VmkeeperError
from ..hypervisor import agent
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import message_of
from ..hypervisor.domain_model import Domain, read_domain
from . import consistency, guard, locks, release
from . import thaw as thawing
from .ticket import Ticket, Ward, forget, tickets_of


@dataclass(frozen=True)
class Condition:
    """One domain's answer. ``filesystems`` are the guest's mountpoints concerned; ``deadline_at`` is ISO 8601.

    ``adopted``: somebody else had frozen it before, and which of its filesystems nobody can tell.
    """

    domain: str
    frozen: bool
    filesystems: tuple[str, ...]
    deadline_at: str | None
    changed: bool
    was_frozen: bool = False
    adopted: bool = False

    def as_result(self) -> dict[str, Any]:
        """``{domain, frozen, filesystems, deadline_at}``."""
        return {
            "domain": self.domain,
            "frozen": self.frozen,
            "filesystems": list(self.filesystems),
            "deadline_at": self.deadline_at,
        }


def standing_ticket(uuid: str) -> Ticket | None:
    """The ticket of a freeze on request that is still under guard."""
    return next((ticket for ticket in tickets_of(uuid) if ticket.standing() and ticket.watched()), None)


def is_whole(uuid: str) -> bool:
    """Whether the freeze that stands is ours and of all filesystems: only then does it prove anything."""
    ticket = standing_ticket(uuid)
    return ticket is not None and ticket.whole


def freeze(
    uri: str, handles: Sequence[Any], *, mountpoints: Sequence[str] | None, deadline: float, check: bool = False
) -> list[Condition]:
    """``state: frozen``. All domains or none: where one cannot be frozen, those that were are thawed again."""
    with _locked(handles, "fsfreeze", check):
        candidates = [_Candidate.of(handle, mountpoints, check) for handle in handles]
        missing = [candidate for candidate in candidates if candidate.ticket is None]
        if missing and not check:
            _freeze_under_guard(uri, missing, mountpoints, deadline)
        return [
            Condition(
                candidate.domain.name,
                frozen=True,
                filesystems=() if candidate.adopts else tuple(mountpoints or candidate.mountpoints),
                deadline_at=candidate.ticket.deadline_at() if candidate.ticket else None,
                changed=candidate in missing,
                was_frozen=candidate.frozen,
                adopted=candidate.adopts,
            )
            for candidate in candidates
        ]


@dataclass
class _Candidate:
    """A domain that is to be frozen; ``ticket`` is that of the freeze that it has, or gets."""

    handle: Any
    domain: Domain
    info: agent.AgentInfo | None
    frozen: bool
    mountpoints: tuple[str, ...]
    ticket: Ticket | None

    @property
    def adopts(self) -> bool:
        """Somebody else has frozen it; here it only gets a guard."""
        return self.frozen and (self.ticket is None or self.ticket.adopted)

    @classmethod
    def of(cls, handle: Any, wanted: Sequence[str] | None, check: bool) -> _Candidate:
        """Look at a domain; raises where it cannot be frozen as asked."""
        domain = read_domain(handle)
        if not check:
            release.release_orphans(domain.uuid)
        info, problem, frozen, told = None, None, False, False
        if domain.state.running and domain.agent_configured:
            info, problem, frozen = agent.ask(handle)
            told = info is not None and info.can_tell_frozen and problem is None
        # A frozen guest's agent has the freeze itself switched off, which is no obstacle.
        obstacle = None if frozen else consistency.agent_obstacle(domain, info, problem)
        if obstacle:
            raise AgentSilent(
                f"Domain {domain.name!r} cannot be frozen: {obstacle}",
                advice="It must run, with qemu-guest-agent started in the guest and its channel in the definition",
            )
        if told and not frozen and not check:
            # Others have thawed it since. Its guard would act at a deadline that is not that of the freeze to come.
            _dismiss_standing(domain.uuid)
        ticket = standing_ticket(domain.uuid) if frozen else None
        if ticket is not None and ticket.mountpoints != tuple(wanted or ()):
            raise Conflict(
                f"The guest of domain {domain.name!r} is frozen already, on "
                + (", ".join(ticket.mountpoints) or "all filesystems"),
                advice="Thaw it first (state: thawed)",
            )
        mountpoints = () if frozen else agent.mountpoints(handle)
        _check_mountpoints(domain, mountpoints, wanted)
        return cls(handle, domain, info, frozen, mountpoints, ticket)


def _locked(handles: Sequence[Any], operation: str, check: bool) -> Any:
    if check:
        return contextlib.nullcontext()
    return locks.hold([(handle.UUIDString(), handle.name()) for handle in handles], operation)


def _check_mountpoints(domain: Domain, existing: tuple[str, ...], wanted: Sequence[str] | None) -> None:
    """The agent silently ignores mountpoints that do not exist; a person who named one believes that it is frozen."""
    unknown = [name for name in wanted or () if existing and name not in existing]
    if unknown:
        raise NotFound(
            f"The guest of domain {domain.name!r} has nothing mounted on {', '.join(unknown)}",
            advice="Its mountpoints are: " + ", ".join(existing),
            existing=list(existing),
        )


def _freeze_under_guard(
    uri: str, candidates: Sequence[_Candidate], mountpoints: Sequence[str] | None, deadline: float
) -> None:
    """Freeze all, each under a ticket of its own, so that each can be thawed for itself later."""
    names = ", ".join(candidate.domain.name for candidate in candidates)
    try:
        for candidate in candidates:
            if not candidate.frozen:
                agent.flush(candidate.handle, candidate.info)
            candidate.ticket = _arm(uri, candidate, mountpoints, deadline)
        with ThreadPoolExecutor(max_workers=len(candidates)) as pool:
            list(pool.map(lambda one: _freeze_one(one, mountpoints, deadline), candidates))
        for candidate in candidates:
            if candidate.ticket is not None:
                guard.check(candidate.ticket)
                candidate.ticket.enter_phase("standing")
    except BaseException as error:
        left = [candidate.domain.name for candidate in candidates if not _give_up(candidate)]
        if not isinstance(error, (libvirt.libvirtError, VmkeeperError)):
            raise
        raise AgentSilent(
            f"Freezing {names} failed: {error.problem if isinstance(error, VmkeeperError) else message_of(error)}",
            state=f"The guard on this host goes on thawing {', '.join(left)}." if left else "Every guest was thawed.",
            advice="See the guest agent's log in the guest",
        ) from error


def _arm(uri: str, candidate: _Candidate, mountpoints: Sequence[str] | None, deadline: float) -> Ticket:
    domain = candidate.domain
    previous = agent.response_timeout(candidate.handle)
    ward = Ward(domain.uuid, domain.name, domain.runtime_id, thaw=True, resume=False, agent_timeout=previous)
    return guard.arm(
        uri,
        [ward],
        seconds=deadline,
        purpose="fsfreeze",
        mountpoints=mountpoints or (),
        adopted=candidate.frozen,
    )


def _freeze_one(candidate: _Candidate, mountpoints: Sequence[str] | None, deadline: float) -> None:
    if candidate.ticket is None:
        return
    candidate.ticket.enter_phase("freeze")
    guard.check(candidate.ticket)
    if candidate.frozen:
        return  # frozen by other means, without a deadline: now it has one
    with agent.finite_timeout(candidate.handle, agent.freeze_limit(deadline)):
        if not candidate.handle.fsFreeze(list(mountpoints) if mountpoints else None):
            raise AgentSilent(f"The guest agent of domain {candidate.domain.name!r} froze no filesystem", state="")


def _give_up(candidate: _Candidate) -> bool:
    """Thaw what may be frozen, also when the freeze failed, and then twice; False leaves it to the guard."""
    if candidate.ticket is None:
        return True
    if candidate.ticket.began() is not None:
        if not thawing.thaw(candidate.handle, times=2)[0]:
            return False
        _put_timeout_back(candidate.handle, candidate.ticket)
    _dismiss(candidate.ticket)
    return True


def _put_timeout_back(handle: Any, ticket: Ticket) -> None:
    """A thaw leaves libvirt's time limit for the agent short; it was another one before."""
    for ward in ticket.wards:
        with contextlib.suppress(VmkeeperError):
            agent.set_response_timeout(handle, ward.agent_timeout)


def _dismiss(ticket: Ticket) -> None:
    ticket.tear_up()
    forget(ticket.path)


def _dismiss_standing(uuid: str) -> None:
    """Send the guards of a domain's freezes on request home: it is thawed."""
    for ticket in tickets_of(uuid):
        if ticket.standing():
            _dismiss(ticket)


def thaw(handles: Sequence[Any], *, check: bool = False) -> list[Condition]:
    """``state: thawed``. A domain that does not run is thawed by definition."""
    with _locked(handles, "fsfreeze", check):
        thawed, failed = [], []
        for handle in handles:
            # One that cannot be thawed keeps no other frozen.
            try:
                thawed.append(_thaw_one(handle, check))
            except VmkeeperError as error:
                failed.append(error)
        if failed:
            done = ", ".join(one.domain for one in thawed if one.changed)
            first = failed[0]
            first.problem = "; ".join(one.problem for one in failed)
            first.now(f"{first.state} Thawed: {done}." if done and not check else first.state)
            raise first
        return thawed


def _thaw_one(handle: Any, check: bool) -> Condition:
    domain = read_domain(handle)
    tickets = tickets_of(domain.uuid)
    if thawing.comes_back_frozen(domain.state, managed_save=domain.managed_save):
        # Of what is in a file of somebody's, only the guard of a freeze on request waits for the return.
        _refuse_saved(domain, [one for one in tickets if domain.managed_save or one.standing()], check)
    if not domain.state.active or not domain.agent_configured:
        return Condition(domain.name, frozen=False, filesystems=(), deadline_at=None, changed=False)
    if not domain.state.running:
        raise AgentSilent(
            f"Domain {domain.name!r} is {domain.state.name}, so its agent cannot thaw", advice="Resume it first"
        )
    was_frozen = agent.is_frozen(handle)
    mountpoints: tuple[str, ...] = ()
    if not check:
        if was_frozen:
            with agent.finite_timeout(handle, agent.PROMPT_SECONDS):
                proven, _ended = thawing.thaw(handle)
            if not proven:
                raise AgentSilent(
                    f"Domain {domain.name!r} is not known to be thawed after the thaw",
                    state="A guard on this host goes on thawing." if tickets else "The guest may be frozen.",
                    advice="Run this again; if the agent hangs, restart qemu-guest-agent in the guest",
                )
            mountpoints = agent.mountpoints(handle)
        _dismiss_standing(domain.uuid)
    return Condition(domain.name, False, mountpoints, None, changed=was_frozen, was_frozen=was_frozen)


def _refuse_saved(domain: Domain, tickets: Sequence[Ticket], check: bool) -> None:
    """Nothing thaws a memory image; a guard does when the domain runs again, so there must be one while there are tickets."""
    if not tickets:
        return
    if not check:
        for ticket in tickets:
            if not ticket.watched():
                guard.post(ticket)
    raise Refused(
        f"Domain {domain.name!r} was saved to disk before its freeze had ended, and cannot be thawed there",
        state="The guard on this host thaws it when it runs again, at the deadline of the freeze or, if that has passed, at once.",
        advice="Start or restore the domain, and run this again",
    )
