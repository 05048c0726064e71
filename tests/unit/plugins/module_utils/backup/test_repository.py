# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    Conflict,
    NotFound,
    Refused,
    Unsupported,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import listing, manifest, removal, repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.manifest import Point, StoredDisk
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_header
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import places

UUID = "8b2f4a3e-0000-4000-8000-000000000001"


def point(number: int, parent: str | None = None, **changes) -> Point:
    disk = StoredDisk("vda", "incremental" if parent else "full", "r", parent, 1 << 20, 1, 1)
    return replace(
        Point(
            f"20261120T2015{number:02d}Z-7f3a",
            number,
            "web",
            UUID,
            f"2026-11-20T20:15:{number:02d}+00:00",
            "full",
            "r",
            parent,
            "crash",
            (disk,),
        ),
        **changes,
    )


def store(where: repository.Repository, one: Point) -> Path:
    path = Path(where.point_directory(one.domain_uuid, one.id))
    path.mkdir(parents=True)
    (path / "vda.qcow2").touch()
    places.write_json(str(path / "manifest.json"), manifest.to_json(one))
    return path


@pytest.fixture
def opened(tmp_path: Path) -> repository.Repository:
    return repository.open_repository(str(tmp_path), create=True)


def test_only_an_empty_directory_becomes_a_repository(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not a repository"):
        repository.open_repository(str(tmp_path))
    assert repository.open_repository(str(tmp_path), create=True, check=True).fresh
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "lost+found").mkdir()
    made = repository.open_repository(str(tmp_path), create=True)
    assert repository.open_repository(str(tmp_path)) == made
    (tmp_path / "repository.json").unlink()
    (tmp_path / "data").touch()
    with pytest.raises(Refused, match="not empty"):
        repository.open_repository(str(tmp_path), create=True)


def test_two_that_make_a_repository_at_the_same_time_have_the_same_one(tmp_path: Path, monkeypatch) -> None:
    looked, made = places.read_json, []

    def look(path: str) -> object:
        if made:
            return looked(path)
        made.append(None)
        made.append(repository.open_repository(str(tmp_path), create=True))
        repository.make_domain_directory(made[1], UUID)
        return None

    monkeypatch.setattr(places, "read_json", look)
    assert repository.open_repository(str(tmp_path), create=True) == made[1]
    assert repository.open_repository(str(tmp_path)) == made[1]
    assert not list(tmp_path.glob(".new-*"))


def test_a_newer_or_damaged_repository_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "repository.json"
    for text, error in (
        ('{"format": 2}', Unsupported),
        ("{", Refused),
        ("[]", Refused),
        ('{"format": 1, "uuid": "../x"}', Refused),
    ):
        marker.write_text(text)
        with pytest.raises(error):
            repository.open_repository(str(tmp_path))


def test_one_damaged_point_does_not_hide_the_others_and_breaks_only_what_stands_on_it(opened) -> None:
    chain = [point(1), point(2, point(1).id), point(3, point(2).id), point(4)]
    paths = [store(opened, one) for one in chain]
    (paths[1] / "manifest.json").write_text("{")
    history = opened.history(UUID)
    assert [one.sequence for one in history.points] == [1, 3, 4]
    assert [one.id for one in history.broken] == [chain[1].id]
    assert [one.sequence for one in listing.restorable(opened, history)] == [1, 4]
    with pytest.raises(Refused, match=chain[1].id) as caught:
        listing.require_restorable(opened, listing.Found(history, history.points[1]))
    assert chain[0].id in caught.value.advice
    assert chain[3].id in caught.value.advice


def test_what_cannot_be_read_is_told_unless_it_was_surely_not_asked_for(opened) -> None:
    other = UUID[:-1] + "2"
    for one in (point(1), point(2), point(3, domain="db", domain_uuid=other)):
        path = store(opened, one)
    (path / "manifest.json").write_text("{")
    (Path(opened.point_directory(UUID, point(2).id)) / "manifest.json").write_text("{")

    def told(*domains: str) -> list[str]:
        filters = listing.Filters(domains=domains)
        broken = listing.list_points(opened, filters, manifest.now_utc())[1]
        assert all("cannot be read" in one["problem"] for one in broken)
        return [one["domain_uuid"] for one in broken]

    assert told() == told("web") == told(UUID) == [UUID, other]
    assert told("db") == [other]


def test_the_latest_is_by_sequence_whatever_the_clock_said(opened) -> None:
    store(opened, point(1, created="2030-01-01T00:00:00+00:00"))
    store(opened, point(2))
    assert listing.find_point(opened, source="web").point.sequence == 2
    before = manifest.parse_time("2027-01-01T00:00:00Z")
    assert listing.find_point(opened, source=UUID, before=before).point.sequence == 2
    with pytest.raises(NotFound):
        listing.find_point(opened, source="web", before=manifest.parse_time("2001-01-01T00:00:00Z"))
    with pytest.raises(NotFound, match="nobody"):
        listing.find_point(opened, source="nobody")


def hide(opened: repository.Repository, one: Point) -> None:
    path = Path(opened.point_directory(UUID, one.id))
    (path / repository.MANIFEST).rename(path / repository.GOING)


def test_a_point_that_goes_is_offered_no_more_and_still_carries_newer_ones(opened) -> None:
    for one in (point(1), point(2, point(1).id)):
        store(opened, one)
    hide(opened, point(1))
    history = opened.history(UUID)
    assert [one.id for one in history.points] == [point(2).id]
    assert [one.id for one in history.going] == [point(1).id]
    assert history.broken == ()
    assert [one.id for one in history.lineage(history.points[0], "vda")] == [point(2).id, point(1).id]
    assert history.lagging == {point(2).id}
    assert history.next_sequence == 3
    with pytest.raises(NotFound):
        listing.find_point(opened, identifier=point(1).id)


@pytest.mark.parametrize(
    ("backing", "parent"),
    [
        (f"../{point(2).id}/vda.qcow2", point(2).id),
        (f"../{point(1).id}/vda.qcow2", point(1).id),
        (None, point(2).id),
        ("../../elsewhere/vda.qcow2", point(2).id),
    ],
)
def test_a_half_done_removal_is_read_as_the_headers_say_and_no_further(
    opened, monkeypatch, backing: str | None, parent: str
) -> None:
    """Point 3 stood on 2, which goes, and will stand on 1. A link to anywhere else is left for the checks to find."""
    for one in (point(1), point(2, point(1).id), point(3, point(2).id)):
        store(opened, one)
    hide(opened, point(2))
    header = image_header.Qcow2Header(3, 1 << 20, 1 << 16, backing, "qcow2", None, False, 0, 0, ())
    monkeypatch.setattr(repository, "read_qcow2", lambda _path: header)
    found = opened.history(UUID).points[-1]
    assert found.parents == {parent}
    assert found.parent == parent
    assert found.disks[0].metadata is None


@pytest.mark.parametrize(
    ("links", "parents"),
    [
        ({3: 2, 4: 3}, {3: 2, 4: 3}),
        ({3: 1, 4: 3}, {3: 1, 4: 3}),
        ({3: 1, 4: 1}, {3: 1, 4: 1}),
        ({3: 2, 4: 1}, {3: 2, 4: 1}),
        # Several runs of points that went, merged onto one that stayed then and goes now.
        ({3: None, 4: 3, 5: 3}, {3: None, 4: 3, 5: 3}),
    ],
)
def test_a_point_that_goes_before_its_manifest_was_corrected_is_read_as_it_lies_too(
    opened, monkeypatch, links: dict[int, int | None], parents: dict[int, int | None]
) -> None:
    """A removal was killed between a merge and its description, and the next one takes in what was merged."""
    chain = [point(1), *(point(number, point(number - 1).id) for number in range(2, 6))]
    for one in chain:
        store(opened, one)
    going = {2, 3} if 5 not in links else {1, 2, 3, 4}
    for number in going:
        hide(opened, chain[number - 1])
    links = {2: 1, 5: 4, **links}

    def read(path: str) -> image_header.Qcow2Header:
        below = links.get(int(Path(path).parent.name[13:15]))
        backing = f"../{point(below).id}/vda.qcow2" if below else None
        return image_header.Qcow2Header(3, 1 << 20, 1 << 16, backing, "qcow2", None, False, 0, 0, ())

    monkeypatch.setattr(repository, "read_qcow2", read)
    history = opened.history(UUID)
    for number, below in parents.items():
        found = history.holder(point(number).id)
        assert found is not None
        assert found.parent == (point(below).id if below else None), number
        assert found.type == ("incremental" if below else "full")


def test_points_that_cannot_be_read_are_found_to_stand_on_others(opened, monkeypatch) -> None:
    path = store(opened, point(2))
    (path / repository.MANIFEST).write_text("{")
    header = image_header.Qcow2Header(
        3, 1 << 20, 1 << 16, f"../{point(1).id}/vda.qcow2", "qcow2", None, False, 0, 0, ()
    )
    monkeypatch.setattr(repository, "read_qcow2", lambda _path: header)
    assert opened.grounds(UUID, opened.history(UUID).broken) == {point(1).id: [point(2).id]}


def test_an_interrupted_removal_is_swept_and_new_ones_are_no_points(opened) -> None:
    base = Path(opened.domain_directory(UUID))
    (base / f"{repository.GONE}x").mkdir(parents=True)
    (base / f"{repository.NEW}{point(1).id}").mkdir()
    repository.sweep(opened, UUID)
    assert [path.name for path in base.iterdir()] == [f"{repository.NEW}{point(1).id}"]
    assert opened.history(UUID) == repository.History()


def test_a_gib_for_thirty_days_is_one_gib_month() -> None:
    created = manifest.parse_time("2026-01-01T00:00:00Z")
    assert listing.gib_months(1 << 30, created, manifest.parse_time("2026-01-31T00:00:00Z")) == 1.0
    assert listing.gib_months(1 << 30, created, manifest.parse_time("2025-01-31T00:00:00Z")) == 0.0


class Domain:
    """A defined domain, as far as it is asked who it is."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid

    def UUIDString(self) -> str:
        return self._uuid

    def name(self) -> str:
        return "web"


def test_a_point_of_a_domain_that_was_made_again_is_found_by_the_old_name(opened, monkeypatch) -> None:
    new, other = UUID[:-1] + "2", UUID[:-1] + "3"
    store(opened, point(1))
    store(opened, point(2, domain_uuid=new))
    monkeypatch.setattr(removal, "find_domain", lambda _connection, _domain: Domain(new))
    monkeypatch.setattr(removal, "find_by_uuid", lambda _connection, uuid: Domain(uuid) if uuid == new else None)

    def found(identifier: str | None) -> tuple[str, bool] | None:
        subject = removal.find_subject(None, opened, "web", identifier)
        return (subject.uuid, subject.handle is not None) if subject is not None else None

    assert found(None) == found(point(2).id) == found("20000101T000000Z-0000") == (new, True)
    assert found(point(1).id) == (UUID, False)
    store(opened, point(1, domain_uuid=other))
    with pytest.raises(Conflict, match="UUID"):
        found(point(1).id)


def test_of_several_domains_that_are_gone_the_one_that_has_the_point_is_meant(opened, monkeypatch) -> None:
    def gone(_connection: object, domain: str) -> None:
        raise NotFound(domain)

    other = UUID[:-1] + "2"
    store(opened, point(1))
    store(opened, point(2, domain_uuid=other))
    monkeypatch.setattr(removal, "find_domain", gone)
    monkeypatch.setattr(removal, "find_by_uuid", lambda _connection, _uuid: None)
    for number, uuid in ((1, UUID), (2, other)):
        subject = removal.find_subject(None, opened, "web", point(number).id)
        assert subject is not None
        assert subject.uuid == uuid
    with pytest.raises(Conflict):
        removal.find_subject(None, opened, "web")
