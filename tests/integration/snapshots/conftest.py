# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Callable

import pytest
from lab.guest import Guest, GuestSpec


@pytest.fixture(scope="module")
def make_guest(module_guest_factory) -> Callable[..., Guest]:
    """Guests that live as long as the test module. ``start`` is ``"no"``, ``"async"`` (do not wait) or ``"wait"``."""

    def make(spec: GuestSpec, start: str = "wait") -> Guest:
        guest = module_guest_factory(spec, start=start == "wait")
        if start == "async":
            guest.start(wait=False)
        return guest

    return make
