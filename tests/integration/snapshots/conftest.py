# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost


@pytest.fixture(scope="session")
def host() -> TestHost:
    host = TestHost()
    host.start()
    return host


@pytest.fixture(scope="module")
def make_guest(host: TestHost) -> Iterator[Callable[..., Guest]]:
    """Guests that live as long as the test module. ``start`` is ``"no"``, ``"async"`` (do not wait) or ``"wait"``."""
    with contextlib.ExitStack() as cleanups:

        def make(spec: GuestSpec, start: str = "wait") -> Guest:
            guest = Guest(host, spec)
            cleanups.callback(guest.cleanup)
            guest.define()
            if start != "no":
                guest.start(wait=start == "wait")
            return guest

        yield make
