# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One instant for one or several domains: arm the guard, freeze, suspend, cut, resume, thaw.

This is the only code of the collection that freezes or pauses a guest, for every trade.  Whatever is not the cut itself
(overlays, targets, checks, connections) must be done by the caller before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from .._errors import AgentSilent, LibvirtFailed, VmkeeperError
from ..hypervisor import agent
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import message_of, open_connection
from ..hypervisor.domain_model import DomainState, read_state
from . import freeze_hook, guard, thaw
from .journal import Journal
from .ticket import Ticket, Ward

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """A domain that takes part. ``freeze`` is the decision of :mod:`consistency`; ``required`` makes its failure fatal.

    ``standing``: somebody froze it before (the fsfreeze module) and will thaw it; here it is only watched.
    """

    handle: Any
    uuid: str
    name: str
    state: DomainState
    runtime_id: int | None
    freeze: bool
    required: bool = False
    standing: bool = False
    info: agent.AgentInfo | None = None


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What happened to one member. Exactly one of ``value`` and ``error`` is set; times are in milliseconds.

    ``frozen_over_cut``: the agent said ``frozen`` after the cut and no guard had fired.  ``thawed`` and ``resumed`` are False
    only when that could not be confirmed; the guard is then still at it.
    """

    member: Member
    value: T | None = None
    error: Exception | None = None
    frozen_ms: int | None = None
    paused_ms: int | None = None
    cut_ms: int | None = None
    frozen_over_cut: bool = False
    hook_proved: bool = False
    thawed: bool = True
    resumed: bool = True
    why_not_frozen: str | None = None


def take(
    uri: str,
    members: Sequence[Member],
    cut: Callable[[Member], T],
    *,
    deadline: float,
    purpose: str,
    journal: Journal,
) -> dict[str, Outcome[T]]:
    """Run ``cut(member)`` for all members at one instant; returns the outcome of each by UUID.

    Members whose freeze is required and fails make the whole call raise before any cut.  Errors of a cut are returned,
    not raised, so that the caller can undo the others.
    """
    window = _Window(uri, members, deadline, purpose, journal)
    return window.run(cut)


@dataclass
class _Seat:
    """What the window knows of one member while it runs."""

    member: Member
    previous_timeout: int = agent.BLOCK
    nonce: str | None = None
    freeze_began: float | None = None
    frozen: bool = False
    freeze_error: str | None = None
    held: bool = False
    thaw_ended: float | None = None
    thawed: bool = True
    answering: Any = None
    pause_began: float | None = None
    pause_ended: float | None = None
    value: Any = None
    error: Exception | None = None
    cut_ms: int | None = None

    def outcome(self) -> Outcome[Any]:
        """The frozen record of this seat."""
        frozen_ms = None
        if self.frozen and self.freeze_began is not None and self.thaw_ended is not None:
            frozen_ms = round((self.thaw_ended - self.freeze_began) * 1000)
        paused_ms = None
        if self.pause_began is not None and self.pause_ended is not None:
            paused_ms = round((self.pause_ended - self.pause_began) * 1000)
        return Outcome(
            self.member,
            value=self.value,
            error=self.error,
            frozen_ms=frozen_ms,
            paused_ms=paused_ms,
            cut_ms=self.cut_ms,
            frozen_over_cut=self.held,
            thawed=self.thawed,
            resumed=self.pause_began is None or self.pause_ended is not None,
            why_not_frozen=self.freeze_error,
        )


class _Window:
    def __init__(self, uri: str, members: Sequence[Member], deadline: float, purpose: str, journal: Journal) -> None:
        self._uri = uri
        self._seats = [_Seat(member) for member in members]
        self._deadline = deadline
        self._purpose = purpose
        self._journal = journal
        self._ticket: Ticket | None = None
        # Suspending makes the cuts of several domains one instant; a single domain's cut is one QEMU transaction.
        self._suspends = len(members) > 1

    def run(self, cut: Callable[[Member], T]) -> dict[str, Outcome[T]]:
        freezing = [seat for seat in self._seats if seat.member.freeze]
        pausing = [seat for seat in self._seats if self._suspends and seat.member.state.running]
        _in_threads(lambda seat: agent.flush(seat.member.handle, seat.member.info), freezing)
        if freezing or pausing:
            self._arm(freezing, pausing)
        try:
            self._prepare(freezing)
            try:
                self._freeze(freezing)
                self._suspend(pausing)
                self._cut(cut)
            finally:
                # Each of the three whatever becomes of the one before it.
                try:
                    self._resume(pausing)
                finally:
                    try:
                        self._look_at_standing()
                    finally:
                        self._thaw(freezing)
        except VmkeeperError as error:
            error.state = self._state_after_failure()
            raise
        finally:
            self._stand_down(freezing)
        outcomes = {seat.member.uuid: seat.outcome() for seat in self._seats}
        for seat in freezing:
            if seat.held and freeze_hook.proved(seat.member.handle, seat.nonce):
                outcomes[seat.member.uuid] = replace(outcomes[seat.member.uuid], hook_proved=True)
        return outcomes

    def _state_after_failure(self) -> str:
        left = [seat.member.name for seat in self._seats if not seat.thawed or not seat.outcome().resumed]
        if left:
            return (
                f"Nothing was taken. It is not confirmed that {', '.join(left)} is thawed and running;"
                " the guard on this host goes on with that"
            )
        return "Nothing was taken; every guest runs as before."

    def _arm(self, freezing: Sequence[_Seat], pausing: Sequence[_Seat]) -> None:
        wards = []
        for seat in self._seats:
            if seat in freezing or seat in pausing:
                member = seat.member
                if seat in freezing:
                    seat.previous_timeout = agent.response_timeout(member.handle)
                wards.append(
                    Ward(
                        member.uuid,
                        member.name,
                        member.runtime_id,
                        seat in freezing,
                        seat in pausing,
                        seat.previous_timeout,
                    )
                )
        self._journal.step("arm")
        self._ticket = guard.arm(self._uri, wards, seconds=self._deadline, purpose=self._purpose)
        self._journal.step("armed", ticket=self._ticket.path)

    def _phase(self, name: str) -> None:
        if self._ticket is not None:
            self._ticket.enter_phase(name)
        self._journal.moment(name)

    def _late_phase(self, name: str) -> None:
        """A phase of the way back, where nothing may keep a guest from being thawed."""
        with contextlib.suppress(OSError):
            self._phase(name)

    def _prepare(self, freezing: Sequence[_Seat]) -> None:
        def prepare_one(seat: _Seat) -> None:
            seat.nonce = freeze_hook.prepare(seat.member.handle, seat.member.info)
            # Finite before any freeze: this limit alone frees libvirtd, and us, from an agent that hangs.
            agent.set_response_timeout(seat.member.handle, agent.freeze_limit(self._deadline))

        _in_threads(prepare_one, freezing)

    def _freeze(self, freezing: Sequence[_Seat]) -> None:
        if not freezing:
            return
        self._phase("freeze")
        if self._ticket is not None:
            guard.check(self._ticket)
        _in_threads(self._freeze_one, freezing)
        self._phase("frozen")
        refused = [seat for seat in freezing if not seat.frozen and seat.member.required]
        if refused:
            raise AgentSilent(
                "; ".join(f"Domain {seat.member.name!r} could not be frozen: {seat.freeze_error}" for seat in refused),
                advice="See the guest agent's log in the guest, or use quiesce: auto to accept a crash-consistent result",
            )
        for seat in freezing:
            if not seat.frozen:
                # The agent may have frozen some filesystems all the same; the cut must not hold them any longer.
                self._thaw_one(seat)

    def _freeze_one(self, seat: _Seat) -> None:
        seat.freeze_began = time.monotonic()
        seat.thawed = False  # until it is proved again
        try:
            seat.frozen = seat.member.handle.fsFreeze() > 0
            if not seat.frozen:
                seat.freeze_error = "the agent froze no filesystem"
        except libvirt.libvirtError as error:
            seat.freeze_error = message_of(error)

    def _suspend(self, pausing: Sequence[_Seat]) -> None:
        if not pausing:
            return
        self._phase("suspend")
        if self._ticket is not None:
            guard.check(self._ticket)
        _in_threads(self._suspend_one, pausing)
        self._phase("suspended")
        for seat in pausing:
            if seat.error is not None:
                raise seat.error

    def _suspend_one(self, seat: _Seat) -> None:
        seat.pause_began = time.monotonic()
        try:
            seat.member.handle.suspend()
        except libvirt.libvirtError as error:
            seat.error = LibvirtFailed(f"Domain {seat.member.name!r} could not be paused: {message_of(error)}")

    def _cut(self, cut: Callable[[Member], Any]) -> None:
        def cut_one(seat: _Seat) -> None:
            began = time.monotonic()
            try:
                seat.value = cut(seat.member)
                seat.cut_ms = round((time.monotonic() - began) * 1000)
            except VmkeeperError as error:
                seat.error = error
            except libvirt.libvirtError as error:
                seat.error = LibvirtFailed(
                    f"Cutting domain {seat.member.name!r}: {message_of(error)}", libvirt=message_of(error)
                )
            except Exception as error:  # noqa: BLE001 whatever it is, the other members must be thawed and can be undone
                seat.error = error

        self._phase("cut")
        _in_threads(cut_one, self._seats)
        self._phase("cut-done")
        if self._suspends and self._guard_fired():
            for seat in self._seats:
                seat.error = seat.error or VmkeeperError("The deadline passed before every domain of the group was cut")

    def _resume(self, pausing: Sequence[_Seat]) -> None:
        if any(seat.pause_began is not None for seat in pausing):
            self._journal.moment("resume")
            _in_threads(self._resume_one, pausing)

    def _resume_one(self, seat: _Seat) -> None:
        for handle in self._handles(seat):
            try:
                if read_state(handle).name == "paused":
                    handle.resume()
                seat.pause_ended = time.monotonic()
                return
            except (libvirt.libvirtError, VmkeeperError):
                continue

    def _look_at_standing(self) -> None:
        for seat in self._seats:
            if seat.member.standing:
                with contextlib.suppress(VmkeeperError):
                    seat.held = agent.is_frozen(seat.member.handle)

    def _thaw(self, freezing: Sequence[_Seat]) -> None:
        begun = [seat for seat in freezing if seat.freeze_began is not None]
        if not begun:
            return
        self._journal.moment("thaw")
        _in_threads(self._thaw_one, begun)
        self._late_phase("thawed")

    def _thaw_one(self, seat: _Seat) -> None:
        if seat.thaw_ended is not None and seat.thawed:
            return
        with contextlib.suppress(VmkeeperError):
            # Proof that the freeze held: the agent still says so after the cut, and nobody thawed in between.
            if seat.frozen:
                seat.held = agent.is_frozen(seat.member.handle) and not self._guard_fired()
        if seat.held:
            self._late_phase(f"held:{seat.member.uuid}")
        for handle in self._handles(seat):
            # A freeze that failed or timed out may have frozen all the same: thaw it always, and then twice.
            seat.thawed, seat.thaw_ended = thaw.thaw(handle, times=1 if seat.frozen else 2)
            if seat.thawed:
                seat.answering = handle
                break

    def _guard_fired(self) -> bool:
        return self._ticket is not None and self._ticket.fired()

    def _handles(self, seat: _Seat) -> Any:
        """The member's handle, then, if libvirtd was restarted in the window, one of a fresh connection."""
        yield seat.member.handle
        try:
            seat.member.handle.connect().getLibVersion()
            return  # it is the guest that does not answer, and would not answer there either
        except libvirt.libvirtError:
            time.sleep(0.2)
        try:
            connection = open_connection(self._uri)
            yield connection.lookupByUUIDString(seat.member.uuid)
        except (libvirt.libvirtError, VmkeeperError):
            return

    def _stand_down(self, freezing: Sequence[_Seat]) -> None:
        if self._ticket is None:
            return
        for seat in freezing:
            if seat.thawed:
                with contextlib.suppress(VmkeeperError):
                    agent.set_response_timeout(seat.answering or seat.member.handle, seat.previous_timeout)
        paused = any(seat.pause_began is not None and seat.pause_ended is None for seat in self._seats)
        if all(seat.thawed for seat in freezing) and not paused:
            self._ticket.tear_up()


def _in_threads(work: Callable[[_Seat], object], seats: Sequence[_Seat]) -> None:
    """Do the work for all seats at once; libvirt calls release the interpreter lock."""
    if len(seats) > 1:
        with ThreadPoolExecutor(max_workers=len(seats)) as pool:
            list(pool.map(work, seats))
    else:
        for seat in seats:
            work(seat)
