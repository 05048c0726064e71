# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What a backup asks for before it begins is what it takes then."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import NoSpace
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import preflight, repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import reservation, space

MIB = 1 << 20


def planned(disks: int, *, live: bool = True) -> Any:
    return SimpleNamespace(disks=[None] * disks, estimate=disks * 10 * MIB, live=live)


@pytest.mark.parametrize(
    ("plans", "possible", "needed"),
    [
        ([planned(3)], True, 3 * (10 + 16)),
        ([planned(2), planned(1)], True, 3 * (10 + 16)),
        ([planned(2), planned(5, live=False)], True, 2 * (10 + 16) + 5 * 10),
        ([planned(5, live=False)], True, 5 * 10 + 16),
        ([planned(3)], False, 3 * 10 + 16),
    ],
)
def test_each_target_of_a_running_domain_has_its_own_share_set_aside(
    tmp_path: Path, monkeypatch, plans: list[Any], possible: bool, needed: int
) -> None:
    opened = repository.open_repository(str(tmp_path), create=True)
    monkeypatch.setattr(reservation, "is_possible", lambda directory: possible)
    monkeypatch.setattr(space, "free_bytes", lambda directory: needed * MIB)
    preflight.require_space(opened, plans, 16 * MIB, None)
    monkeypatch.setattr(space, "free_bytes", lambda directory: needed * MIB - 1)
    with pytest.raises(NoSpace) as caught:
        preflight.require_space(opened, plans, 16 * MIB, None)
    assert caught.value.facts["needed"] == needed * MIB


def test_whether_room_can_be_set_aside_is_tried_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "x").touch()
    assert reservation.is_possible(str(tmp_path)) == reservation.reserve(str(tmp_path / "x"), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    monkeypatch.setattr(reservation, "_fallocate", lambda descriptor, size: errno.EOPNOTSUPP)
    assert not reservation.is_possible(str(tmp_path))
