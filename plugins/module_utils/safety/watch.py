# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard's own process: it thaws and resumes guests that whoever froze them can no longer thaw.

Started by :mod:`guard` through :mod:`detached`.  It holds a lock on its ticket for as long as it is on watch.  It acts when the
deadline has passed, when the process that armed it is dead, or when it is told to end itself (a host that shuts down), and
does not stop until the agent says ``thawed``, or the domain has stopped.  While the owner lives and has not torn up the
ticket the guard stays, and thaws whatever is frozen again.  It imports nothing of Ansible.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import signal
import syslog
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import agent
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, open_connection
from ..hypervisor.domain_model import DomainState, parse_domain, read_state
from . import thaw
from .ticket import Ticket, Ward, tickets_of

_POLL_SECONDS = 0.1
_LONGEST_PAUSE = 5.0


def main(path: str) -> None:
    """Watch over the ticket at ``path`` until it is torn up or its wards are safe."""
    syslog.openlog("vmkeeper-guard", syslog.LOG_PID, syslog.LOG_DAEMON)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    ticket = Ticket.read(path)
    if ticket is None:
        return
    watch = _Watch(ticket)
    signal.signal(signal.SIGTERM, watch.told_to_end)
    watch.connection()  # proves, before anything is frozen, that the guard will be able to act
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    watch.keep()


class Duty(enum.Enum):
    """What a guard that acts owes one ward."""

    NOTHING = "nothing"
    WAIT = "wait until it runs again"
    ASK = "ask whether it is frozen, and thaw it then"
    THAW = "thaw it"


def duty_to(ward: Ward, state: DomainState, *, runtime_id: int | None, managed_save: bool, standing: bool) -> Duty:
    """What is owed to a ward whose domain is in ``state`` now, as the run ``runtime_id``. Pure.

    A freeze that does not stand belongs to a run that has ended: it is not waited for the file of a ``virsh save``, which
    perhaps nobody ever restores, and which would keep every task from the domain.
    """
    if not state.active:
        saved = thaw.comes_back_frozen(state, managed_save=managed_save)
        return Duty.WAIT if ward.thaw and saved and (standing or managed_save) else Duty.NOTHING
    if ward.runtime_id in (None, runtime_id):
        return Duty.THAW if ward.thaw else Duty.NOTHING
    # Another run. One that was restored has brought the freeze along, and may have been paused and resumed since.
    return Duty.ASK if ward.thaw and state.reason != "booted" else Duty.NOTHING


class _Watch:
    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._connection: Any = None
        self._connecting = threading.Lock()
        self._ending = False
        # Wards that were seen saved to disk: their freeze is in the image, and comes back with the next start.
        self._saved: set[str] = set()

    def told_to_end(self, _signal: int, _frame: object) -> None:
        """SIGTERM: the host goes down, and a guest that it suspends would be suspended frozen."""
        self._ending = True

    def connection(self) -> Any:
        """A connection that comes back after a libvirtd restart."""
        with self._connecting:
            if self._connection is not None:
                with contextlib.suppress(libvirt.libvirtError):
                    if self._connection.isAlive():
                        self._connection.getLibVersion()  # a dead daemon's socket can still look alive
                        return self._connection
            self._connection = open_connection(self._ticket.uri)
            return self._connection

    def keep(self) -> None:
        """Wait, act, and go home only when nobody needs a guard any more."""
        while True:
            if not self._wait():
                return
            self._rescue()
            orphaned = not self._ticket.owner_alive
            if orphaned or self._ending or self._ticket.standing():
                self._ticket.tear_up()
                return
            time.sleep(_POLL_SECONDS)

    def _wait(self) -> bool:
        """True when it is time to act; False when the ticket was torn up: everybody is safe."""
        ticket = self._ticket
        while True:
            # The owner first: what it tore up before it died is torn up.
            alive = ticket.owner_alive
            if not ticket.exists:
                return False
            if ticket.overdue():
                return self._say(f"the deadline of {ticket.purpose} has passed")
            if not alive and not ticket.standing():
                return self._say(f"the run behind {ticket.purpose} ended early")
            if self._ending:
                return self._say("the guard is told to end")
            time.sleep(_POLL_SECONDS)

    def _say(self, why: str) -> bool:
        if not self._ticket.fired():
            syslog.syslog(syslog.LOG_WARNING, f"{why}: thawing {self._ticket.names}")
        return True

    def _rescue(self) -> None:
        """Thaw and resume all wards, side by side, until each is safe."""
        with contextlib.suppress(OSError):
            # Before the first thaw: whoever is still inside the window must be able to see that it was broken.
            self._ticket.enter_phase("fired")
        with ThreadPoolExecutor(max_workers=len(self._ticket.wards)) as pool:
            list(pool.map(self._rescue_one, self._ticket.wards))
        with contextlib.suppress(OSError):
            self._ticket.enter_phase("thawed")

    def _rescue_one(self, ward: Ward) -> None:
        pause = 0.2
        while self._ticket.exists:
            try:
                if self._safe_now(ward):
                    return
            except Exception as error:  # noqa: BLE001 nothing that one guest answers may end the guard of the others
                syslog.syslog(syslog.LOG_WARNING, f"{ward.name}: {error}")
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    def _safe_now(self, ward: Ward) -> bool:
        """Thaw and resume one domain; True when nothing more is to be done for it."""
        try:
            domain = self.connection().lookupByUUIDString(ward.uuid)
            state = read_state(domain)
            runtime_id = domain.ID() if state.active else None
            managed_save = not state.active and domain.isPersistent() and bool(domain.hasManagedSaveImage())
            if managed_save:
                self._saved.add(ward.uuid)
            ours = ward.runtime_id in (None, runtime_id) or ward.uuid in self._saved
            if ours and ward.resume and state.name == "paused" and "suspend" in self._ticket.phases():
                domain.resume()
            duty = duty_to(
                ward,
                state,
                runtime_id=runtime_id,
                managed_save=managed_save,
                standing=self._ticket.standing(),
            )
            if duty is Duty.ASK and not parse_domain(domain.XMLDesc(0), state, persistent=True).agent_configured:
                return True  # what was frozen had a channel
        except libvirt.libvirtError as error:
            if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN:
                return True
            raise
        if duty in (Duty.NOTHING, Duty.WAIT):
            return duty is Duty.NOTHING
        # In this order: a freeze under another guard has its ticket before it has begun.
        if duty is Duty.ASK and (not agent.is_frozen(domain) or self._is_anothers(ward, runtime_id)):
            return True
        proven, _ended = thaw.thaw(domain, times=2)
        if proven:
            with contextlib.suppress(VmkeeperError):
                agent.set_response_timeout(domain, ward.agent_timeout)
        return proven

    def _is_anothers(self, ward: Ward, runtime_id: int | None) -> bool:
        """Whether another guard, on watch, will thaw what runs now."""
        return any(
            ticket.path != self._ticket.path and ticket.thaws(ward.uuid, runtime_id) and ticket.watched()
            for ticket in tickets_of(ward.uuid, directory=os.path.dirname(self._ticket.path))
        )
