# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.facts import whole_sectors


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 512), (512, 512), (1000001, 1000448), (1 << 30, 1 << 30)])
def test_a_raw_image_is_as_large_as_qemu_says(length: int, size: int) -> None:
    assert whole_sectors(length) == size
