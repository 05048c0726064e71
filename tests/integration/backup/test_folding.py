# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Points go in every position, in random histories with forks, growth and disks that come and go; those that stay are exact.

No guest is needed: the images are written by qemu-io, and what they hold is known from a model.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import libvirt
import pytest
from lab.host import TestHost

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput, NoSpace, Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import (
    listing,
    removal,
    restoring,
    retention,
    settle,
    verifying,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import Repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.restore_plan import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.retention_plan import Keep
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import Passphrase
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import journal, space
from ansible_collections.vmkeeper.libvirt.tests.integration.backup import built, points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.built import UUID, Built

URI = "qemu:///system"


class Killed(BaseException):
    """Nothing of ours catches it: what lies there is what a killed run leaves. The real SIGKILL is in test_retention."""


@pytest.fixture(scope="module")
def connection(host: TestHost) -> libvirt.virConnect:
    return libvirt.open(URI)


@pytest.fixture
def steps(monkeypatch) -> dict[str, list[str]]:
    """Counts the steps of a journal, and ends the run when it comes to number ``stop``."""
    seen: dict[str, list[str]] = {"names": [], "stop": []}
    real = journal.Journal.step

    def step(self, name, **data):
        real(self, name, **data)
        seen["names"].append(name)
        if seen["stop"] and len(seen["names"]) == int(seen["stop"][0]):
            raise Killed

    monkeypatch.setattr(journal.Journal, "step", step)
    return seen


def remove(connection: libvirt.virConnect, made: Built, leaving: list[str], **options: Any) -> None:
    options.setdefault("passphrase", made.passphrase)
    subject = removal.subject_of(connection, made.repository, UUID)
    with removal.alone(URI, made.repository, subject, "a test", check=False):
        history = made.repository.history(UUID)
        removal.remove_points(connection, made.repository, subject, history, leaving, **options)


def random_history(rng: random.Random, where: Path, count: int) -> Built:
    """Three disks at most: one from the start, one that comes later, one that pauses. Now and then a fork or a full."""
    where.mkdir(parents=True)
    made = Built(where)
    made.repository  # noqa: B018  (it is made)
    latest: dict[str, str] = {}
    for number in range(count):
        parents: dict[str, str | None] = {}
        for target in ["vda", *(["vdb"] if number >= 2 else []), *(["vdc"] if rng.random() < 0.5 else [])]:
            older = [point.id for point in made.points if point.disk(target)]
            if older and rng.random() < 0.15:
                parents[target] = rng.choice(older)
            elif rng.random() < 0.1:
                parents[target] = None
            else:
                parents[target] = latest.get(target)
        identifier = made.add(rng, parents, grow=rng.choice([0, 0, 0, 3]))
        latest.update(dict.fromkeys(parents, identifier))
    return made


def seeded() -> random.Random:
    seed = int(os.environ.get("VMK_SEED", str(time.time_ns() % 10**9)))
    print(f"VMK_SEED={seed}")
    return random.Random(seed)


def test_whatever_goes_the_points_that_stay_are_exact(connection, directory: Path) -> None:
    rng = seeded()
    for number in range(2 * points.SCALE):
        made = random_history(rng, directory / f"h{number}", 8)
        made.assert_exact("as made")
        assert made.findings() == []
        while ids := made.ids():
            leaving = rng.sample(ids, rng.randint(1, min(3, len(ids))))
            remove(connection, made, leaving)
            made.assert_settled([one for one in ids if one not in leaving])
            made.assert_exact(leaving)
            assert made.findings() == [], leaving


def test_ended_at_any_step_all_points_are_exact_before_and_after_the_next_run(
    connection, directory: Path, steps: dict[str, list[str]]
) -> None:
    rng = seeded()
    for number in range(points.SCALE):
        original = random_history(rng, directory / f"h{number}", 7)
        ids = original.ids()
        leaving = rng.sample(ids, rng.randint(2, 5))
        rest = [one for one in ids if one not in leaving]
        steps["names"].clear()
        steps["stop"] = []
        remove(connection, original.copy(directory / "whole"), leaving)
        names = list(steps["names"])
        assert {"hide", "discard"} <= set(names)
        for stop in range(1, len(names) + 1):
            made = original.copy(directory / "cut")
            steps["names"].clear()
            steps["stop"] = [str(stop)]
            with pytest.raises(Killed):
                remove(connection, made, leaving)
            steps["stop"] = []
            story = (stop, names[stop - 1], leaving)
            assert set(rest) <= set(made.ids()), story
            made.assert_exact(story)
            assert made.findings() == [], story
            if stop % 2:
                # What settles it is told by the journal ...
                pending = journal.unfinished(UUID)
                assert pending is not None
                assert settle.settle_removal(URI, pending)["action"] == "finished", story
            else:
                # ... or, where that is lost with the host, by the tree alone.
                for file in points.JOURNALS.iterdir():
                    file.unlink()
                remove(connection, made, leaving)
            made.assert_settled(rest)
            made.assert_exact(story)
            assert made.findings() == [], story
            assert journal.unfinished(UUID) is None


def plain_bytes(image: Path) -> int:
    """Guest bytes that an image itself holds uncompressed, as qemu-img tells it."""
    text = points.run("qemu-img", "map", "--output=json", "-f", "qcow2", image)
    return sum(one["length"] for one in json.loads(text) if one["depth"] == 0 and one["data"] and "offset" in one)


def coded_history(rng: random.Random, where: Path, kind: str, *, tail: int = 0) -> Built:
    """Four points in one chain, the third larger; some increments of ``mixed`` are not compressed."""
    where.mkdir()
    made = Built(where, passphrase=Passphrase(b"not a secret") if kind == "luks" else None, tail=tail)
    ids: list[str] = []
    for number in range(4):
        compression = None if kind == "luks" or (kind == "mixed" and number in (0, 2)) else "zstd"
        parents = {"vda": ids[-1] if ids else None}
        ids.append(made.add(rng, parents, compression=compression, grow=3 if number == 2 else 0))
    return made


@pytest.mark.parametrize("kind", ["zstd", "mixed", "luks"])
def test_folding_keeps_compression_and_encryption(connection, directory: Path, steps, kind: str) -> None:
    rng = seeded()
    original = coded_history(rng, directory / "original", kind)
    ids = original.ids()
    original.assert_exact("as made")
    assert original.findings() == []
    for leaving in ([0, 1], [1, 2], *(([0], [2], [3], [0, 1, 2]) if points.SCALE > 1 else ())):
        made = original.copy(directory / "cut")
        gone = [ids[number] for number in leaving]
        remove(connection, made, gone)
        rest = [one for one in ids if one not in gone]
        made.assert_settled(rest)
        made.assert_exact((kind, leaving))
        assert made.findings() == [], leaving
        for point in made.repository.history(UUID).points:
            for disk in point.disks:
                assert (disk.encryption is None) == (kind != "luks")
                assert (disk.compression == "zstd") or kind != "zstd"
                if kind == "zstd":
                    assert plain_bytes(made.image(point.id, disk.target)) == 0, (leaving, point.id)
    # Ended at any step, with the passphrase nowhere but in the next task.
    leaving_ids = [ids[0], ids[2]]
    steps["names"].clear()
    remove(connection, original.copy(directory / "whole"), leaving_ids)
    names = list(steps["names"])
    for stop in range(rng.randint(1, 2), len(names) + 1, 4 if points.SCALE == 1 else 1):
        made = original.copy(directory / "cut")
        steps["names"].clear()
        steps["stop"] = [str(stop)]
        with pytest.raises(Killed):
            remove(connection, made, leaving_ids)
        steps["stop"] = []
        story = (kind, stop, names[stop - 1])
        made.assert_exact(story)
        assert made.findings() == [], story
        pending = journal.unfinished(UUID)
        assert pending is not None
        assert "not a secret" not in json.dumps(pending.operation.plan)
        told = settle.settle_removal(URI, pending)["action"]
        if kind == "luks" and names[stop - 1] in ("begin", "hide", "merge"):
            assert "passphrase" in told, story
            made.assert_exact(story)
        remove(connection, made, [one for one in leaving_ids if one in made.ids()])
        made.assert_settled([one for one in ids if one not in leaving_ids])
        made.assert_exact(story)
        assert made.findings() == [], story


@pytest.mark.parametrize("kind", ["plain", "zstd", *(["luks"] if points.SCALE > 1 else [])])
def test_a_removal_may_take_in_points_that_an_interrupted_one_had_merged_and_not_yet_described(
    connection, directory: Path, steps: dict[str, list[str]], kind: str
) -> None:
    """As where the passphrase is in the next task only, or the journal was lost with its host."""
    rng = seeded()
    (directory / "original").mkdir()
    original = Built(directory / "original", passphrase=Passphrase(b"not a secret") if kind == "luks" else None)
    ids: list[str] = []
    for _number in range(5):
        below = ids[-1] if ids else None
        compression = "zstd" if kind == "zstd" else None
        ids.append(original.add(rng, {"vda": below, "vdb": below}, blocks=4, compression=compression))
    first = [ids[0], ids[2]]  # a fold and a merge in the middle
    steps["names"].clear()
    steps["stop"] = []
    remove(connection, original.copy(directory / "whole"), first)
    names = list(steps["names"])
    stops = range(names.index("merge") + 2, len(names) + 1)
    # Without more time: when two disks are merged and the others are not, or when the first manifest is written.
    few = [rng.choice([names.index("merge") + 4, names.index("describe") + 2])]
    for stop in stops if points.SCALE > 1 else few:
        for also in ([ids[1]], [ids[3]], [ids[1], ids[3]]) if points.SCALE > 1 else ([ids[1], ids[3]],):
            made = original.copy(directory / "cut")
            for leaving in (first, also):
                steps["names"].clear()
                steps["stop"] = [str(stop)] if leaving is first else [str(rng.randint(4, 8))]
                with pytest.raises(Killed):
                    remove(connection, made, leaving)
                for file in points.JOURNALS.iterdir():
                    file.unlink()
                story = (kind, stop, names[stop - 1], also, steps)
                made.assert_exact(story)
                assert made.findings() == [], story
            steps["stop"] = []
            remove(connection, made, also)
            made.assert_settled([one for one in ids if one not in (*first, *also)])
            made.assert_exact(story)
            assert made.findings() == [], story


def test_a_layer_that_is_not_compressed_is_poured_over_compressed_clusters_part_by_part(
    connection, directory: Path
) -> None:
    """Both write parts of the same clusters here; QEMU damages such a cluster when two of its requests meet on it."""
    for seed in (251070858, *range(6 * points.SCALE)):
        made = coded_history(random.Random(seed), directory / f"{seed}", "mixed").copy(directory / "cut")
        ids = made.ids()
        remove(connection, made, ids[:2])
        made.assert_settled(ids[2:])
        made.assert_exact(seed)
        assert made.findings() == [], seed


@pytest.mark.parametrize("kind", ["zstd", "mixed", *(["luks"] if points.SCALE > 1 else [])])
def test_a_disk_that_ends_within_a_cluster_keeps_its_end(connection, directory: Path, kind: str) -> None:
    """QEMU writes the last cluster of a compressed layer also where it does not hold it."""
    rng = seeded()
    original = coded_history(rng, directory / "original", kind, tail=rng.choice([512, 4096, 32768, 65024]))
    ids = original.ids()
    original.assert_exact("as made")
    assert original.findings() == []
    for leaving in ([0], [0, 1, 2], *(([1], [2], [3], [0, 1], [0, 2], [1, 2]) if points.SCALE > 1 else ())):
        made = original.copy(directory / "cut")
        remove(connection, made, [ids[number] for number in leaving])
        made.assert_settled([one for number, one in enumerate(ids) if number not in leaving])
        made.assert_exact((kind, leaving))
        assert made.findings() == [], leaving


def test_without_the_right_passphrase_nothing_is_changed(connection, directory: Path) -> None:
    made = coded_history(random.Random(2), directory / "r", "luks")
    ids = made.ids()
    for wrong in (None, Passphrase(b"some other")):
        with pytest.raises(InvalidInput, match="passphrase"):
            remove(connection, made, [ids[1]], passphrase=wrong)
    made.assert_settled(ids)
    refused = points.task("backup_retention", repository=str(made.path), keep_last=2)
    assert refused["failed"]
    assert "passphrase" in refused["msg"]
    arguments = {"repository": str(made.path), "keep_last": 5, "fold": "never"}
    assert points.ok("backup_retention", **arguments)["removed"] == []
    remove(connection, made, [ids[3]], passphrase=None)  # nothing is merged
    done = points.ok("backup_retention", repository=str(made.path), keep_last=1, passphrase="not a secret")
    assert [one["id"] for one in done["removed"]] == ids[1::-1]
    made.assert_settled([ids[2]])
    made.assert_exact("folded")


def test_a_fold_killed_while_it_writes_is_finished(connection, directory: Path, monkeypatch) -> None:
    """qemu-img itself dies: everything is exact, also what it has written half."""
    rng = seeded()
    original = Built(directory / "r")
    original.path.mkdir()
    first = original.add(rng, {"vda": None}, blocks=2)
    second = original.add(rng, {"vda": first}, blocks=40)
    third = original.add(rng, {"vda": second}, blocks=4)
    fourth = original.add(rng, {"vda": third}, blocks=4)
    for leaving, torn in (([first], second), ([second], third)):
        made = original.copy(directory / "torn")
        # A part of the room that it needs, by the limit on a file's size: it stops in the middle.
        written_to = made.image(torn if leaving == [second] else first, "vda")
        smallest = written_to.stat().st_size
        program = directory / "qemu-img"
        program.write_text(
            "#!/bin/sh\n"
            f'case "$1" in commit|rebase) ulimit -f {(smallest + 5 * built.BLOCK) // 512};; esac\nexec /usr/bin/qemu-img "$@"\n'
        )
        program.chmod(0o755)
        with monkeypatch.context() as patched:
            patched.setattr("shutil.which", lambda _name, found=str(program), **_more: found)
            with pytest.raises(Exception, match="Merging disk 'vda'"):
                remove(connection, made, leaving)
        assert written_to.stat().st_size > smallest, "it had begun to write"
        assert made.ids() == sorted({first, second, third, fourth} - set(leaving))
        made.assert_exact(leaving)
        assert made.findings() == []
        remove(connection, made, leaving)
        made.assert_settled(sorted({first, second, third, fourth} - set(leaving)))
        made.assert_exact(leaving)
        assert made.findings() == []


@pytest.mark.parametrize("length", [1, 8, 16])
def test_a_fold_costs_what_the_increment_holds_however_long_the_chain(connection, directory: Path, length: int) -> None:
    rng = random.Random(7)
    made = Built(directory)
    ids = [made.add(rng, {"vda": None}, blocks=60)]
    for _number in range(length):
        ids.append(made.add(rng, {"vda": ids[-1]}, blocks=2))
    increment = next(point for point in made.points if point.id == ids[1]).changed_bytes
    before = written()
    remove(connection, made, ids[:1])
    cost = written() - before
    made.assert_exact("folded")
    # Manifest, sidecar and tables come on top; the full holds twenty times as much.
    assert cost < increment + 12 * built.BLOCK, (cost, increment)


def written() -> int:
    """Bytes that this process and the children that it waited for have handed to write()."""
    text = Path("/proc/self/io").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("wchar")))


def chain(made: Built, rng: random.Random, length: int) -> list[str]:
    ids: list[str] = []
    for _number in range(length):
        ids.append(made.add(rng, {"vda": ids[-1] if ids else None}))
    return ids


def test_who_reads_the_chain_is_named_and_nothing_is_changed(connection, directory: Path) -> None:
    made = Built(directory)
    ids = chain(made, random.Random(3), 3)
    overlay = directory / "overlay.qcow2"
    run = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", made.image(ids[1], "vda"), overlay]
    subprocess.run(run, check=True)
    disk = f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{overlay}'/><target dev='vda'/></disk>"
    domain = connection.defineXML(
        f"<domain type='qemu'><name>lab-instant</name><memory>65536</memory><os><type>hvm</type></os><devices>{disk}</devices></domain>"
    )
    try:
        for leaving in ([ids[0]], [ids[1]], ids[:2]):
            with pytest.raises(Refused, match="lab-instant"):
                remove(connection, made, leaving)
        made.assert_settled(ids)
        remove(connection, made, [ids[2]])  # nobody reads that one
    finally:
        domain.undefine()
    holder = subprocess.Popen(["sleep", "600"], stdin=made.image(ids[1], "vda").open("rb"))
    try:
        with pytest.raises(Refused, match=rf"sleep \({holder.pid}\)"):
            remove(connection, made, [ids[0]])
    finally:
        holder.kill()
        holder.wait()
    remove(connection, made, [ids[0]])
    made.assert_settled([ids[1]])
    made.assert_exact("after")


def test_an_interrupted_fold_waits_for_a_reader_and_blocks_nothing(connection, directory: Path, steps) -> None:
    made = Built(directory)
    ids = chain(made, random.Random(4), 3)
    steps["stop"] = [str(["begin", "checkpoint", "hide", "merge"].index("merge") + 1)]
    with pytest.raises(Killed):
        remove(connection, made, [ids[0]])
    steps["stop"] = []
    holder = subprocess.Popen(["sleep", "600"], stdin=made.image(ids[2], "vda").open("rb"))
    try:
        pending = journal.unfinished(UUID)
        assert pending is not None
        told = settle.settle_removal(URI, pending)
        assert told["action"].startswith("put off"), told
        assert "sleep" in told["action"]
        made.assert_exact("put off")
    finally:
        holder.kill()
        holder.wait()
    findings = points.ok("recover_domain")["findings"]
    assert [one["settled"] for one in findings if "removal" in one["what"]] == [True], findings
    made.assert_settled(ids[1:])
    made.assert_exact("recovered")


def test_damaged_points_stay_and_hold_what_they_stand_on(connection, directory: Path) -> None:
    made = Built(directory)
    ids = chain(made, random.Random(5), 5)
    unreadable = directory / UUID / ids[4] / "manifest.json"
    unreadable.write_text("{}")
    pruned = retention.prune(connection, URI, str(directory), None, Keep(last=1), fold=True)
    assert [one["id"] for one in pruned.removed] == ids[2::-1]
    assert any(ids[4] in warning for warning in pruned.warnings)
    made.contents.pop(ids[4])
    unreadable.rename(unreadable.with_name("broken.json"))
    made.assert_exact("kept")
    unreadable.with_name("broken.json").rename(unreadable)
    with pytest.raises(Refused, match=ids[4]):
        remove(connection, made, [ids[3]])
    gone = removal.remove_by_id(connection, URI, str(directory), UUID, ids[4])
    assert gone is not None
    assert removal.remove_by_id(connection, URI, str(directory), UUID, ids[4]) is None
    assert made.ids() == [ids[3]]


def test_room_is_asked_for_before_anything_is_changed(connection, directory: Path, monkeypatch) -> None:
    made = Built(directory)
    ids = chain(made, random.Random(6), 3)
    with monkeypatch.context() as patched:
        patched.setattr(space, "free_bytes", lambda _directory: 1 << 16)
        with pytest.raises(NoSpace):
            remove(connection, made, [ids[1]])
        remove(connection, made, [ids[2]])  # only frees
    made.assert_settled(ids[:2])


def test_never_folding_removes_whole_chains_and_writes_no_image(connection, directory: Path) -> None:
    made = Built(directory)
    rng = random.Random(8)
    old = chain(made, rng, 3)
    new = chain(made, rng, 3)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob(f"{UUID}/*/*")}
    pruned = retention.prune(connection, URI, str(directory), None, Keep(last=2), fold=False, check=True)
    assert [one["id"] for one in pruned.removed] == old[::-1]
    assert made.ids() == old + new
    pruned = retention.prune(connection, URI, str(directory), None, Keep(last=2), fold=False)
    assert [one["id"] for one in pruned.removed] == old[::-1]
    assert [one.point.id for one in pruned.kept] == new[::-1]
    assert "fold: never" in pruned.kept[2].why
    assert pruned.freed > 0
    left = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob(f"{UUID}/*/*")}
    assert left == {path: status for path, status in before.items() if path.parent.name in new}


@pytest.mark.parametrize("reading", ["proof", "restore"])
def test_what_is_folded_while_a_task_waits_for_the_lock_is_read_as_it_is_then(
    connection, directory: Path, monkeypatch, reading: str
) -> None:
    where = directory / "repository"
    where.mkdir()
    made = Built(where)
    ids = chain(made, random.Random(9), 3)
    locked = Repository.locked

    def locked_later(self, *arguments, **options):
        monkeypatch.setattr(Repository, "locked", locked)
        remove(connection, made, [ids[1]])
        return locked(self, *arguments, **options)

    found = listing.find_point(made.repository, identifier=ids[2])
    monkeypatch.setattr(Repository, "locked", locked_later)
    if reading == "proof":
        assert verifying.prove(made.repository, found, "structure").verified
    else:
        request = Request(str(where), id=ids[2], domain="lab-built-r", directory=str(directory), network="disconnected")
        restored = restoring.restore(connection, URI, request).restored[0]["path"]
        connection.lookupByName("lab-built-r").undefine()
        assert points.content(Path(restored)) == points.content(made.image(ids[2], "vda"))
    assert made.ids() == [ids[0], ids[2]]


def test_a_proof_is_answered_where_the_repository_cannot_keep_it(host: TestHost, directory: Path) -> None:
    made = Built(directory)
    identifier = made.add(random.Random(10), {"vda": None})
    points.run("mount", "--bind", directory, directory)
    try:
        points.run("mount", "-o", "remount,ro,bind", directory)
        proof = points.ok("backup_verify", repository=str(directory), id=identifier)
        assert proof["verified"]
        assert any("could not be kept" in warning for warning in proof["warnings"]), proof["warnings"]
        points.run("mount", "-o", "remount,rw,bind", directory)
        points.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", made.image(identifier, "vda"))
        points.run("mount", "-o", "remount,ro,bind", directory)
        damaged = points.task("backup_verify", repository=str(directory), id=identifier)
    finally:
        points.run("umount", directory)
    assert damaged["failed"]
    assert damaged["error"]["kind"] == "not_proved", damaged["msg"]
    assert damaged["findings"]
    assert "could not be kept" in damaged["msg"]
