# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A backup goes on with a connection that lives, wherever libvirtd was restarted meanwhile."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import describing, taking
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.backup_job import End
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import DomainState


class Daemon:
    """Each connection to it ends the one before, as a restart does; a handle is ``(connection, uuid)``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
        self.connection = 0
        self.uuids = uuids
        monkeypatch.setattr(taking, "connect_again", self.connect)
        monkeypatch.setattr(taking, "find_by_uuid", self.find)
        monkeypatch.setattr(taking.backup_job, "wait", lambda *_arguments: End(True))
        monkeypatch.setattr(taking.block_jobs, "resume_starved", self.ask)

    def connect(self, _uri: str) -> int:
        self.connection += 1
        return self.connection

    def find(self, connection: int, uuid: str) -> tuple[int, str] | None:
        assert connection == self.connection
        return (connection, uuid) if uuid in self.uuids else None

    def ask(self, handle: tuple[int, str], **_how: Any) -> None:
        assert handle[0] == self.connection, "client socket is closed"


def run_of(*uuids: str) -> Any:
    """A run in which all disks are copied."""
    plans = [SimpleNamespace(domain=SimpleNamespace(uuid=uuid, name=uuid), live=True, disks=()) for uuid in uuids]
    facts = [SimpleNamespace(domain=plan.domain, history=SimpleNamespace(points=())) for plan in plans]
    repository = SimpleNamespace(path="/srv", new_directory=lambda uuid, _id: f"/srv/{uuid}")
    handles = [(0, uuid) for uuid in uuids]
    given: list[Any] = [0, "uri", repository, (0, 0), handles, facts, plans, None, 0, None]
    run = taking._Taking(*given)
    run._sentry = SimpleNamespace(verdict=lambda: None)  # type: ignore[assignment]
    return run


def test_a_copy_that_outlived_libvirtd_goes_on_with_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(monkeypatch, "u1", "u2")
    run = run_of("u1", "u2")
    for plan in run._plans:
        run._wait(plan)
    assert run._connection == daemon.connection == 2
    assert run._handles == {"u1": (1, "u1"), "u2": (2, "u2")}


def test_a_domain_that_has_gone_is_said_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    Daemon(monkeypatch, "u1")
    run = run_of("u1", "u2")
    run._wait(run._plans[0])
    with pytest.raises(VmkeeperError, match=r"'u2' has gone.* No point was made"):
        run._wait(run._plans[1])


@pytest.mark.parametrize(
    ("now", "saved", "still"),
    [
        (DomainState("shutoff", "shutdown"), False, True),
        (DomainState("shutoff", "unknown"), False, True),  # libvirtd was restarted, and has forgotten why
        (DomainState("shutoff", "crashed"), False, False),
        (DomainState("running", "unknown"), False, False),
        (DomainState("shutoff", "shutdown"), True, False),
    ],
)
def test_a_stopped_domain_was_still_unless_it_ran(
    monkeypatch: pytest.MonkeyPatch, now: DomainState, saved: bool, still: bool
) -> None:
    monkeypatch.setattr(
        taking, "read_domain", lambda _handle: SimpleNamespace(name="u1", state=now, managed_save=saved)
    )
    monkeypatch.setattr(taking.stillness, "written_since", lambda _marks: [])
    run = run_of("u1")
    run._plans[0].domain.state = DomainState("shutoff", "shutdown")
    run._plans[0].domain.managed_save = False
    run._marks = {"u1": None}
    with contextlib.nullcontext() if still else pytest.raises(VmkeeperError, match="was started or saved"):
        run._require_still(run._plans[0])


def test_a_point_is_described_over_the_connection_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(monkeypatch, "u1", "u2")
    run = run_of("u1", "u2")
    run._journal = SimpleNamespace(step=lambda *_step, **_data: None)
    described = []
    monkeypatch.setattr(run, "_keep_nvram", lambda plan: None)
    monkeypatch.setattr(run, "_level", lambda uuid, outcome: "crash")
    monkeypatch.setattr(run, "_checkpoint", lambda plan: None)
    monkeypatch.setattr(
        describing, "complete", lambda connection, handle, *_rest: described.append((connection, handle))
    )
    for plan in run._plans:
        run._complete(plan, None)
    assert described == [(1, (1, "u1")), (2, (2, "u2"))]
    assert daemon.connection == 2


def test_room_is_given_back_and_libvirt_asked_for_all_before_digests_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def computing(*_arguments: Any) -> None:
        asked.append("digests")
        raise KeyboardInterrupt

    monkeypatch.setattr(describing, "_versions", lambda connection: asked.append("versions"))
    monkeypatch.setattr(describing, "_write_files", lambda handle, written: asked.append("definition"))
    monkeypatch.setattr(describing, "_disk", computing)
    monkeypatch.setattr(describing.reservation, "release", asked.append)
    written: Any = SimpleNamespace(plan=SimpleNamespace(disks=[SimpleNamespace(file="vda.qcow2")]), directory="/srv")
    nobody: Any = None
    with pytest.raises(KeyboardInterrupt):
        describing.complete(nobody, nobody, nobody, written, nobody)
    assert asked == ["versions", "/srv/vda.qcow2", "definition", "digests"]
