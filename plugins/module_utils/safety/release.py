# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Set free what a dead run left frozen or paused, without waiting for a deadline."""

from __future__ import annotations

import os
import time

from .._errors import Busy
from . import guard
from .processes import ProcessIdentity
from .ticket import Ticket, tickets_of

#: A living guard notices a dead owner within its poll interval; a hung agent makes it take longer.
_PATIENCE_SECONDS = 60.0


def orphaned(ticket: Ticket) -> bool:
    """Whether the run that armed this ticket is dead. A freeze on request (fsfreeze) has no owner and is no orphan."""
    return ticket.owner is not None and not ProcessIdentity(*ticket.owner).alive


def release_orphans(uuid: str) -> bool:
    """Wait for, or do, the thaw of a domain whose owner is dead; True when there was something to do."""
    found = [ticket for ticket in tickets_of(uuid) if orphaned(ticket)]
    for ticket in found:
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while os.path.exists(ticket.path):
            if not ticket.watched():
                guard.post(ticket)  # its guard is dead too
            elif time.monotonic() > give_up:
                raise Busy(
                    f"{ticket.names} was left frozen or paused by an interrupted run, and its agent does not answer the guard",
                    state="The guard on this host goes on thawing.",
                    advice="Look at the guest; if it hangs, restart its qemu-guest-agent",
                )
            else:
                time.sleep(0.1)
    return bool(found)
