# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What check mode tells of a change set, and what is told of one whose steps have failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import UNCHANGED, LibvirtFailed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import scaling
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.restart import RolledBack
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.scaling import Resized, _Run
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing.a_domain import GIB, facts


def predicted(request: Request) -> Resized:
    known = facts()
    return _Run(None, "", None, request, known, compute(request, known)).predict()


def test_the_diff_gives_the_way_of_each_change_and_the_reason_for_it():
    foreseen = predicted(Request(vcpus=3, memory=2 * GIB, overcommit=True))
    assert foreseen.after["changes"] == {
        "vcpus": "live: it has room for 4 vCPUs",
        "memory": "next_boot: it was started with 1.0 GiB and without maxMemory, so that none can be plugged",
    }
    assert "changes" not in foreseen.before
    assert "changes" not in predicted(Request(vcpus=2)).after


class Journalled:
    """A journal that has reached some steps."""

    def __init__(self, *steps: str) -> None:
        self.operation = SimpleNamespace(reached=lambda step: step in steps)


def a_run(*steps: str, alive: bool = True, applied: dict[str, str] | None = None) -> Any:
    known = facts()
    request = Request(vcpus=3)
    run: Any = _Run(SimpleNamespace(isAlive=lambda: alive), "test:///", None, request, known, compute(request, known))
    run._journal = Journalled(*steps)
    run._applied = applied or {}
    return run


@pytest.mark.parametrize(
    ("steps", "state", "said"),
    [
        ((), UNCHANGED, "What was changed before stays: vcpus, disk vda."),
        (("shutdown",), "It is off.", "It is off. What was changed before stays: disk vda."),
    ],
)
def test_a_failure_tells_what_was_changed_live_and_stays(steps: tuple[str, ...], state: str, said: str) -> None:
    error = LibvirtFailed("Something", state=state)
    a_run(*steps, applied={"vcpus": "live", "disk vda": "live", "memory": "none"})._tell_done(error)
    assert error.state == said


@pytest.mark.parametrize(
    ("settled", "said"),
    [
        ({"action": "started again with its old size"}, "the interrupted resize was started again with its old size"),
        (None, "It may be off, and have either definition. Settling that failed: No daemon."),
    ],
)
def test_a_restart_in_which_libvirtd_went_away_is_settled_and_tells_how(
    monkeypatch: pytest.MonkeyPatch, settled: dict[str, str] | None, said: str
) -> None:
    def settle(uri: str, journal: Any) -> dict[str, str]:
        if settled is None:
            raise LibvirtFailed("No daemon", state="")
        return settled

    def restart(*_arguments: Any) -> int:
        raise scaling.libvirt.libvirtError("client socket is closed")

    pytest.importorskip("libvirt")
    monkeypatch.setattr(scaling, "wait_for_daemon", lambda uri: None)
    monkeypatch.setattr(scaling, "settle", settle)
    monkeypatch.setattr(scaling, "restart", restart)
    with pytest.raises(LibvirtFailed) as failed:
        a_run("shutdown", "put-back", alive=False)._restarted("<domain/>")
    assert said in failed.value.state
    assert failed.value.facts.get("rolled_back", False) is (settled is not None)
    with pytest.raises(LibvirtFailed, match=r"either definition\. Run this again, or recover_domain"):
        a_run("shutdown")._restarted("<domain/>")


@pytest.mark.parametrize(("alive", "finished"), [(True, True), (False, False)])
def test_the_journal_stays_where_nobody_knows_whether_the_definition_was_stored(alive: bool, finished: bool) -> None:
    run, closed = a_run("define", alive=alive), []
    run._journal.finish = lambda: closed.append(True)
    run._give_up(LibvirtFailed("Defining it"))
    assert bool(closed) is finished


@pytest.mark.parametrize(
    ("steps", "alive", "finished"),
    [
        (("vcpus",), True, True),
        (("vcpus",), False, True),  # a live change, or the definition of the next start: the same task completes it
        (("definition",), False, True),
        (("define", "shutdown"), True, False),
        (("define", "shutdown"), False, False),
        (("shutdown", "shrink"), False, False),
    ],
)
def test_the_journal_stays_only_where_something_is_to_be_settled(
    steps: tuple[str, ...], alive: bool, finished: bool
) -> None:
    run, closed = a_run(*steps, alive=alive), []
    run._journal.finish = lambda: closed.append(True)
    run._give_up(LibvirtFailed("Changing it"))
    assert bool(closed) is finished


@pytest.mark.parametrize("alive", [True, False])
def test_the_journal_does_not_stay_once_all_was_rolled_back(alive: bool) -> None:
    run, closed = a_run("define", "shutdown", "start", "rollback", "start-old", alive=alive), []
    run._journal.finish = lambda: closed.append(True)
    run._give_up(RolledBack("Not well"))
    assert closed


@pytest.mark.parametrize(("alive", "finished"), [(True, True), (False, False)])
def test_without_rollback_the_journal_stays_where_nobody_knows_whether_it_was_started(
    alive: bool, finished: bool
) -> None:
    run, closed = a_run("define", "shutdown", "start", alive=alive), []
    run._request = Request(vcpus=3, rollback=False)
    run._journal.finish = lambda: closed.append(True)
    run._give_up(LibvirtFailed("Starting it"))
    assert bool(closed) is finished


def test_the_journal_stays_where_a_signal_came_while_the_definition_was_stored() -> None:
    run, closed = a_run("define"), []
    run._journal.finish = lambda: closed.append(True)
    run._give_up(KeyboardInterrupt())
    assert not closed
