# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The end of a copy of a running guest, also where libvirtd was restarted in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.backup_job import End
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.binding import libvirt
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import live_copy


class Handle:
    """A domain's handle; one of a connection that is closed knows its name and UUID, and nothing else."""

    def __init__(self, *, closed: bool) -> None:
        self.closed = closed
        self.resumed = False

    def name(self) -> str:
        return "web"

    def UUIDString(self) -> str:
        return "u"

    def _ask(self) -> None:
        if self.closed:
            raise libvirt.libvirtError("internal error: client socket is closed")

    def state(self) -> list[int]:
        self._ask()
        return [1, 1] if self.resumed else [3, 5]

    def resume(self) -> None:
        self._ask()
        self.resumed = True


class NobodyWatches:
    def verdict(self) -> None:
        return None


def finish(monkeypatch: pytest.MonkeyPatch, where: Path, end: End, present: Handle | None) -> None:
    monkeypatch.setattr(live_copy.backup_job, "wait", lambda *_arguments: end)
    monkeypatch.setattr(live_copy, "connect_again", lambda uri: {"uri": present})
    monkeypatch.setattr(live_copy, "find_by_uuid", lambda connection, uuid: connection["uri"] if uuid == "u" else None)
    watching: Any = NobodyWatches()
    live_copy.finish("uri", Handle(closed=True), str(where), watching)


def test_a_copy_that_outlived_libvirtd_is_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = Handle(closed=False)
    finish(monkeypatch, tmp_path, End(True), present)
    assert present.resumed
    finish(monkeypatch, tmp_path, End(True), None)  # transient, and shut off since: its copy is whole


def test_a_copy_whose_end_nobody_knows_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LibvirtFailed, match=r"libvirtd was restarted.* No image was made"):
        finish(monkeypatch, tmp_path, End(None, "libvirtd was restarted"), Handle(closed=False))
