# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What an interrupted run left is finished or undone where it is, and left alone where it cannot be seen."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import repository, settle
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import Repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.journal import Journal

UUID = "8b2f4a3e-0000-4000-8000-000000000001"
ID = "20261120T201501Z-7f3a"


class Interrupted:
    """A backup that was killed when its point was complete, and the checkpoints that settling it drops."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.where = path / "repository"
        self.where.mkdir()
        self.repository: Repository = repository.open_repository(str(self.where), create=True)
        self.made = Path(self.repository.new_directory(UUID, ID))
        self.made.mkdir(parents=True)
        self.published = Path(self.repository.point_directory(UUID, ID))
        self.journals = path / "journal"
        part = {"id": ID, "checkpoint": "vmk-new", "retire": ["vmk-old"], "scratch": None}
        plan = {
            "repository": str(self.where),
            "repository_uuid": self.repository.uuid,
            "secret": None,
            "domains": {UUID: part},
        }
        self.journal = Journal.begin(settle.BACKUP, [(UUID, "web")], plan, directory=str(self.journals))
        self.dropped: list[str] = []
        monkeypatch.setattr(settle, "open_connection", lambda uri: None)
        monkeypatch.setattr(settle, "find_by_uuid", lambda connection, uuid: uuid)
        monkeypatch.setattr(settle.backup_job, "abort", lambda handle, directory: None)
        monkeypatch.setattr(settle.block_jobs, "resume_starved", lambda handle: None)
        monkeypatch.setattr(settle.checkpoints, "remove", lambda handle, names: self.dropped.extend(names))

    def settle(self) -> dict[str, Any]:
        return settle.settle_backup("", self.journal)

    def pending(self) -> bool:
        return any(self.journals.iterdir())


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch) -> Interrupted:
    return Interrupted(tmp_path, monkeypatch)


@pytest.mark.parametrize("step", ["publish", "copy"])
@pytest.mark.parametrize("there", ["an empty mount point", "another repository", "nothing"])
def test_where_the_repository_is_not_mounted_the_journal_waits(interrupted: Interrupted, step: str, there: str) -> None:
    interrupted.journal.step(step)
    away = interrupted.where.rename(interrupted.where.with_name("away"))
    if there != "nothing":
        interrupted.where.mkdir()
    if there == "another repository":
        repository.open_repository(str(interrupted.where), create=True)
    with pytest.raises(Refused, match="Mount it"):
        interrupted.settle()
    assert interrupted.pending()
    assert "vmk-old" not in interrupted.dropped
    for path in interrupted.where.iterdir() if there != "nothing" else ():
        path.unlink()
    away.replace(interrupted.where)
    assert interrupted.settle()["action"] == ("finished" if step == "publish" else "undone")
    assert interrupted.published.is_dir() == (step == "publish")
    assert not interrupted.made.exists()
    assert not interrupted.pending()
    assert ("vmk-old" in interrupted.dropped) == (step == "publish")


def test_a_complete_point_that_is_nowhere_is_not_taken_for_published(interrupted: Interrupted) -> None:
    interrupted.journal.step("publish")
    interrupted.made.rmdir()
    with pytest.raises(Refused, match="neither"):
        interrupted.settle()
    assert interrupted.dropped == []
    assert interrupted.pending()


def test_a_published_point_may_go_before_its_journal_does(interrupted: Interrupted) -> None:
    interrupted.journal.step("publish")
    interrupted.made.rmdir()
    interrupted.journal.step("retire")
    assert interrupted.settle()["action"] == "finished"
    assert interrupted.dropped == ["vmk-old"]


def test_disks_are_not_put_back_under_a_guest_that_was_started_meanwhile(tmp_path: Path, monkeypatch) -> None:
    path, aside = tmp_path / "vda.qcow2", tmp_path / "vda.qcow2.before-1"
    path.write_text("restored")
    aside.write_text("before")
    piece = {"path": str(path), "part": f"{path}.part", "aside": str(aside), "secret": None}
    plan = {"uuid": UUID, "name": "web", "point": ID, "attach": {}, "pieces": [piece]}
    pending = Journal.begin(settle.RESTORE, [(UUID, "web")], plan, directory=str(tmp_path / "journal"))
    pending.step("place")
    pending.step("take-back")
    active = [True]
    guest = SimpleNamespace(isActive=lambda: active[0])
    monkeypatch.setattr(settle, "open_connection", lambda uri: None)
    monkeypatch.setattr(settle, "find_by_uuid", lambda connection, uuid: guest)
    monkeypatch.setattr(settle, "_paths", lambda handle, inactive: {str(path)})
    with pytest.raises(Refused, match="Shut it down"):
        settle.settle_restore("", pending)
    assert (path.read_text(), aside.read_text()) == ("restored", "before")
    active[0] = False
    assert settle.settle_restore("", pending)["action"] == "undone"
    assert path.read_text() == "before"
    assert not aside.exists()


class Replacing:
    """An in-place restore of one disk of a stopped domain of the test driver, whose definition records a chain."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        libvirt = pytest.importorskip("libvirt")
        libvirt.registerErrorHandler(lambda *_: None, None)
        self.connection = libvirt.open("test:///default")
        monkeypatch.setattr(settle, "open_connection", lambda uri: self.connection)
        self.image, self.part = path / "vda.qcow2", path / "vda.qcow2.part"
        self.aside = path / "vda.qcow2.before"
        self.image.write_bytes(b"old")
        self.part.write_bytes(b"new")
        self.base = path / "base.qcow2"
        chain = f"<backingStore type='file'><format type='qcow2'/><source file='{self.base}'/></backingStore>"
        source = f"<driver type='qcow2'/><source file='{self.image}'/>{chain}<target dev='vda'/>"
        self.domain = self.connection.defineXML(
            f"<domain type='test'><name>web</name><uuid>{UUID}</uuid><memory>8192</memory><os><type>hvm</type></os>"
            f"<devices><disk type='file'>{source}</disk></devices></domain>"
        )
        piece = {"target": "vda", "path": str(self.image), "part": str(self.part), "aside": str(self.aside)}
        plan = {
            "point": ID,
            "name": "web",
            "uuid": UUID,
            "in_place": True,
            "attach": {},
            "xml": None,
            "running": False,
            "pieces": [{**piece, "secret": None}],
        }
        self.journals = path / "journal"
        self.journal = Journal.begin(settle.RESTORE, [(UUID, "web")], plan, directory=str(self.journals))
        self.journal.step("place")

    def recorded(self) -> bool:
        return str(self.base) in self.domain.XMLDesc()


@pytest.fixture
def replacing(tmp_path: Path, monkeypatch):
    made = Replacing(tmp_path, monkeypatch)
    yield made
    made.domain.undefine()
    made.connection.close()


def test_the_recorded_chain_is_gone_before_the_image_that_stands_on_nothing_is_there(
    replacing: Replacing, monkeypatch
) -> None:
    place, seen = settle.place, []

    def watched(piece) -> None:
        seen.append(replacing.recorded())
        place(piece)

    monkeypatch.setattr(settle, "place", watched)
    assert settle.finish_restore("", replacing.journal) == []
    assert seen == [False]
    assert not replacing.recorded()
    assert replacing.image.read_bytes() == b"new"
    assert not replacing.aside.exists()


def test_a_restore_that_is_taken_back_records_the_chain_again_also_after_a_kill(
    replacing: Replacing, monkeypatch
) -> None:
    def killed(piece) -> None:
        raise KeyboardInterrupt

    def refused(piece) -> None:
        raise Refused("no")

    monkeypatch.setattr(settle, "place", killed)
    with pytest.raises(KeyboardInterrupt):
        settle.finish_restore("", replacing.journal)
    assert not replacing.recorded()
    monkeypatch.setattr(settle, "place", refused)
    with pytest.raises(Refused):
        settle.finish_restore("", replacing.journal)
    assert replacing.recorded()
    assert replacing.image.read_bytes() == b"old"
    assert not any(replacing.journals.iterdir())


def test_an_image_from_before_that_somebody_has_opened_meanwhile_is_kept_and_said(replacing: Replacing) -> None:
    with replacing.image.open("rb"):
        (kept,) = settle.finish_restore("", replacing.journal)
    assert f"{replacing.aside}, which was {replacing.image} before, is kept" in kept
    assert f"process {os.getpid()}" in kept
    assert replacing.aside.read_bytes() == b"old"
    assert replacing.image.read_bytes() == b"new"
    assert not any(replacing.journals.iterdir())
