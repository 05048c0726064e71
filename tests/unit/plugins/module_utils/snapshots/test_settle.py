# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import retract
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.settle import Found, worth_keeping


@pytest.mark.parametrize(
    ("found", "keep"),
    [
        ([Found(exists=True, wanted_frozen=True, held=True)], True),
        ([Found(exists=True, wanted_frozen=True, held=False)], False),
        ([Found(exists=True, wanted_frozen=False, held=False)], True),
        ([Found(exists=False, wanted_frozen=False, held=False)], False),
        ([Found(exists=False, wanted_frozen=True, held=True)], False),
        ([Found(True, True, True), Found(True, True, True)], True),
        ([Found(True, True, True), Found(False, True, True)], False),
        ([Found(True, True, True), Found(True, True, False)], False),
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
