# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests that were shut down for their snapshot, when libvirtd goes away before they run again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed, VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import connection
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import taking


class Gone(Exception):
    """libvirt's own error."""


class Off:
    """A domain that is shut off; ``broken``: it cannot be started, ``alive``: its connection."""

    def __init__(self, *, alive: bool = True, broken: bool = False) -> None:
        self.active = False
        self._alive = alive
        self._broken = broken

    def isActive(self) -> bool:
        if not self._alive:
            raise Gone("client socket is closed")
        return self.active

    def create(self) -> None:
        if self._broken:
            raise Gone("no memory")
        self.active = True


def no_daemon(*_arguments: Any) -> Any:
    """What every way to libvirt comes to."""
    raise LibvirtFailed("No libvirt daemon answers on test:///", advice="Start it")


@pytest.fixture(autouse=True)
def binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt's error, also where the bindings are not installed."""
    for module in (connection, taking):
        monkeypatch.setattr(module, "libvirt", SimpleNamespace(libvirtError=Gone))


def a_taking(*handles: Off, shutdown: bool = True) -> Any:
    plans = [
        SimpleNamespace(domain=SimpleNamespace(uuid=str(number), name=f"vm{number}"), shutdown=shutdown)
        for number, _handle in enumerate(handles)
    ]
    of_no_concern: Any = None
    run: Any = taking._Taking(None, "test:///", list(handles), [], plans, of_no_concern)  # type: ignore[arg-type]
    run._journal = SimpleNamespace(
        note=lambda _step: None,
        step=lambda _step: None,
        operation=SimpleNamespace(reached=lambda step: shutdown and step == "shutdown"),
    )
    return run


def test_a_guest_is_started_again_over_another_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    again = Off()
    monkeypatch.setattr(taking, "answering", lambda _handle, _uri: again)
    run = a_taking(Off(alive=False))
    run._start_again()
    assert again.active
    assert run._handles == [again], "what is read afterwards is read over it, too"


def test_a_guest_that_cannot_be_started_again_since_libvirt_does_not_answer_is_told_to_be_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(taking, "answering", no_daemon)
    with pytest.raises(LibvirtFailed) as failed:
        a_taking(Off(alive=False))._start_again()
    assert failed.value.state == "The snapshot exists; what was shut down for it may be off."
    assert "recover_domain" in failed.value.advice
    a_taking(Off(alive=False), shutdown=False)._start_again()


def test_a_guest_that_does_not_start_keeps_no_other_of_its_group_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "answering", lambda handle, _uri: handle)
    guests = (Off(), Off(broken=True), Off())
    with pytest.raises(LibvirtFailed, match="Starting domain 'vm1' again: no memory"):
        a_taking(*guests)._start_again()
    assert [guest.active for guest in guests] == [True, False, True]


@pytest.mark.parametrize("shutdown", [True, False])
def test_undoing_waits_for_libvirt_where_a_guest_is_off_for_it(monkeypatch: pytest.MonkeyPatch, shutdown: bool) -> None:
    done: list[str] = []
    monkeypatch.setattr(taking, "wait_for_daemon", done.append)
    monkeypatch.setattr(taking.settle, "undo", lambda _uri, _journal: [])
    run = a_taking(Off(), shutdown=shutdown)
    run._journal.step = done.append
    run._undo(VmkeeperError("Anything"))
    assert done == (["undo", "test:///"] if shutdown else ["undo"]), (
        "a run that is killed while it waits is undone, too"
    )


@pytest.mark.parametrize("shutdown", [True, False])
def test_a_guest_that_may_be_off_after_undoing_has_failed_is_told(
    monkeypatch: pytest.MonkeyPatch, shutdown: bool
) -> None:
    for name in ("wait_for_daemon", "open_connection"):
        monkeypatch.setattr(taking, name, no_daemon)
    monkeypatch.setattr(taking.settle, "undo", no_daemon)
    error = VmkeeperError("Anything")
    a_taking(Off(), shutdown=shutdown)._undo(error)
    assert "Undoing it failed" in error.state
    assert ("may be off" in error.state) is shutdown
