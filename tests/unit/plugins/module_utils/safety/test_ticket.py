# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import ticket as tickets
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.processes import myself
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.ticket import Ticket, Ward


@pytest.fixture
def ticket(tmp_path):
    wards = (Ward("u1", "web", 3, True, False, -2), Ward("u2", "db", None, True, True, 5))
    me = myself()
    made = Ticket(
        str(tmp_path / "abc.json"), "qemu:///system", wards, 60.0, "snapshot 'x'", (me.pid, me.started), ("/a",)
    )
    made.write()
    return made


def test_it_reads_back_as_it_was_written(ticket):
    assert Ticket.read(ticket.path) == ticket
    assert ticket.names == "web, db"


def test_a_torn_ticket_is_none_and_its_phases_stay_until_they_are_forgotten(ticket):
    ticket.enter_phase("freeze")
    assert ticket.exists
    ticket.tear_up()
    assert not ticket.exists
    assert Ticket.read(ticket.path) is None
    assert tickets.phases_of(ticket.path)
    tickets.forget(ticket.path)
    assert os.listdir(os.path.dirname(ticket.path)) == []


def test_what_is_no_ticket_is_passed_over(ticket, tmp_path):
    for number, content in enumerate(("", "{", "[]", "null", "{}", '{"wards": 1}')):
        (tmp_path / f"{number}.json").write_text(content)
    assert tickets.tickets_of("u1", directory=str(tmp_path)) == [ticket]


def test_watched_means_that_somebody_holds_it(ticket):
    assert not ticket.watched()
    descriptor = os.open(ticket.path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert ticket.watched()
    os.close(descriptor)
    assert not ticket.watched()


def test_phases_keep_their_first_moment(ticket):
    ticket.enter_phase("freeze")
    ticket.enter_phase("held:u1")
    first = ticket.phases()["freeze"]
    ticket.enter_phase("freeze")
    assert not ticket.fired()
    ticket.enter_phase("fired")
    assert ticket.fired()
    phases = tickets.phases_of(ticket.path)
    assert phases["freeze"] == first
    assert phases["freeze"].monotonic <= phases["held:u1"].monotonic <= phases["fired"].monotonic


def test_the_deadline_runs_from_the_first_freeze_or_pause_and_not_before(tmp_path):
    ticket = Ticket(str(tmp_path / "a.json"), "uri", (), 0.0, "x", (1, "0"))
    assert not ticket.overdue()
    assert ticket.deadline_at() is None
    ticket.enter_phase("suspend")
    assert ticket.overdue()
    assert ticket.deadline_at().endswith("+00:00")
    later = replace(ticket, seconds=3600.0)
    assert not later.overdue()


def test_an_owner_that_is_dead_is_known_as_such(ticket):
    assert ticket.owner_alive
    assert not replace(ticket, owner=(ticket.owner[0], "0")).owner_alive


def test_a_freeze_that_is_meant_to_stand_says_so(ticket):
    assert not ticket.standing()
    ticket.enter_phase("standing")
    assert ticket.standing()


def test_a_ticket_thaws_those_runs_of_those_domains_that_it_froze(ticket):
    assert ticket.thaws("u1", 3)
    assert not ticket.thaws("u1", 4)
    assert not ticket.thaws("u3", 3)
    paused = replace(ticket, wards=(replace(ticket.wards[0], thaw=False),))
    assert not paused.thaws("u1", 3)


def test_only_our_own_freeze_of_everything_is_whole(ticket):
    assert not ticket.whole
    everything = replace(ticket, mountpoints=())
    assert everything.whole
    assert not replace(everything, adopted=True).whole


def test_whose_freeze_it_is_reads_back_and_a_ticket_that_does_not_say_is_of_ours(ticket):
    replace(ticket, adopted=True).write()
    assert Ticket.read(ticket.path).adopted
    content = json.loads(Path(ticket.path).read_text())
    del content["adopted"]
    Path(ticket.path).write_text(json.dumps(content))
    assert Ticket.read(ticket.path) == ticket


def test_tickets_of_a_domain(ticket, tmp_path):
    assert tickets.tickets_of("u2", directory=str(tmp_path)) == [ticket]
    assert tickets.tickets_of("u3", directory=str(tmp_path)) == []
    assert tickets.tickets_of("u1", directory=str(tmp_path / "none")) == []
