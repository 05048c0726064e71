# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import plan, restore_plan, restoring, workers
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import Passphrase
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import journal, worker
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.worker import Job

REQUEST = restore_plan.Request(
    "/srv/backup", id="p1", domain="web-r", disks=("vda",), running=True, passphrase=Passphrase(b"keep it secret")
)


@pytest.fixture
def host(monkeypatch):
    """A host without libvirt: what was started and done is in ``started`` and ``done``, what runs in ``running``."""

    host = SimpleNamespace(started=[], done=[], running=[])

    def start(operation, uri, domains, entry, request, *, confidential=None):
        host.started.append((operation, list(domains), entry, json.loads(json.dumps(request)), confidential))
        return Job("1", operation, tuple(domains), worker.RUNNING, "now", request=host.started[-1][3])

    def restore(connection, uri, request, *, check):
        host.done.append((request, check))
        return restoring.Restored({"name": "web-r"}, [], "p1", [])

    monkeypatch.setattr(worker, "start", start)
    monkeypatch.setattr(worker, "all_jobs", lambda: host.running)
    monkeypatch.setattr(restoring, "restore", restore)
    monkeypatch.setattr(restoring, "subject", lambda connection, uri, request: ("u1", "web-r"))
    monkeypatch.setattr(journal, "peek", lambda uuid: None)
    monkeypatch.setattr(workers, "open_connection", lambda uri: None)
    return host


def test_a_task_that_waits_without_limit_does_it_itself(host):
    assert workers.restore(None, "uri", REQUEST, check=False)["domain"] == {"name": "web-r"}
    assert (host.started, host.done) == ([], [(REQUEST, False)])


def test_the_worker_does_what_was_asked_and_its_ticket_holds_no_passphrase(host):
    answered = workers.restore(None, "uri", replace(REQUEST, wait=False), check=False)
    assert answered["job"]["state"] == "pending"
    assert [check for _request, check in host.done] == [True], "what can be refused is refused first"
    operation, domains, entry, request, confidential = host.started[0]
    assert (operation, domains, entry) == ("restore", [("u1", "web-r")], "backup.workers")
    assert "keep it secret" not in json.dumps(request)
    assert confidential == {"passphrase": "keep it secret"}
    workers.work("uri", {**request, **confidential})
    assert host.done[-1] == (REQUEST, False)


def test_the_same_task_is_about_the_worker_that_runs_unless_there_is_a_passphrase(host):
    asked = replace(REQUEST, passphrase=None, wait=False)
    workers.restore(None, "uri", asked, check=False)
    host.running = [Job("7", "restore", (("u1", "web-r"),), worker.RUNNING, "then", request=host.started[0][3])]
    assert workers.restore(None, "uri", asked, check=False)["job"]["id"] == "7"
    for other in (replace(asked, id="p2"), replace(asked, passphrase=Passphrase(b"keep it secret"))):
        assert workers.restore(None, "uri", other, check=False)["job"]["id"] == "1"


def test_what_an_interrupted_run_left_is_not_taken_for_a_reason_to_refuse(host, monkeypatch):
    monkeypatch.setattr(journal, "peek", lambda uuid: object())
    workers.restore(None, "uri", replace(REQUEST, wait=False), check=False)
    assert host.done == []
    assert len(host.started) == 1


def test_a_backups_request_survives_its_ticket(host, monkeypatch):
    taken = []

    class Connection:
        def lookupByUUIDString(self, uuid):
            return uuid

    monkeypatch.setattr(workers, "open_connection", lambda uri: Connection())

    def take(_connection, _uri, *arguments, check):
        taken.append((*arguments, check))
        return []

    monkeypatch.setattr(workers.taking, "take", take)
    request = plan.Request(disks=("vda",), tags={"a": "b"}, min_age=3.0, bandwidth=7, passphrase=Passphrase(b"x" * 9))
    stored = json.loads(json.dumps(workers._without_secrets(vars(request))))
    asked = {"domains": [["u1", "web"]], "repository": "/srv/backup", "request": stored}
    assert workers.work("uri", {**asked, "passphrase": "x" * 9}) == {
        "changed": False,
        "restore_points": [],
        "warnings": [],
    }
    assert taken == [(["u1"], "/srv/backup", request, False)]
