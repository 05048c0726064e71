# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

import datetime
import os
import random
import time
from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import retention_plan
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.manifest import Point, StoredDisk
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.retention_plan import (
    Keep,
    plan_retention,
    select,
)

UUID = "8b2f4a3e-0000-4000-8000-000000000001"
UTC = datetime.timezone.utc


def as_utc(moment: datetime.datetime) -> datetime.datetime:
    return moment.astimezone(UTC)


def at(text: str, number: int = 0, parent: str | None = None, **changes) -> Point:
    """A point cut at ``YYYY-MM-DD HH:MM`` UTC; its id is that text."""
    created = f"{text.replace(' ', 'T')}:00+00:00"
    disk = StoredDisk("vda", "incremental" if parent else "full", "r", parent, 1 << 20, 100, 1)
    made = Point(text, number, "web", UUID, created, disk.type, "r", parent, "crash", (disk,), stored_bytes=100)
    return replace(made, **changes)


def series(*texts: str) -> list[Point]:
    """Points in the order of time, newest first as ``select`` takes them."""
    return [at(text, number) for number, text in enumerate(sorted(texts))][::-1]


CASES = [
    ("the newest ones", Keep(last=2), ["2026-01-01 01:00", "2026-01-01 02:00", "2026-01-01 03:00"], [1, 2]),
    (
        "of several in one day the newest, and days without points do not count",
        Keep(daily=2),
        ["2026-01-01 01:00", "2026-01-01 23:00", "2026-01-09 01:00", "2026-01-09 02:00"],
        [1, 3],
    ),
    (
        "hours, then days older than those hours",
        Keep(hourly=2, daily=2),
        ["2026-01-01 10:00", "2026-01-02 10:00", "2026-01-03 09:10", "2026-01-03 09:50", "2026-01-03 11:00"],
        [0, 1, 3, 4],
    ),
    (
        "a day that keep_last covers is not counted by keep_daily",
        Keep(last=2, daily=1),
        ["2026-01-01 10:00", "2026-01-02 10:00", "2026-01-03 10:00", "2026-01-03 11:00"],
        [1, 2, 3],
    ),
    (
        "a week runs from Monday to Sunday",
        Keep(weekly=2),
        # 2026-01-04 is a Sunday, the last day of week 1, which began on 2025-12-29.
        ["2025-12-28 10:00", "2025-12-29 10:00", "2026-01-04 10:00", "2026-01-05 10:00"],
        [2, 3],
    ),
    (
        "a week over the turn of the year is one week",
        Keep(weekly=9),
        ["2025-12-31 10:00", "2026-01-01 10:00"],
        [1],
    ),
    (
        "what was passed for a newer one of its week is not taken up by keep_monthly",
        Keep(weekly=1, monthly=2),
        # Both in the week from 2026-01-26 to 2026-02-01; January is then kept by an older point.
        ["2026-01-20 10:00", "2026-01-31 10:00", "2026-02-01 10:00"],
        [0, 2],
    ),
    (
        "what an earlier option only stopped before is taken up",
        Keep(daily=1, monthly=2),
        ["2026-01-30 10:00", "2026-01-31 10:00", "2026-02-01 10:00"],
        [1, 2],
    ),
    (
        "years",
        Keep(monthly=1, yearly=2),
        ["2023-05-01 00:00", "2024-05-01 00:00", "2025-05-01 00:00", "2026-05-01 00:00", "2026-06-01 00:00"],
        [1, 2, 4],
    ),
    ("more than there are", Keep(daily=99), ["2026-01-01 10:00", "2026-01-02 10:00"], [0, 1]),
    ("none at all", Keep(last=3, yearly=2), [], []),
]


@pytest.mark.parametrize(("keep", "texts", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_documented_rules(keep: Keep, texts: list[str], expected: list[int]) -> None:
    assert sorted(select(series(*texts), keep, as_utc)) == [texts[index] for index in expected]


def test_each_kept_point_says_which_option_keeps_it_for_which_period() -> None:
    texts = ["2025-03-01 10:00", "2026-01-10 10:00", "2026-01-11 10:00", "2026-01-12 10:00", "2026-01-12 11:00"]
    why = select(series(*texts), Keep(last=1, daily=1, weekly=1, yearly=1), as_utc)
    assert why == {
        "2026-01-12 11:00": "keep_last: 1 of 1",
        "2026-01-11 10:00": "keep_daily: the newest of 2026-01-11, 1 of 1",
        "2025-03-01 10:00": "keep_weekly: the newest of 2025-W09, 1 of 1",
    }


def reference(points: list[Point], keep: Keep) -> set[str]:
    """The rules once more, from the marks that Proxmox's documentation and simulator show, as slowly as they read."""
    mark: dict[str, str] = {}
    stages = [
        (keep.last, lambda moment: moment.isoformat()),
        (keep.hourly, lambda moment: moment.strftime("%Y/%m/%d/%H")),
        (keep.daily, lambda moment: str(moment.date())),
        (keep.weekly, lambda moment: str(moment.isocalendar()[:2])),
        (keep.monthly, lambda moment: str((moment.year, moment.month))),
        (keep.yearly, lambda moment: str(moment.year)),
    ]
    for most, period_of in stages:
        covered = [period_of(one.created_at) for one in points if mark.get(one.id) == "keep"]
        counted: list[str] = []
        for one in points:
            period = period_of(one.created_at)
            if one.id in mark or period in covered:
                continue
            if period in counted:
                mark[one.id] = "remove"
                continue
            if len(counted) == most:
                break
            counted.append(period)
            mark[one.id] = "keep"
    return {identifier for identifier, one in mark.items() if one == "keep"}


def test_random_series_are_kept_as_the_reference_keeps_them() -> None:
    seed = int(os.environ.get("VMK_SEED", str(time.time_ns() % 10**9)))
    print(f"VMK_SEED={seed}")
    rng = random.Random(seed)
    for _round in range(300):
        spread = rng.choice([3, 60, 900, 20000])
        start = datetime.datetime(2024, 12, 1, tzinfo=UTC)
        moments = {start + datetime.timedelta(minutes=30 * rng.randrange(spread)) for _number in range(40)}
        points = series(*(f"{moment:%Y-%m-%d %H:%M}" for moment in moments))
        keep = Keep(*(rng.choice([0, 0, 1, 2, 5]) for _option in range(6)))
        assert set(select(points, keep, as_utc)) == reference(points, keep), (seed, keep)


def test_periods_are_those_of_the_hosts_zone(monkeypatch) -> None:
    points = series("2026-03-28 23:30", "2026-03-29 10:00", "2026-03-29 21:30", "2026-03-29 22:30")
    monkeypatch.setenv("TZ", "Europe/Berlin")  # one hour ahead until 2026-03-29 01:00 UTC, then two
    time.tzset()
    try:
        kept = select(points, Keep(daily=9), retention_plan.host_time)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert sorted(kept) == ["2026-03-29 21:30", "2026-03-29 22:30"]


def plan(points: list[Point], keep: Keep, *, damaged=None, grounds=None, fold: bool = True) -> dict[str, str]:
    made = plan_retention(points, keep, damaged=damaged or {}, grounds=grounds or {}, fold=fold, clock=as_utc)
    kept = {one.point.id: one.why for one in made.kept}
    assert not kept.keys() & {one.id for one in made.removed}
    assert len(kept) + len(made.removed) == len(points)
    return kept


def chain(count: int, **changes) -> list[Point]:
    ids = [f"2026-01-{number + 1:02d} 10:00" for number in range(count)]
    return [at(one, number, ids[number - 1] if number else None, **changes) for number, one in enumerate(ids)]


def test_protected_points_stay_and_do_not_count() -> None:
    points = chain(4)
    points[3] = replace(points[3], protected=True)
    points[0] = replace(points[0], protected=True)
    kept = plan(points, Keep(last=1))
    assert sorted(kept) == [points[0].id, points[2].id, points[3].id]
    assert kept[points[3].id].startswith("protected")


def test_damaged_points_stay_do_not_count_and_keep_what_they_stand_on() -> None:
    points = chain(4)
    kept = plan(points, Keep(last=1), damaged={points[3].id: "its image is missing"})
    assert sorted(kept) == [points[2].id, points[3].id]
    assert "its image is missing" in kept[points[3].id]
    points = [*chain(2), at("2026-02-01 10:00", 7)]
    kept = plan(points, Keep(last=1), damaged={points[1].id: "x"})
    assert kept[points[0].id] == f"{points[1].id} stands on it and cannot be merged"
    kept = plan(points, Keep(last=1), grounds={points[0].id: ["20260101T000000Z-0000"]})
    assert points[0].id in kept
    assert points[1].id not in kept


def test_never_folding_keeps_what_kept_points_stand_on() -> None:
    points = [*chain(3), replace(at("2026-02-01 10:00", 7), disks=())]
    assert sorted(plan(points, Keep(last=2), fold=True)) == [points[2].id, points[3].id]
    kept = plan(points, Keep(last=2), fold=False)
    assert sorted(kept) == [one.id for one in points]
    assert kept[points[0].id] == f"{points[1].id} stands on it (fold: never)"
    assert sorted(plan(points, Keep(last=1), fold=False)) == [points[3].id]


def test_the_latest_is_the_one_made_last_whatever_the_clock_said() -> None:
    points = [at("2026-01-05 10:00", 1), at("2026-01-01 10:00", 2)]
    assert list(plan(points, Keep(last=1))) == ["2026-01-01 10:00"]


def test_no_option_keeps_nothing_and_says_so() -> None:
    assert not Keep()
    assert not Keep(last=0, daily=0)
    assert Keep(yearly=1)
