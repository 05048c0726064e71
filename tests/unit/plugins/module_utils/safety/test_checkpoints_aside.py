# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints out of libvirt's sight, with libvirt taken away."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import connection
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import checkpoints_aside


class Gone(Exception):
    """libvirt's own error."""


class Domain:
    """A domain that is shut off, with checkpoints; ``alive``: its libvirtd."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.alive = True

    def name(self) -> str:
        return "web"

    def UUIDString(self) -> str:
        return "u"

    def isActive(self) -> bool:
        return False

    def listAllCheckpoints(self, _flags: int = 0) -> list[Any]:
        if not self.alive:
            raise Gone("client socket is closed")
        return [
            SimpleNamespace(
                getName=lambda name=name: name,
                getXMLDesc=lambda _flags, name=name: f"<domaincheckpoint><name>{name}</name></domaincheckpoint>",
                delete=lambda _flags, name=name: self.names.remove(name),
            )
            for name in self.names
        ]

    def checkpointCreateXML(self, xml: str, _flags: int) -> None:
        self.names.append(xml.split("<name>")[1].split("<")[0])


@pytest.fixture(autouse=True)
def aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory of the test's own, and libvirt's error also where the bindings are not installed."""
    monkeypatch.setattr(connection, "libvirt", SimpleNamespace(libvirtError=Gone))
    monkeypatch.setattr(checkpoints_aside, "DIRECTORY", str(tmp_path / "aside"))


def test_what_could_not_be_put_back_is_not_forgotten_by_whoever_puts_aside_next() -> None:
    domain = Domain("one", "two")
    with pytest.raises(LibvirtFailed, match="client socket is closed"), checkpoints_aside.set_aside(domain):
        domain.alive = False
    assert domain.names == []
    domain.alive = True
    domain.names.append("three")  # so that there is something to put aside
    with checkpoints_aside.set_aside(domain):
        assert domain.names == []
    assert sorted(domain.names) == ["one", "three", "two"]
