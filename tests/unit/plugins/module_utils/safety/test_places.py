# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import places
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.processes import (
    ProcessIdentity,
    holders_of,
    myself,
)


def test_private_directories_are_private_all_the_way(tmp_path):
    made = places.private_directory(str(tmp_path / "a" / "b"))
    assert stat.S_IMODE(os.stat(made).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o700
    places.private_directory(made)


def test_a_link_in_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(Refused):
        places.private_directory(str(tmp_path / "link"))


def test_a_file_is_held_while_somebody_has_it_locked(tmp_path):
    path = tmp_path / "orders"
    assert not places.is_held(str(path))
    path.touch()
    with path.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert places.is_held(str(path))
    assert not places.is_held(str(path))


def test_json_is_replaced_whole_and_private(tmp_path):
    path = str(tmp_path / "x.json")
    places.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        places.write_json(path, {"a": object()})
    assert places.read_json(path) == {"a": 1}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(tmp_path) == ["x.json"]
    assert places.read_json(str(tmp_path / "gone")) is None
    assert places.unlink_quietly(path)
    assert not places.unlink_quietly(path)


def test_root_reaches_everything_and_others_what_the_kernel_lets_them(tmp_path):
    assert places.reachable_by(str(tmp_path), (0, 0))
    if os.geteuid() == 0:
        (tmp_path / "closed").mkdir(mode=0o700)
        (tmp_path / "closed" / "inner").mkdir()
        assert not places.reachable_by(str(tmp_path / "closed" / "inner"), (65534, 65534))
        assert places.reachable_by("/usr/bin", (65534, 65534))


def test_a_process_is_known_by_more_than_its_number(tmp_path):
    me = myself()
    assert me.alive
    assert not ProcessIdentity(me.pid, "0").alive
    path = tmp_path / "open"
    with path.open("w"):
        assert os.getpid() in holders_of(str(path))
    assert holders_of(str(path)) == []
    assert holders_of(str(tmp_path / "gone")) == []


@pytest.mark.parametrize("links", [True, False])
def test_what_is_written_once_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "one.json"
    assert places.write_json_once(str(path), {"a": 1}) == {"a": 1}
    assert places.write_json_once(str(path), {"a": 2}) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize("links", [True, False])
class TestANewName:
    @pytest.fixture(autouse=True)
    def filesystem(self, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        if not links:
            monkeypatch.setattr(os, "link", refuse)

    def test_is_given_once_and_replaces_nothing(self, tmp_path: Path) -> None:
        part, path = tmp_path / "x.part", tmp_path / "x"
        part.write_text("ours")
        path.write_text("somebody's")
        with pytest.raises(FileExistsError):
            places.rename_new(str(part), str(path))
        places.undo_rename_new(str(part), str(path))
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
        assert path.read_text() == "somebody's"
        path.unlink()
        part.write_text("ours")
        places.rename_new(str(part), str(path))
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
        assert path.read_text() == "ours"

    def test_can_be_interrupted_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        part, path = tmp_path / "x.part", tmp_path / "x"

        def interrupted() -> None:
            part.write_text("ours")
            with monkeypatch.context() as patch:
                patch.setattr(os, "unlink", self._die)
                patch.setattr(os, "rename", self._die)
                with pytest.raises(KeyboardInterrupt):
                    places.rename_new(str(part), str(path))
            assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x", "x.part"]

        interrupted()
        places.rename_new(str(part), str(path))
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
        assert path.read_text() == "ours"
        path.unlink()
        interrupted()
        places.undo_rename_new(str(part), str(path))
        assert list(tmp_path.iterdir()) == []

    @staticmethod
    def _die(*_: object) -> None:
        raise KeyboardInterrupt
