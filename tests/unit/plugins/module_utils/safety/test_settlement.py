# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import functools
import threading

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Busy
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import journal, locks, settlement
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Journal

A, B, C = ("a", "web"), ("b", "db"), ("c", "mail")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Locks and journals in a directory of the test's own."""
    places = {"locks": str(tmp_path / "locks"), "journal": str(tmp_path / "journal")}
    monkeypatch.setattr(settlement.locks, "hold", functools.partial(locks.hold, directory=places["locks"], patience=2))
    monkeypatch.setattr(settlement.journal, "peek", functools.partial(journal.peek, directory=places["journal"]))
    return places


def holds(here, *domains):
    return [name for uuid, name in domains if locks.holder(uuid, directory=here["locks"]) is not None]


def test_a_task_holds_whatever_an_interrupted_operation_ties_to_its_domains(here):
    with settlement.hold([B], "backup"):
        assert holds(here, A, B, C) == ["db"]
    Journal.begin("snapshot", [A, B], {}, directory=here["journal"])
    with settlement.hold([B], "backup"):
        assert holds(here, A, B, C) == ["web", "db"]
        with locks.hold([A, B], "settling", directory=here["locks"]):
            assert holds(here, A, B) == ["web", "db"], "nobody waits for himself"
        assert holds(here, A, B) == ["web", "db"], "and does not give away what he holds"
    assert holds(here, A, B) == []


def test_two_tasks_on_two_members_of_an_interrupted_group_do_not_wait_for_each_other(here):
    Journal.begin("snapshot", [A, B], {}, directory=here["journal"])
    ready, failed = threading.Barrier(2), []

    def task(domain):
        ready.wait()
        try:
            for _time in range(20):
                with settlement.hold([domain], "snapshot"), locks.hold([A, B], "settling", directory=here["locks"]):
                    pass
        except Busy as error:
            failed.append(error)

    both = [threading.Thread(target=task, args=(domain,)) for domain in (A, B)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert failed == []
