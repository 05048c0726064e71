# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of an interrupted revert, decided from its journal and what is true now."""

from __future__ import annotations

import os

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.binding import libvirt
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import DomainState
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.host_graph import HostGraph, Reader
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Operation
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import remains, way_back
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.revert_plan import FreshOverlay, RevertPlan

STEPS = ("begin", "overlays", "stop", "define", "nvram", "current", "checkpoints", "start", "discard", "unmark")


def killed_at(step: str) -> Operation:
    """A revert that was killed when it had journalled this step and not yet begun it."""
    reached = STEPS[: STEPS.index(step) + 1]
    return Operation(way_back.OPERATION, [], {}, boot_id="", steps=[{"name": name, "at": 0} for name in reached])


@pytest.mark.parametrize(
    ("step", "true", "taken_back"),
    [
        ("begin", {"active"}, True),
        ("overlays", {"saved"}, True),
        ("stop", {"active"}, False),
        ("stop", set(), False),
        ("stop", {"active", "ran_since"}, True),
        ("stop", {"saved"}, True),
        ("define", set(), False),
        # On its old disks, by somebody's hand: what was done there since is not thrown away.
        ("define", {"active"}, True),
        ("define", {"ran_since"}, True),
        ("define", {"saved"}, True),
        ("define", {"stands_on_new", "active", "ran_since"}, False),
        ("define", {"stands_on_new"}, False),
        # From here on the definition was changed, whatever it and the guest stand on by now.
        *((step, {*now, "ran_since"}, False) for step in STEPS[4:] for now in ((), ("stands_on_new",), ("active",))),
    ],
)
def test_a_revert_is_taken_back_only_while_the_domain_is_known_to_stand_on_its_old_disks(
    step: str, true: set[str], taken_back: bool
) -> None:
    operation = killed_at(step)
    defined = way_back.is_defined(operation, stands_on_new="stands_on_new" in true)
    now = {name: name in true for name in ("active", "ran_since", "saved")}
    assert way_back.is_taken_back(operation, defined=defined, **now) == taken_back


class Handle:
    def connect(self):
        return None

    def name(self):
        return "web"

    def ID(self):
        return 7

    def isActive(self):
        return True

    def destroy(self):
        raise libvirt.libvirtError("Failed to terminate process 7 with SIGKILL: Device or resource busy")

    def UUIDString(self):
        return "u"


def test_an_overlay_that_anybody_uses_is_not_removed_with_those_that_nobody_does(monkeypatch, tmp_path) -> None:
    paths = [str(tmp_path / f"{target}.fresh") for target in ("vda", "vdb", "vdc")]
    for path in paths:
        with open(path, "wb"):
            pass
    above = str(tmp_path / "foreign")
    graph = HostGraph(
        {paths[0]: (Reader("domain", "web", "u"),), above: (Reader("domain", "web", "u"),)}, {above: paths[1]}
    )
    monkeypatch.setattr(remains, "read_graph", lambda _connection: graph)
    monkeypatch.setattr(way_back, "read_graph", lambda _connection: graph)
    overlays = tuple(FreshOverlay(os.path.basename(path)[:3], path, "/base", "raw", 0) for path in paths)
    plan = RevertPlan("one", False, overlays, None, "boot", True, (), (), ())
    assert way_back._stands_on_new(Handle(), plan)
    way_back._undo(Handle(), plan)
    assert [os.path.exists(path) for path in paths] == [True, True, False]


def test_a_guest_that_cannot_be_stopped_or_defined_anew_is_told_with_what_the_next_task_does(monkeypatch) -> None:
    class Noted:
        operation = Operation(way_back.OPERATION, [], {}, boot_id="")

        def step(self, name, **_data):
            pass

    plan = RevertPlan("one", False, (), None, "boot", True, (), (), ())
    with pytest.raises(LibvirtFailed, match=r"told to stop.*next task.*finishes the revert.*keeps its present"):
        way_back._go_on(Handle(), plan, Noted())

    def fails(_handle, _layers):
        raise LibvirtFailed("Putting the definition on other images")

    monkeypatch.setattr(way_back, "_stop", lambda _handle: None)
    monkeypatch.setattr(way_back, "_old_tops", lambda _handle, _plan: [])
    monkeypatch.setattr(way_back, "read_state", lambda _handle: DomainState("shutoff", "destroyed"))
    monkeypatch.setattr(way_back, "put_definition_on", fails)
    with pytest.raises(LibvirtFailed, match=r"is shut off.*old disks.*finishes the revert.*keeps its present"):
        way_back._go_on(Handle(), plan, Noted())
