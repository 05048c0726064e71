# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard's own process: it thaws and resumes guests that whoever froze them can no longer thaw.

Started by :mod:`guard` through :mod:`detached`.  It holds a lock on its ticket for as long as it is on watch, acts at the
deadline or as soon as the process that armed it is dead, and does not stop until the agent says ``thawed``, or the
domain has stopped.  It imports nothing of Ansible.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import syslog
import time
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import agent
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, open_connection
from ..hypervisor.domain_model import read_state
from .processes import ProcessIdentity
from .ticket import Ticket, Ward

_POLL_SECONDS = 0.1
_LONGEST_PAUSE = 5.0

#: Attempts before a domain that is thawed but whose agent cannot say so is believed (an agent without fsfreeze-status).
_UNPROVEN_ATTEMPTS = 3


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
    # A connection proves, before anything is frozen, that the guard will be able to act.
    connection = _Connection(ticket.uri)
    connection.get()
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    fired = False
    try:
        fired = _wait(ticket)
        if fired:
            _rescue(ticket, connection)
    finally:
        # A run that died mid-window leaves it to the next run to judge, by the phases, what its cut is worth.
        ticket.tear_up(keep_phases=fired and ticket.owner is not None)


def _wait(ticket: Ticket) -> bool:
    """True when it is time to act; False when the ticket was torn up: everybody is safe."""
    owner = ProcessIdentity(*ticket.owner) if ticket.owner else None
    while True:
        current = Ticket.read(ticket.path)
        if current is None:
            return False
        if time.monotonic() >= current.deadline:
            syslog.syslog(syslog.LOG_WARNING, f"deadline of {current.purpose} passed: thawing {current.names}")
            return True
        if owner is not None and not owner.alive:
            syslog.syslog(syslog.LOG_WARNING, f"the run behind {current.purpose} ended early: thawing {current.names}")
            return True
        time.sleep(min(_POLL_SECONDS, max(0.0, current.deadline - time.monotonic())))


class _Connection:
    """A connection that comes back after a libvirtd restart."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._connection: Any = None

    def get(self) -> Any:
        if self._connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                if self._connection.isAlive():
                    return self._connection
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.close()
        self._connection = open_connection(self._uri)
        return self._connection


def _rescue(ticket: Ticket, connection: _Connection) -> None:
    # Before the first thaw: whoever is still inside the window must be able to see that it was broken.
    ticket.mark_fired()
    waiting = {ward.uuid: ward for ward in ticket.wards}
    attempts = 0
    pause = 0.2
    while waiting:
        attempts += 1
        for ward in list(waiting.values()):
            if _safe_now(ward, ticket, connection, attempts):
                syslog.syslog(syslog.LOG_NOTICE, f"{ward.name} is neither frozen nor paused")
                del waiting[ward.uuid]
        if waiting:
            if not os.path.exists(ticket.path):
                return
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
    ticket.enter_phase("thawed")


def _safe_now(ward: Ward, ticket: Ticket, connection: _Connection, attempts: int) -> bool:
    """Thaw and resume one domain; True when nothing more is to be done for it."""
    try:
        domain = connection.get().lookupByUUIDString(ward.uuid)
        if not domain.isActive() or (ward.runtime_id is not None and domain.ID() != ward.runtime_id):
            return True  # it stopped, and whatever runs now was never frozen by us
        if ward.resume and ticket.suspending() and read_state(domain).name == "paused":
            domain.resume()
        if not ward.thaw:
            return True
        with contextlib.suppress(VmkeeperError):
            agent.set_response_timeout(domain, agent.PROMPT_SECONDS)
        proven = _thaw(domain, attempts)
        if proven:
            with contextlib.suppress(VmkeeperError):
                agent.set_response_timeout(domain, ward.agent_timeout)
        return proven
    except libvirt.libvirtError as error:
        return bool(code_of(error) == libvirt.VIR_ERR_NO_DOMAIN)
    except VmkeeperError:
        return False


def _thaw(domain: Any, attempts: int) -> bool:
    thawed_call = True
    try:
        domain.fsThaw()
    except libvirt.libvirtError:
        thawed_call = False
    try:
        return not agent.is_frozen(domain)
    except VmkeeperError:
        return thawed_call and attempts >= _UNPROVEN_ATTEMPTS
