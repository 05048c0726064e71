# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import (
    domain_jobs,
    journal,
    release,
    settlement,
    worker,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.domain_jobs import Subject

BOTH = (("a", "first"), ("b", "second"))


def test_cancelling_ends_what_the_worker_had_begun_on_its_other_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work = worker.Job("1", "blockcommit", BOTH, worker.RUNNING, "2026-01-01")
    held: list[Any] = []
    ended: list[str] = []
    begun = {"b": SimpleNamespace(operation=SimpleNamespace(kind="blockcommit"))}

    @contextlib.contextmanager
    def hold(domains: list[tuple[str, str]], _operation: str) -> Iterator[None]:
        held.extend(domains)
        yield

    def abandon(_uri: str, _pending: Any) -> dict[str, str]:
        ended.append("b")
        return {}

    monkeypatch.setattr(worker, "jobs_of", lambda _uuid: [at_work])
    monkeypatch.setattr(worker, "stop", lambda _id: True)
    monkeypatch.setattr(worker, "mark_cancelled", lambda _id: None)
    monkeypatch.setattr(settlement, "hold", hold)
    monkeypatch.setattr(release, "release_orphans", lambda _uuid: False)
    monkeypatch.setattr(journal, "unfinished", begun.get)
    assert domain_jobs.cancel("test:///default", Subject("a", "first", None), {"blockcommit": abandon})
    assert sorted(held) == list(BOTH)
    assert ended == ["b"]
