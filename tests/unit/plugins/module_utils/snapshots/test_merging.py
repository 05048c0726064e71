# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of a merge, with its effects taken away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed
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


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.begin(merging.COMMIT, [("u", "web")], {"work": TWO.to_json()}, directory=str(tmp_path))


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The disks whose layers were merged, each with the limit of its job."""
    found: list[tuple[str, int]] = []

    def commit(_handle: Any, merge: Merge, *, bandwidth: int, **_how: Any) -> None:
        found.append((merge.target, bandwidth))

    monkeypatch.setattr(layer_merge, "commit", commit)
    monkeypatch.setattr(layer_merge, "relink", lambda *_arguments: None)
    monkeypatch.setattr(layer_merge, "verify", lambda *_arguments: None)
    return found


def test_a_limit_that_the_worker_is_told_holds_for_the_next_disk_too(
    journal: Journal, merged: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([1 << 20, 5 << 20])
    monkeypatch.setattr(worker, "limit_for", lambda _uuid, _begun_with: next(told))
    merging.run(Handle(), TWO, journal)
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
        merging.run(Handle(), TWO, journal)
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
        merging.run(Handle(), TWO, journal)
    assert (failed.value.state, failed.value.advice) == ("The guest runs.", "See libvirt's log")
    assert list(tmp_path.iterdir()) == [], "the chain is whole"
