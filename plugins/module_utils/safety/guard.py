# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Arm the guard before a freeze, and see that it is on watch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from .._errors import VmkeeperError
from . import detached, watch
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
    mountpoints: Sequence[str] = (),
    adopted: bool = False,
) -> Ticket:
    """Put a guard on watch over ``wards`` and return its ticket once it is there.

    The guard acts ``seconds`` after the ``freeze`` or ``suspend`` phase was entered, or as soon as this process is dead,
    unless the phase ``standing`` was entered.  Raises, with nothing frozen, when the guard does not come to its post.
    """
    identity = myself()
    ticket = Ticket(
        path=Ticket.new_path(),
        uri=uri,
        wards=tuple(wards),
        seconds=seconds,
        purpose=purpose,
        owner=(identity.pid, identity.started),
        mountpoints=tuple(mountpoints),
        adopted=adopted,
    )
    ticket.write()
    try:
        post(ticket)
        check(ticket)
    except BaseException:
        ticket.tear_up()
        raise
    return ticket


def check(ticket: Ticket) -> None:
    """Raise unless the guard is on watch and has not acted. To be called just before each freeze and pause."""
    if not ticket.watched() or ticket.fired():
        raise VmkeeperError(
            f"The guard that would thaw {ticket.names} is gone or has acted already",
            state="Nothing was frozen without it.",
            advice="See the system log for vmkeeper-guard, then run this again, with a longer deadline if the host is slow",
        )


def post(ticket: Ticket) -> None:
    """Start a guard for a ticket that has none and wait until it is on watch, or done."""
    payload = detached.keep_payload(ticket.payload)
    name = os.path.basename(ticket.path)[: -len(".json")]
    detached.launch(
        watch.__name__,  # imported here so that Ansible ships it with every module that may freeze
        ticket.path,
        payload=payload,
        unit=f"vmkeeper-guard-{name}",
        description=f"thaw guard for {ticket.names}",
        # It must end, and thaw, before the host suspends its guests or stops their daemon.
        before_end_of=("libvirtd.service", "virtqemud.service", "libvirt-guests.service"),
    )
    give_up = time.monotonic() + _ARMING_SECONDS
    # A guard whose owner is dead may be done, and the ticket gone, before we look.
    while ticket.exists and not ticket.watched():
        if time.monotonic() > give_up:
            raise VmkeeperError(
                f"The guard that would thaw {ticket.names} did not come up within {_ARMING_SECONDS:.0f} s",
                advice="See the system log for vmkeeper-guard; nothing is frozen without a guard",
            )
        time.sleep(0.005)
