# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Arm the guard before a freeze, and send it home after the thaw."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence

from .._errors import VmkeeperError
from . import detached
from .processes import myself
from .ticket import Ticket, Ward

#: A fresh interpreter, ``import libvirt`` and a connection: 0.15 s on an idle host.
_ARMING_SECONDS = 30.0


def arm(
    uri: str,
    wards: Sequence[Ward],
    *,
    seconds: float,
    purpose: str,
    bound_to_this_run: bool,
    mountpoints: Sequence[str] = (),
) -> Ticket:
    """Put a guard on watch over ``wards`` for ``seconds`` and return its ticket once it is there.

    ``bound_to_this_run``: the guard also acts as soon as this process is dead.  Raises, with nothing frozen, when the
    guard does not come to its post.
    """
    identity = myself()
    ticket = Ticket(
        path=Ticket.new_path(),
        uri=uri,
        wards=tuple(wards),
        deadline=time.monotonic() + seconds,
        deadline_at=(datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)).isoformat(
            timespec="seconds"
        ),
        purpose=purpose,
        owner=(identity.pid, identity.started) if bound_to_this_run else None,
        mountpoints=tuple(mountpoints),
    )
    ticket.write()
    try:
        post(ticket)
    except BaseException:
        ticket.tear_up()
        raise
    return ticket


def post(ticket: Ticket) -> None:
    """Start a guard for a ticket that has none and wait until it is on watch."""
    payload = detached.keep_payload(ticket.payload)
    name = os.path.basename(ticket.path)[: -len(".json")]
    detached.launch(
        detached.module_name("safety.watch"),
        ticket.path,
        payload=payload,
        unit=f"vmkeeper-guard-{name}",
        description=f"thaw guard for {ticket.names}",
    )
    give_up = time.monotonic() + _ARMING_SECONDS
    # A guard whose wards' owner is dead may be done, and the ticket gone, before we look.
    while os.path.exists(ticket.path) and not ticket.watched():
        if time.monotonic() > give_up:
            raise VmkeeperError(
                f"The guard that would thaw {ticket.names} did not come up within {_ARMING_SECONDS:.0f} s",
                advice="See the system log for vmkeeper-guard; nothing is frozen without a guard",
            )
        time.sleep(0.005)
