# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import ground


@pytest.mark.parametrize(("taken", "counted"), [(3 << 20, 3 << 20), (100 << 30, 10 << 30)])
def test_a_layer_takes_up_no_more_than_its_disk_however_large_the_device_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: int, counted: int
) -> None:
    image = tmp_path / "image"
    image.touch()
    monkeypatch.setattr(ground.chain, "virtual_size", lambda _layer: 10 << 30)
    monkeypatch.setattr(ground, "allocated", lambda _path: taken)
    assert ground._image(str(image), "raw").allocated == counted
