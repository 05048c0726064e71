# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import errno

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import recovery
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Operation


class Handle:
    """A domain whose name is its UUID."""

    def __init__(self, name):
        self._name = name

    def name(self):
        return self._name

    UUIDString = name


@pytest.fixture
def left(monkeypatch):
    """What is unfinished: kinds of operations by domain. ``settled`` are the domains that were reached, in order."""

    class Left(dict):
        settled: list[str]

    found = Left()
    found.settled = []

    def settle(_uri, domains, settlers):
        (uuid, name) = domains[0]
        found.settled.append(name)
        if uuid not in found:
            return []
        settlers[found[uuid]](None, None)
        del found[uuid]
        return [{"domain": name, "what": "it", "action": "finished"}]

    def peek(uuid):
        return Operation(found[uuid], [{"uuid": uuid, "name": uuid}], {}) if uuid in found else None

    monkeypatch.setattr(recovery.settlement, "settle_named", settle)
    monkeypatch.setattr(recovery.settlement, "hold", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(recovery.release, "release_orphans", lambda _uuid: False)
    monkeypatch.setattr(recovery.journal, "peek", peek)
    monkeypatch.setattr(recovery.journal, "all_unfinished", lambda: set(found))
    monkeypatch.setattr(recovery.appliance, "sweep", lambda: None)
    return found


def fails(_uri, _pending):
    raise OSError(errno.EROFS, "Read-only file system")


def succeeds(_uri, _pending):
    return {}


def test_one_domains_trouble_of_any_kind_keeps_no_other_from_being_recovered(left):
    left.update(app="snapshot", web="backup")
    settlers = {"snapshot": fails, "backup": succeeds}
    findings = recovery.recover("", [Handle("app"), Handle("web")], settlers, {"snapshot": lambda _: fails(0, 0)})
    assert [(one["domain"], one["settled"]) for one in findings] == [("app", False), ("web", True)]
    assert "Read-only file system" in findings[0]["action"]


def test_what_takes_long_comes_last(left):
    left.update(a="blockcommit", b="snapshot")
    settlers = {"snapshot": succeeds, "blockcommit": succeeds}
    recovery.recover("", [Handle("a"), Handle("b"), Handle("c")], settlers, {}, last=("blockcommit",))
    assert left.settled == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("uri", "known"), [("qemu:///system", True), ("qemu+unix:///system", True), ("qemu:///session", False)]
)
def test_a_users_own_libvirt_does_not_know_which_of_the_systems_domains_are_gone(left, uri, known):
    left.update(old="snapshot", web="backup")

    class Connection:
        def getURI(self):
            return uri

        def listAllDomains(self):
            return [Handle("web")]

    found = recovery.unfinished_without_domain(Connection())
    assert [uuid for uuid, _name, _operation in found] == (["old"] if known else [])
