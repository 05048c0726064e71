# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Set free what a dead run left frozen or paused, without waiting for a deadline."""

from __future__ import annotations

import time

from .._errors import Busy
from . import guard
from .ticket import Ticket, tickets_of

#: A living guard notices a dead owner within its poll interval; a hung agent makes it take longer.
_PATIENCE_SECONDS = 60.0


def orphaned(ticket: Ticket) -> bool:
    """Whether nobody looks after this ticket: its run is dead, and the freeze was not meant to outlive it."""
    return not ticket.owner_alive and not ticket.standing()


def release_orphans(uuid: str) -> bool:
    """Wait for the thaw of a domain whose owner is dead, with a new guard where the guard is dead too.

    True when there was something to do.  A freeze on request (``standing``) is no orphan, but never without a guard.
    """
    found = False
    for ticket in tickets_of(uuid):
        if ticket.standing() and not ticket.watched():
            guard.post(ticket)
        if not orphaned(ticket):
            continue
        found = True
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while ticket.exists:
            if not ticket.watched():
                guard.post(ticket)
            if time.monotonic() > give_up:
                raise Busy(
                    f"{ticket.names} was left frozen or paused by an interrupted run, and its agent does not answer the guard",
                    state="The guard on this host goes on thawing.",
                    advice="Look at the guest; if it hangs, restart its qemu-guest-agent",
                )
            time.sleep(0.1)
    return found
