# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import time

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import places, worker
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.processes import myself

LONG_AGO = 30 * 86400.0


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes what a worker has left: ``make(id, uuids, state, seconds since then)``."""
    monkeypatch.setattr(places, "WORKERS", str(tmp_path))

    def make(identifier, uuids, state, age=0.0):
        directory = tmp_path / identifier
        directory.mkdir()
        asked = {"operation": "backup", "domains": [[uuid, f"vm-{uuid}"] for uuid in uuids], "request": {}}
        (directory / "ticket.json").write_text(
            json.dumps({**asked, "started": f"2026-01-0{len(os.listdir(tmp_path))}"})
        )
        (directory / "state.json").write_text(json.dumps(state))
        then = time.time() - age
        os.utime(directory / "state.json", (then, then))
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
