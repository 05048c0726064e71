# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import json
import os
import stat

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import NoSpace, Unfinished, VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import journal
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Journal

DOMAINS = [("u2", "db"), ("u1", "web")]


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "journal")


def test_every_domain_of_a_group_leads_to_the_one_file(place):
    Journal.begin("snapshot", DOMAINS, {"name": "x"}, directory=place)
    for uuid in ("u1", "u2"):
        found = journal.unfinished(uuid, directory=place)
        assert found.operation.plan == {"name": "x"}
        assert [one["name"] for one in found.operation.domains] == ["db", "web"]
        assert journal.peek(uuid, directory=place).kind == "snapshot"
    assert journal.unfinished("u3", directory=place) is None


def test_steps_are_on_disk_before_what_they_announce(place):
    running = Journal.begin("snapshot", DOMAINS, {}, directory=place)
    running.step("armed", ticket="/run/x")
    running.step("armed", ticket="/run/y")
    again = journal.unfinished("u1", directory=place)
    assert again.operation.reached("begin")
    armed = again.operation.last("armed")
    assert armed is not None
    assert armed["ticket"] == "/run/y"
    assert again.operation.last("cut") is None
    assert not again.operation.reached("cut")
    path = os.path.join(place, "u1.json")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(place).st_mode) == 0o700


def test_finishing_leaves_nothing(place):
    Journal.begin("snapshot", DOMAINS, {}, directory=place).finish()
    assert os.listdir(place) == []
    assert journal.peek("u1", directory=place) is None


def test_a_link_whose_operation_is_over_is_no_operation(place):
    Journal.begin("snapshot", DOMAINS, {}, directory=place)
    os.unlink(os.path.join(place, "u1.json"))
    assert journal.unfinished("u2", directory=place) is None
    assert os.listdir(place) == []


def test_a_stale_link_does_not_lead_to_what_others_do_by_now(place):
    """A group's run was killed when it had removed the file and not yet the link to it."""
    Journal.begin("snapshot", DOMAINS, {}, directory=place)
    os.unlink(os.path.join(place, "u1.json"))
    alone = Journal.begin("snapshot", [one for one in DOMAINS if one[0] == "u1"], {}, directory=place)
    assert journal.peek("u2", directory=place) is None
    assert journal.unfinished("u2", directory=place) is None
    assert not os.path.lexists(os.path.join(place, "u2.json"))
    assert journal.unfinished("u1", directory=place) is not None
    alone.finish()


def test_a_journal_of_a_newer_version_is_refused(place):
    Journal.begin("snapshot", DOMAINS, {}, directory=place)
    path = os.path.join(place, "u1.json")
    with open(path) as stream:
        content = json.load(stream)
    content["format"] = 99
    with open(path, "w") as stream:
        json.dump(content, stream)
    with pytest.raises(Unfinished, match="newer version"):
        journal.unfinished("u1", directory=place)


def test_a_look_at_garbage_finds_nothing(place):
    os.makedirs(place)
    with open(os.path.join(place, "u1.json"), "w") as stream:
        stream.write("{half")
    assert journal.peek("u1", directory=place) is None


def test_what_a_killed_run_was_writing_goes_with_the_next_ones_journal(place):
    os.makedirs(place, mode=0o700)
    for name in (".new-u1.json-k1ll3d", ".new-u12.json-another"):
        with open(os.path.join(place, name), "w", encoding="utf-8"):
            pass
    Journal.begin("snapshot", DOMAINS, {}, directory=place).finish()
    assert os.listdir(place) == [".new-u12.json-another"]


def test_a_step_that_cannot_be_recorded_must_not_begin_and_says_why(place, monkeypatch):
    running = Journal.begin("snapshot", DOMAINS, {}, directory=place)

    def fails_with(code):
        def fail(_path, _value):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(journal.places, "write_json", fail)

    fails_with(errno.ENOSPC)
    with pytest.raises(NoSpace, match="cannot be written"):
        running.step("cut")
    running.note("start")  # nobody has to know of it
    fails_with(errno.EROFS)
    with pytest.raises(VmkeeperError, match="Read-only"):
        running.step("cut")
    assert [step["name"] for step in journal.peek("u1", directory=place).steps] == ["begin"]
