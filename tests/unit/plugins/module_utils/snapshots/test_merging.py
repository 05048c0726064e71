# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of a merge, with its effects taken away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed, VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import connection, power
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import Domain, DomainState
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import worker
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Journal
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import layer_merge, merging
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.merge_plan import Merge, Work

TWO = Work(merges=(Merge("vda", "/a", "qcow2", ("/b",)), Merge("vdb", "/c", "qcow2", ("/d",))), bandwidth=1 << 20)


class Handle:
    """A domain that is shut off."""

    def name(self) -> str:
        return "web"

    def UUIDString(self) -> str:
        return "u"

    def isActive(self) -> bool:
        return False


class Gone(Exception):
    """libvirt's own error."""


class Host:
    """A domain and its libvirtd, which goes away once the domain was shut down: at the call of that name, ``times`` times."""

    def __init__(self, lost_at: str, times: int = 1) -> None:
        self.active = True
        self.connection = 1
        self._lost_at = lost_at
        self._left = times

    def reach(self, call: str) -> None:
        if call == self._lost_at and self._left:
            self._left -= 1
            self.connection += 1

    def domain(self) -> Domain:
        return Domain("web", "u", DomainState("running" if self.active else "shutoff", "unknown"), True, ())


class Lost(Handle):
    """The domain over a connection that ends with its libvirtd."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._connection = host.connection

    def connect(self) -> Any:
        return SimpleNamespace(isAlive=lambda: self._connection == self.host.connection)

    def isActive(self) -> bool:
        if not self.connect().isAlive():
            raise Gone("client socket is closed")
        return self.host.active

    def create(self) -> None:
        assert not self.isActive()
        self.host.reach("create")
        self.host.active = self.isActive() or True


RESTARTING = replace(TWO, restart=True)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch, merged: list[tuple[str, int]]) -> Any:
    """What makes a host whose libvirtd goes away at a call of a merge; ``answers``: and comes back."""

    def make(lost_at: str, *, times: int = 1, answers: bool = True) -> Host:
        host = Host(lost_at, times)

        def read(handle: Lost) -> Domain:
            with connection.explaining("Reading domain 'web'"):
                handle.isActive()
            return host.domain()

        def shut_down(handles: Any, *, state: str) -> list[str]:
            host.active = False
            host.reach("shut_down")
            with connection.explaining("Waiting for domain 'web' to shut down", state=state):
                handles[0].isActive()
            return []

        def relink(handle: Lost, _merge: Merge) -> None:
            host.reach("relink")
            read(handle)

        def answering(_handle: Any, uri: str) -> Lost:
            if not answers:
                raise LibvirtFailed(f"No libvirt daemon answers on {uri}: refused", advice="Start it")
            return Lost(host)

        monkeypatch.setattr(worker, "limit_for", lambda _uuid, begun_with: begun_with)
        monkeypatch.setattr(merging, "read_domain", read)
        monkeypatch.setattr(merging, "answering", answering)
        monkeypatch.setattr(power, "shut_down", shut_down)
        monkeypatch.setattr(layer_merge, "relink", relink)
        monkeypatch.setattr(layer_merge, "live_run", lambda *_arguments: None)
        return host

    return make


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.begin(merging.COMMIT, [("u", "web")], {"work": TWO.to_json()}, directory=str(tmp_path))


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The disks whose layers were merged, each with the limit of its job."""
    found: list[tuple[str, int]] = []

    def commit(_handle: Any, merge: Merge, *, bandwidth: int, **_how: Any) -> None:
        found.append((merge.target, bandwidth))

    off = Domain("web", "u", DomainState("shutoff", "shutdown"), True, ())
    monkeypatch.setattr(connection, "libvirt", SimpleNamespace(libvirtError=Gone))
    monkeypatch.setattr(merging, "read_domain", lambda _handle: off)
    monkeypatch.setattr(layer_merge, "commit", commit)
    monkeypatch.setattr(layer_merge, "relink", lambda *_arguments: None)
    monkeypatch.setattr(layer_merge, "verify", lambda *_arguments: None)
    return found


def test_a_limit_that_the_worker_is_told_holds_for_the_next_disk_too(
    journal: Journal, merged: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([1 << 20, 5 << 20])
    monkeypatch.setattr(worker, "limit_for", lambda _uuid, _begun_with: next(told))
    merging.run(Handle(), "test:///", TWO, journal)
    assert merged == [("vda", 1 << 20), ("vdb", 5 << 20)]


def test_a_run_that_loses_libvirt_says_what_was_begun_and_leaves_it_to_the_next(
    journal: Journal, merged: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lost(*_arguments: Any, **_how: Any) -> None:
        raise LibvirtFailed("Reading domain 'web': the connection was closed")

    monkeypatch.setattr(worker, "limit_for", lambda _uuid, begun_with: begun_with)
    monkeypatch.setattr(layer_merge, "commit", lost)
    monkeypatch.setattr(layer_merge, "is_merged", lost)
    with pytest.raises(LibvirtFailed) as failed:
        merging.run(Handle(), "test:///", TWO, journal)
    assert "Nothing was changed" not in str(failed.value)
    assert "a job that runs goes on" in failed.value.state
    assert "Run this again" in failed.value.advice
    assert list(tmp_path.iterdir()), "the journal"


def test_a_failure_that_knows_its_state_keeps_it(
    journal: Journal, merged: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_arguments: Any, **_how: Any) -> None:
        raise LibvirtFailed("Committing disk 'vda'", state="The guest runs.", advice="See libvirt's log")

    monkeypatch.setattr(worker, "limit_for", lambda _uuid, begun_with: begun_with)
    monkeypatch.setattr(layer_merge, "commit", refused)
    monkeypatch.setattr(layer_merge, "is_merged", lambda *_arguments: False)
    with pytest.raises(LibvirtFailed) as failed:
        merging.run(Handle(), "test:///", TWO, journal)
    assert (failed.value.state, failed.value.advice) == ("The guest runs.", "See libvirt's log")
    assert list(tmp_path.iterdir()) == [], "the chain is whole"


@pytest.mark.parametrize("lost_at", ["shut_down", "relink", "create"])
def test_a_merge_in_which_libvirtd_goes_away_is_done_over_another_connection_and_the_guest_runs(
    journal: Journal, lost: Any, lost_at: str, tmp_path: Path
) -> None:
    host = lost(lost_at)
    done = merging.run(Lost(host), "test:///", RESTARTING, journal)
    assert host.active
    assert set(done.committed_bytes) == {"vda", "vdb"}
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_fails_while_libvirtd_is_away_tells_its_own_reason_and_the_guest_runs(
    journal: Journal, lost: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lost("commit")

    def full(handle: Any, merge: Merge, **_how: Any) -> None:
        host.reach("commit")
        raise VmkeeperError("Committing /a into /b: No space left on device", state="The layers are whole.")

    monkeypatch.setattr(layer_merge, "commit", full)
    monkeypatch.setattr(layer_merge, "is_merged", lambda handle, _merge: handle.isActive() and False)
    with pytest.raises(VmkeeperError, match="No space left on device"):
        merging.run(Lost(host), "test:///", RESTARTING, journal)
    assert host.active
    assert list(tmp_path.iterdir()) == [], "the chain is whole"


@pytest.mark.parametrize(("times", "answers"), [(1, False), (99, True)])
def test_a_guest_that_cannot_be_started_since_libvirt_does_not_answer_is_told_to_be_off(
    journal: Journal, lost: Any, times: int, answers: bool, tmp_path: Path
) -> None:
    host = lost("relink", times=times, answers=answers)
    with pytest.raises(LibvirtFailed) as failed:
        merging.run(Lost(host), "test:///", RESTARTING, journal)
    assert "may be off" in failed.value.state
    assert ("No libvirt daemon answers" in failed.value.state) is not answers
    assert "Once libvirt answers, run this again" in failed.value.advice
    assert list(tmp_path.iterdir()), "the journal"


def test_a_commit_below_a_running_guest_goes_on_without_libvirtd_and_is_not_waited_for(
    journal: Journal, lost: Any, tmp_path: Path
) -> None:
    host = lost("relink")
    with pytest.raises(LibvirtFailed, match="a job that runs goes on"):
        merging.run(Lost(host), "test:///", TWO, journal)
    assert list(tmp_path.iterdir()), "the journal"


def test_a_guest_that_is_off_for_a_merge_is_started_also_where_cancelling_that_fails(
    journal: Journal, lost: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = lost("is_merged")
    host.active = False

    def is_merged(handle: Lost, _merge: Merge) -> bool:
        host.reach("is_merged")
        with connection.explaining("Reading domain 'web'"):
            return handle.isActive()

    monkeypatch.setattr(layer_merge, "is_merged", is_merged)
    monkeypatch.setattr(merging, "block_jobs", SimpleNamespace(cancel=lambda *_arguments: None))
    monkeypatch.setattr(merging, "open_connection", lambda _uri: None)
    monkeypatch.setattr(merging, "find_by_uuid", lambda _connection, _uuid: Lost(host))
    for step in ("shutdown", "shut-off"):
        journal.step(step)
    with pytest.raises(LibvirtFailed, match="client socket is closed"):
        merging.abandon("test:///", journal)
    assert host.active
