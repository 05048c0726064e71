# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime
import json
import os
import threading
import time

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import places, worker
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.processes import boot_id, myself

LONG_AGO = 30 * 86400.0


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes what a worker has left: ``make(id, uuids, state, seconds since then)``; without a state it never came up."""
    monkeypatch.setattr(places, "WORKERS", str(tmp_path))

    def make(identifier, uuids, state, age=0.0, **asked_by):
        directory = tmp_path / identifier
        directory.mkdir()
        asked = {"operation": "backup", "domains": [[uuid, f"vm-{uuid}"] for uuid in uuids], "request": {}}
        then = time.time() - age
        started = datetime.datetime.fromtimestamp(then, datetime.timezone.utc).isoformat(timespec="microseconds")
        (directory / "ticket.json").write_text(json.dumps({**asked, "started": started, **asked_by}))
        if state is not None:
            (directory / "state.json").write_text(json.dumps(state))
        for path in directory.iterdir():
            os.utime(path, (then, then))
        return identifier

    return make


def test_what_a_worker_left_goes_with_its_domains_and_not_before_a_while(make, tmp_path):
    finished = {"state": "finished", "ended": "then", "result": {}}
    make("old", ["gone"], finished, LONG_AGO)
    make("died", ["gone"], {"state": "running", "process": [os.getpid(), "another"]}, LONG_AGO)
    kept = {
        make("fresh", ["gone"], finished),
        make("of-two", ["gone", "here"], finished, LONG_AGO),
        make("works", ["gone"], {"state": "running", "process": list(vars(myself()).values())}, LONG_AGO),
    }
    assert sorted(worker.forget_gone({"here"})) == ["died", "old"]
    assert set(os.listdir(tmp_path)) == kept
    assert worker.forget_gone({"here"}) == []


def test_a_job_that_was_stopped_on_purpose_says_so_and_one_that_finished_does_not(make):
    make("stopped", ["u"], {"state": "running", "process": [os.getpid(), "another"]})
    make("done", ["u"], {"state": "finished", "ended": "then", "result": {}})
    for identifier in ("stopped", "done"):
        worker.mark_cancelled(identifier)
    assert worker.read("stopped").state == "cancelled"
    assert worker.read("stopped").over
    assert worker.read("done").state == "finished"


def test_the_newest_limit_counts_for_what_a_worker_begins_next(make):
    make("works", ["u"], {"state": "running", "process": list(vars(myself()).values())})
    assert worker.limit_for("u", 5) == 5
    worker.limit("works", 0)
    assert worker.limit_for("u", 5) == 0
    assert worker.limit_for("other", 5) == 5


# --- workers that never come up ----------------------------------------------------------------------

ALIVE = list(vars(myself()).values())
DEAD = [os.getpid(), "another"]
HERE = {"boot": boot_id()}


@pytest.mark.parametrize(
    ("age", "asked_by", "state"),
    [
        (0.0, {**HERE, "launcher": ALIVE}, "pending"),
        (1e6, {**HERE, "launcher": ALIVE}, "pending"),  # its task decides
        (5.0, {**HERE, "launcher": DEAD}, "pending"),  # on its way all the same
        (60.0, {**HERE, "launcher": DEAD}, "interrupted"),
        (-3600.0, {**HERE, "launcher": DEAD}, "interrupted"),  # the clock was set back
        (
            0.0,
            {"boot": "another", "launcher": ALIVE},
            "interrupted",
        ),  # a process of that number and start time, by chance
        (5.0, {}, "pending"),
        (60.0, {}, "interrupted"),
    ],
)
def test_a_worker_that_never_came_up_is_interrupted_once_nobody_can_bring_it_up_any_more(make, age, asked_by, state):
    job = worker.read(make("one", ["u"], None, age, **asked_by))
    assert (job.state, job.over) == (state, state != "pending")


def test_what_never_came_up_goes_with_its_domains_too(make, tmp_path):
    make("old", ["gone"], None, LONG_AGO, **HERE, launcher=DEAD)
    make("fresh", ["gone"], None, 60.0, **HERE, launcher=DEAD)
    assert worker.forget_gone({"here"}) == ["old"]
    assert os.listdir(tmp_path) == ["fresh"]


def test_waiting_for_a_worker_that_never_came_up_ends(make):
    make("lost", ["u"], None, 60.0, **HERE, launcher=DEAD)
    assert worker.wait("lost").state == "interrupted"
    assert not worker.stop("lost")
    worker.mark_cancelled("lost")
    assert worker.read("lost").state == "cancelled"


def test_a_worker_on_its_way_is_stopped_when_it_has_come_up(make, tmp_path):
    make("coming", ["u"], None, **HERE, launcher=ALIVE)
    up = {"state": "running", "process": DEAD}
    later = threading.Timer(0.3, lambda: (tmp_path / "coming" / "state.json").write_text(json.dumps(up)))
    later.start()
    worker.stop("coming")
    later.join()
    assert worker.read("coming").state == "interrupted"
    assert (tmp_path / "coming" / "state.json").exists(), "it was not answered before"


@pytest.mark.parametrize("left", ["nothing", "a cancelled one"])
def test_a_worker_that_comes_up_after_it_was_given_up_does_nothing(make, tmp_path, monkeypatch, left):
    begun = []
    monkeypatch.setattr(worker.importlib, "import_module", begun.append)
    ticket = tmp_path / "late" / "ticket.json"
    make("late", ["u"], None, 60.0, **HERE, launcher=DEAD, handover=None, entry="backup.workers", uri="test:///default")
    if left == "nothing":
        worker._forget("late")
    else:
        worker.mark_cancelled("late")
    worker.main(str(ticket))
    assert begun == []
    assert left == "nothing" or worker.read("late").state == "cancelled"
