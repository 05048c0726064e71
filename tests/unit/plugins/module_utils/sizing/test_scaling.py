# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What check mode tells of a change set."""

from __future__ import annotations

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.scaling import Resized, _Run
from ansible_collections.vmkeeper.libvirt.tests.unit.plugins.module_utils.sizing.a_domain import GIB, facts


def predicted(request: Request) -> Resized:
    known = facts()
    return _Run(None, None, request, known, compute(request, known)).predict()


def test_the_diff_gives_the_way_of_each_change_and_the_reason_for_it():
    foreseen = predicted(Request(vcpus=3, memory=2 * GIB, overcommit=True))
    assert foreseen.after["changes"] == {
        "vcpus": "live: it has room for 4 vCPUs",
        "memory": "next_boot: it was started with 1.0 GiB and without maxMemory, so that none can be plugged",
    }
    assert "changes" not in foreseen.before
    assert "changes" not in predicted(Request(vcpus=2)).after
