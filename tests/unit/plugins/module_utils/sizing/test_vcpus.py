# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which vCPUs go online or offline."""

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import GuestCpus, offline_blocks
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.vcpus import moves


@pytest.mark.parametrize(
    ("online", "offline", "wanted", "expected"),
    [
        ({0}, {1, 2}, 2, [(1, True)]),
        ({0}, {1, 2}, 3, [(1, True), (2, True)]),
        ({0}, set(), 3, []),
        ({0, 1, 2}, set(), 1, [(2, False), (1, False)]),
        ({0, 1}, set(), 2, []),
    ],
)
def test_the_lowest_come_first_and_the_highest_go_first(online, offline, wanted, expected):
    cpus = GuestCpus(frozenset(online), frozenset(offline), frozenset(online | offline) - {0})
    assert moves(cpus, wanted) == expected


@pytest.mark.parametrize("reply", [None, "x", [1], [{"online": False}], [{"phys-index": "1", "online": False}]])
def test_a_reply_that_makes_no_sense_names_no_block(reply):
    assert offline_blocks(reply) == ()
