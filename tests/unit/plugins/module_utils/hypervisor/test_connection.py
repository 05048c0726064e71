# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    InvalidInput,
    LibvirtFailed,
    NotFound,
    Unsupported,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import connection


@pytest.mark.parametrize("uri", ["qemu:///system", "qemu:///session", "qemu+unix:///system", "test:///default"])
def test_local_uris_are_accepted(uri):
    assert connection.check_local(uri) == uri


@pytest.mark.parametrize(
    "uri", ["qemu+ssh://host/system", "qemu://host/system", "qemu+tls:///system", "qemu+ssh:///system", "", "x"]
)
def test_uris_that_may_lead_elsewhere_are_refused(uri):
    with pytest.raises(InvalidInput, match="delegate_to"):
        connection.check_local(uri)


class Old:
    closed = False

    def getLibVersion(self):
        return 6_010_002

    def close(self):
        self.closed = True


def test_an_old_libvirt_is_refused_with_its_version_and_the_one_needed(monkeypatch):
    class Binding:
        class libvirtError(Exception):
            pass

        registerErrorHandler = staticmethod(lambda *_: None)
        open = staticmethod(lambda _uri: old)

    old = Old()
    monkeypatch.setattr(connection, "libvirt", Binding)
    with pytest.raises(Unsupported, match=r"libvirt 6\.10\.2 on this host is too old.*Upgrade it to 7\.6\.0"):
        connection.open_connection()
    assert old.closed


def test_a_daemon_that_goes_as_soon_as_it_has_come_does_not_answer(monkeypatch):
    def going():
        raise Gone("client socket is closed")

    binding = SimpleNamespace(
        libvirtError=Gone,
        registerErrorHandler=lambda *_: None,
        open=lambda _uri: SimpleNamespace(getLibVersion=going),
    )
    monkeypatch.setattr(connection, "libvirt", binding)
    with pytest.raises(LibvirtFailed, match="No libvirt daemon answers on qemu:///system: client socket is closed"):
        connection.open_connection()


def test_versions():
    assert connection.version_triple(9_000_000) == (9, 0, 0)
    assert connection.version_triple(10_010_003) == (10, 10, 3)


@pytest.fixture
def driver():
    pytest.importorskip("libvirt")
    opened = connection.open_connection("test:///default")
    yield opened
    opened.close()


def test_domains_are_found_by_name_and_uuid_once_each(driver):
    domain = connection.find_domain(driver, "test")
    found = connection.find_domains(driver, ["test", domain.UUIDString(), "test"])
    assert [one.name() for one in found] == ["test"]


def test_an_unknown_domain_is_answered_with_those_there_are(driver):
    with pytest.raises(NotFound, match="The domains here are: test"):
        connection.find_domain(driver, "nobody")
    with pytest.raises(NotFound):
        connection.find_domain(driver, "00000000-0000-0000-0000-000000000000")


def test_libvirts_errors_become_sentences(driver):
    libvirt = pytest.importorskip("libvirt")
    with pytest.raises(LibvirtFailed, match="Looking: ") as error, connection.explaining("Looking"):
        driver.lookupByName("nobody")
    assert error.value.facts["code"] == libvirt.VIR_ERR_NO_DOMAIN


def test_a_daemon_that_is_not_there_is_told_with_what_to_do():
    pytest.importorskip("libvirt")
    with pytest.raises(LibvirtFailed, match="No libvirt daemon answers"):
        connection.open_connection("qemu+unix:///system?socket=/does/not/exist")


def test_a_domain_that_goes_while_all_are_read_is_passed_over_and_any_other_failure_is_not():
    opened = connection.open_connection("test:///default")
    transient = opened.createXML(
        "<domain type='test'><name>short</name><memory>1</memory><os><type>hvm</type></os></domain>"
    )

    def read(handle):
        if handle.name() == "short":
            transient.destroy()
        with connection.explaining("Reading it"):
            return handle.XMLDesc() and handle.name()

    assert connection.of_every_domain(opened, read) == ["test"]

    def fail(handle):
        with connection.explaining("Reading it"):
            handle.snapshotLookupByName("none")

    with pytest.raises(LibvirtFailed):
        connection.of_every_domain(opened, fail)


class Served:
    """A domain over a connection that is, or is not, alive."""

    def __init__(self, alive: bool) -> None:
        self._alive = alive

    def name(self) -> str:
        return "web"

    def UUIDString(self) -> str:
        return "u"

    def isActive(self) -> bool:
        if not self._alive:
            raise Gone("client socket is closed")
        return True

    def connect(self) -> Any:
        return SimpleNamespace(isAlive=lambda: self._alive)


class Gone(Exception):
    """libvirt's own error."""


def test_a_domain_is_reached_over_another_connection_only_where_its_own_has_ended(monkeypatch):
    monkeypatch.setattr(connection, "libvirt", SimpleNamespace(libvirtError=Gone))
    opened, again = [], Served(True)

    def connect_again(uri: str) -> str:
        opened.append(uri)
        return uri

    monkeypatch.setattr(connection, "connect_again", connect_again)
    monkeypatch.setattr(connection, "find_by_uuid", lambda over, uuid: again if (over, uuid) == ("uri", "u") else 0)
    assert connection.answering(again, "uri") is again
    assert opened == []
    assert connection.answering(Served(False), "uri") is again
    assert opened == ["uri"]
    monkeypatch.setattr(connection, "find_by_uuid", lambda _over, _uuid: None)
    with pytest.raises(NotFound, match="'web' is not defined any more"):
        connection.answering(Served(False), "uri")
