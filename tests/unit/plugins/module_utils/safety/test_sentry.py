# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import places, reservation, sentry

MIB = 1 << 20


def test_a_job_ends_only_when_room_and_reserve_run_out_together() -> None:
    assert sentry.in_danger(free=MIB, floor=16 * MIB, headroom=0)
    assert not sentry.in_danger(free=MIB, floor=16 * MIB, headroom=20 * MIB)
    assert not sentry.in_danger(free=20 * MIB, floor=16 * MIB, headroom=0)


def test_headroom_is_that_of_the_target_with_least(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "b").write_bytes(bytes(900))
    watch = sentry.Watch("u", str(tmp_path), {"a": 1000, "b": 1000})
    assert sentry._headroom(watch) == 100
    assert sentry._headroom(sentry.Watch("u", str(tmp_path), {"a": 0})) == 0


def test_what_was_set_aside_and_not_used_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"x" * 4096)
    if not reservation.reserve(str(path), 8 * MIB):
        return  # this filesystem cannot; the sentry is for those
    assert path.stat().st_size == 4096
    assert path.stat().st_blocks * 512 >= 8 * MIB
    reservation.release(str(path))
    assert path.read_bytes() == b"x" * 4096
    assert path.stat().st_blocks * 512 < MIB


def test_a_sentry_has_a_name_for_the_journal_before_it_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "WORKERS", str(tmp_path / "workers"))
    posted = sentry.Sentry("qemu:///system", [sentry.Watch("u", "/srv", {"a": 1})], 16 * MIB)
    assert Path(posted.directory).parent == tmp_path / "workers"
    assert list(tmp_path.iterdir()) == []
    sentry.dismiss(posted.directory)  # as the next run does after a kill in between
    launched = []
    monkeypatch.setattr(sentry.detached, "launch", lambda _entry, where, **_how: launched.append(where))
    monkeypatch.setattr(places, "is_held", lambda _orders: True)
    posted.post()
    assert launched == [posted.directory]
    orders = sentry._read(sentry._orders(posted.directory))
    assert orders.watches == (sentry.Watch("u", "/srv", {"a": 1}),)
    posted.dismiss()
    assert list((tmp_path / "workers").iterdir()) == []
