# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a run counts as merged before, on images and a domain made by hand."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Disk,
    Domain,
    DomainState,
    Layer,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import layer_merge
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.merge_plan import Merge


@dataclass
class Handle:
    """A domain that is shut off and has no snapshots; ``disks`` are those of its definition."""

    disks: tuple[Disk, ...] = ()

    def name(self) -> str:
        return "web"

    def isActive(self) -> bool:
        return False


def stands_on(path: str) -> Handle:
    return Handle((Disk("vda", "disk", "file", "virtio", (Layer(path, "qcow2"),)),))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merge:
    """An overlay on a base, which nobody has committed."""
    base, top = str(tmp_path / "base"), str(tmp_path / "top")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "1M"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top], check=True)
    empty = Domain("web", "u", DomainState("shutoff", "shutdown"), True, ())
    monkeypatch.setattr(layer_merge, "read_domain", lambda handle, inactive=False: replace(empty, disks=handle.disks))
    monkeypatch.setattr(layer_merge, "read_snapshots", lambda _handle: ())
    return Merge("vda", base, "qcow2", (top,))


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(layer_merge, "_commit_offline", lambda merge, _bandwidth: found.append(merge.top))
    return found


def test_a_run_that_the_definition_names_is_committed(run: Merge, committed: list[str]) -> None:
    layer_merge.commit(stands_on(run.top), run)
    assert committed == [run.top]


def test_a_run_whose_base_the_definition_names_was_committed_before(run: Merge, committed: list[str]) -> None:
    layer_merge.commit(stands_on(run.base), run)
    assert committed == []


@pytest.mark.parametrize(
    "handle", [lambda _run: Handle(), lambda _run: stands_on("/elsewhere")], ids=["detached", "another image"]
)
def test_a_run_that_nobody_stands_on_is_not_known_to_be_committed(
    run: Merge, committed: list[str], handle: Callable[[Merge], Handle]
) -> None:
    with pytest.raises(Refused, match="neither"):
        layer_merge.commit(handle(run), run)
    layer_merge.commit(handle(run), run, done=True)
    assert committed == []
