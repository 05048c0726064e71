# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Fixtures of every test that boots guests. Run them as: tests/lab/enter -- python -m pytest tests/integration"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import libvirt
import pytest
from lab import probe
from lab.guest import Guest, GuestSpec
from lab.host import TestHost, is_inside

IMAGES = Path("/var/lib/libvirt/images")

_LIVE: list[Guest] = []


class GuestFactory(Protocol):
    """Makes a guest that is removed when the fixture ends; ``start=False`` leaves it defined and shut off."""

    def __call__(self, spec: GuestSpec, *, start: bool = True) -> Guest: ...


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says where the tests ran, also with --quiet."""
    if not is_inside():
        terminalreporter.write_line(
            "lab: not inside a private test host; tests that need one were skipped (tests/lab/enter)"
        )
        return
    how = (
        "KVM (a probe guest booted with it)"
        if probe.acceleration() == "kvm"
        else "emulation (no probe guest boots with KVM here)"
    )
    terminalreporter.write_line(f"lab: in a private test host, its guests ran with {how}")


@pytest.fixture(scope="session")
def host() -> TestHost:
    """The private test host; skips where there is none."""
    if not is_inside():
        pytest.skip("needs a private test host; run: tests/lab/enter -- python -m pytest ...")
    test_host = TestHost()
    test_host.start()
    return test_host


@contextlib.contextmanager
def _factory(host: TestHost) -> Iterator[GuestFactory]:
    made: list[Guest] = []

    def make(spec: GuestSpec, *, start: bool = True) -> Guest:
        guest = Guest(host, spec)
        made.append(guest)
        _LIVE.append(guest)
        guest.define()
        return guest.start() if start else guest

    try:
        yield make
    finally:
        errors = []
        for guest in reversed(made):
            _LIVE.remove(guest)
            try:
                guest.cleanup()
            except Exception as error:  # noqa: BLE001  (the others must go too)
                errors.append(error)
        if errors:
            raise errors[0]


@pytest.fixture
def guest_factory(host: TestHost) -> Iterator[GuestFactory]:
    """Makes guests of this test; they are removed after it, whatever happens."""
    with _factory(host) as make:
        yield make


@pytest.fixture(scope="module")
def module_guest_factory(host: TestHost) -> Iterator[GuestFactory]:
    """Makes guests that the tests of one file share; they are removed after the last."""
    with _factory(host) as make:
        yield make


@pytest.fixture
def launched(host: TestHost) -> Iterator[list[str]]:
    """Names of domains that the test has modules make; they go after it, with disks and bases in libvirt's own directory."""
    names: list[str] = []
    yield names
    connection = host.connect()
    for name in names:
        with contextlib.suppress(libvirt.libvirtError):
            domain = connection.lookupByName(name)
            if domain.isActive():
                domain.destroy()
            domain.undefine()
        for path in IMAGES.glob(f"{name}.*"):
            path.unlink()
    connection.close()
    shutil.rmtree(IMAGES / ".vmkeeper-bases", ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the guests' consoles and libvirtd's log to the report of a failed test."""
    report = yield
    if report.failed and is_inside():
        for guest in _LIVE:
            report.sections.append((f"serial console of {guest.name}", guest.serial_tail()))
            report.sections.append((f"QEMU log of {guest.name}", guest.qemu_log(15)))
        report.sections.append(("libvirtd log", _libvirtd_log()))
    return report


def _libvirtd_log() -> str:
    from lab import daemons

    return daemons.log_tail(40)
