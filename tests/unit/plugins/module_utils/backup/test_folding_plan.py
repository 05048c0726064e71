# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.folding_plan import RemovalPlan, plan_removal
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.manifest import Point, StoredDisk

UUID = "8b2f4a3e-0000-4000-8000-000000000001"
MIB = 1 << 20

#: MiB of an image that may be its own tables, and hold nothing of the guest's.
TABLES = 1


def point(name: str, stored: int = MIB, **parents: str | None) -> Point:
    """A point called like its place; ``parents`` are of its disks."""
    disks = tuple(
        StoredDisk(target, "incremental" if parent else "full", "r", parent, 1 << 30, stored, stored)
        for target, parent in parents.items()
    )
    return Point(
        name, ord(name[0]), "web", UUID, "", "full", "r", None, "crash", disks, stored_bytes=stored * len(disks)
    )


def plan(points: list[Point], *leaving: str) -> RemovalPlan:
    return plan_removal([one for one in points if one.id not in leaving], [one for one in points if one.id in leaving])


def told(made: RemovalPlan) -> list[tuple[str, str, str, tuple[str, ...], str | None]]:
    return [(merge.how, merge.point, merge.target, merge.through, merge.onto) for merge in made.merges]


CHAIN = [
    point("a", 100 * MIB, vda=None),
    point("b", 3 * MIB, vda="a"),
    point("c", 5 * MIB, vda="b"),
    point("d", 7 * MIB, vda="c"),
]


def test_the_oldest_is_folded_at_the_increments_cost() -> None:
    made = plan(CHAIN, "a")
    assert told(made) == [("fold", "b", "vda", ("a",), None)]
    assert made.needed == 4 * MIB
    assert made.most_freed == (3 + TABLES) * MIB


def test_several_of_the_oldest_are_folded_at_once() -> None:
    made = plan(CHAIN, "a", "b", "c")
    assert told(made) == [("fold", "d", "vda", ("c", "b", "a"), None)]
    assert made.needed == (7 + 5 + 3 + 1) * MIB
    assert made.most_freed == (3 + 5 + 7 + 3 * TABLES) * MIB


def test_zeros_that_are_folded_give_back_what_the_full_held() -> None:
    full, last = point("a", 100 * MIB, vda=None), point("b", 3 * MIB, vda="a")
    (disk,) = last.disks
    wiped = last.with_disks([replace(disk, changed_bytes=43 * MIB)])
    assert plan([full, wiped], "a").most_freed == (3 + 40 + TABLES) * MIB
    wiped = last.with_disks([replace(disk, changed_bytes=900 * MIB)])
    assert plan([full, wiped], "a").most_freed == (3 + 100) * MIB, "no more than it held"


def test_one_in_the_middle_is_merged_into_what_stands_on_it() -> None:
    made = plan(CHAIN, "b", "c")
    assert told(made) == [("rebase", "d", "vda", ("c", "b"), "a")]
    assert made.needed == 9 * MIB
    assert made.most_freed == 8 * MIB


def test_the_newest_and_whole_chains_just_go() -> None:
    for leaving in (["d"], ["c", "d"], ["a", "b", "c", "d"]):
        made = plan(CHAIN, *leaving)
        assert made.merges == ()
        assert made.needed == 0
        assert [one.id for one in made.points] == leaving
        assert made.most_freed == sum(one.stored_bytes for one in made.points)


def test_disks_of_one_point_have_their_own_pasts() -> None:
    points = [
        point("a", vda=None),
        point("b", vda="a", vdb=None),
        point("c", vda="b", vdb="b"),
        point("d", vda="c"),
        point("e", vda="d", vdb="c"),
    ]
    assert told(plan(points, "b")) == [("rebase", "c", "vda", ("b",), "a"), ("fold", "c", "vdb", ("b",), None)]
    assert told(plan(points, "c", "d")) == [
        ("rebase", "e", "vda", ("d", "c"), "b"),
        ("rebase", "e", "vdb", ("c",), "b"),
    ]


def test_of_a_fork_on_a_full_one_is_folded_after_the_others_have_copies() -> None:
    points = [point("a", 9 * MIB, vda=None), point("b", MIB, vda="a"), point("c", 2 * MIB, vda="a")]
    made = plan(points, "a")
    assert told(made) == [("copy", "c", "vda", ("a",), None), ("fold", "b", "vda", ("a",), None)]
    assert made.needed > 1 << 30
    points.append(point("d", vda="b"))
    assert told(plan(points, "a", "b")) == [("copy", "c", "vda", ("a",), None), ("fold", "d", "vda", ("b", "a"), None)]


def test_of_a_fork_in_the_middle_each_takes_over_what_it_needs() -> None:
    points = [*CHAIN[:2], point("x", vda="b"), point("y", vda="b")]
    assert told(plan(points, "b")) == [("rebase", "x", "vda", ("b",), "a"), ("rebase", "y", "vda", ("b",), "a")]


def coded(one: Point, **changes) -> Point:
    return replace(one, disks=tuple(replace(disk, **changes) for disk in one.disks))


@pytest.mark.parametrize("changes", [{"compression": "zstd"}, {"encryption": {"format": "luks"}}])
def test_compressed_and_encrypted_layers_are_copied_as_they_are_stored(changes) -> None:
    for number in range(3):
        points = [coded(one, **changes) if at == number else one for at, one in enumerate(CHAIN)]
        how = ["pour" if number >= 1 else "rebase"]
        assert [merge.how for merge in plan(points, "b").merges] == how, "b is merged into c, a stays as it is"
        assert [merge.how for merge in plan(points, "a", "b").merges] == ["pour"]
    assert told(plan([coded(one, **changes) for one in CHAIN], "b", "c")) == [("pour", "d", "vda", ("c", "b"), "a")]


def test_a_fork_of_compressed_layers_is_refused() -> None:
    points = [point("a", vda=None), coded(point("b", vda="a"), compression="zstd"), point("c", vda="a")]
    with pytest.raises(Refused, match="b, c"):
        plan(points, "a")


def test_nothing_is_merged_into_a_chain_that_is_not_whole() -> None:
    with pytest.raises(Refused, match="Remove point c first"):
        plan([CHAIN[1], CHAIN[2]], "b")
    missing = [CHAIN[0], point("b", vdb=None), point("c", vda="b")]
    with pytest.raises(Refused, match="does not hold it"):
        plan(missing, "b")


def test_a_loop_in_damaged_manifests_ends() -> None:
    points = [point("a", vda="b"), point("b", vda="a"), point("c", vda="b")]
    with pytest.raises(Refused):
        plan(points, "a", "b")
