# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import fcntl
import os
import time

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import ticket as tickets
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.ticket import Ticket, Ward


@pytest.fixture
def ticket(tmp_path):
    wards = (Ward("u1", "web", 3, True, False, -2), Ward("u2", "db", None, True, True, 5))
    made = Ticket(
        str(tmp_path / "abc.json"),
        "qemu:///system",
        wards,
        time.monotonic() + 60,
        "2026-11-21T00:00:00+00:00",
        "snapshot 'x'",
        (1, "2"),
        ("/a",),
    )
    made.write()
    return made


def test_it_reads_back_as_it_was_written(ticket):
    assert Ticket.read(ticket.path) == ticket
    assert ticket.names == "web, db"


def test_a_torn_ticket_is_none(ticket):
    ticket.enter_phase("freeze")
    ticket.tear_up()
    assert Ticket.read(ticket.path) is None
    assert os.listdir(os.path.dirname(ticket.path)) == []


def test_garbage_is_none(ticket):
    for content in ("", "{", "[]", "null"):
        with open(ticket.path, "w") as stream:
            stream.write(content)
        assert Ticket.read(ticket.path) is None


def test_watched_means_that_somebody_holds_it(ticket):
    assert not ticket.watched()
    descriptor = os.open(ticket.path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert ticket.watched()
    os.close(descriptor)
    assert not ticket.watched()


def test_phases_keep_their_first_moment_and_outlive_the_ticket(ticket):
    ticket.enter_phase("freeze")
    ticket.enter_phase("held:u1")
    first = ticket.phases()["freeze"]
    ticket.enter_phase("freeze")
    assert not ticket.suspending()
    assert not ticket.fired()
    ticket.enter_phase("suspend")
    ticket.mark_fired()
    assert ticket.suspending()
    assert ticket.fired()
    ticket.tear_up(keep_phases=True)
    phases = tickets.phases_of(ticket.path)
    assert phases["freeze"] == first
    assert phases["freeze"] <= phases["held:u1"] <= phases["fired"]
    tickets.forget(ticket.path)
    assert tickets.phases_of(ticket.path) == {}


def test_tickets_of_a_domain(ticket, tmp_path):
    assert tickets.tickets_of("u2", directory=str(tmp_path)) == [ticket]
    assert tickets.tickets_of("u3", directory=str(tmp_path)) == []
    assert tickets.tickets_of("u1", directory=str(tmp_path / "none")) == []
