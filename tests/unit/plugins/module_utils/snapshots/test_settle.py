# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import retract
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.settle import Found, worth_keeping

GOOD = Found(exists=True, wanted_frozen=True, held=True, in_time=True)


@pytest.mark.parametrize(
    ("found", "keep"),
    [
        ([GOOD], True),
        ([replace(GOOD, held=False)], False),
        ([replace(GOOD, held=False, wanted_frozen=False)], True),
        ([replace(GOOD, exists=False)], False),
        ([replace(GOOD, in_time=False)], True),  # alone there is no instant to share
        ([GOOD, GOOD], True),
        ([GOOD, replace(GOOD, exists=False)], False),
        ([GOOD, replace(GOOD, held=False)], False),
        ([GOOD, replace(GOOD, in_time=False)], False),
    ],
)
def test_a_cut_is_kept_only_if_all_have_it_and_it_is_as_good_as_it_was_meant_to_be(found, keep):
    assert worth_keeping(found) is keep


def test_whoever_was_written_last_is_younger(tmp_path):
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.touch()
    overlay.touch()
    os.utime(base, ns=(1, 1000))
    os.utime(overlay, ns=(1, 1000))
    assert retract._younger(str(overlay), than=str(base))
    os.utime(base, ns=(1, 1001))
    assert not retract._younger(str(overlay), than=str(base))
