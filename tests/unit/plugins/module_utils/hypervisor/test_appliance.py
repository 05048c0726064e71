# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import appliance
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.appliance import Appliance, ApplianceFailed

#: Stands in for guestfish: says back what it was told, and fails as guestfish does.
ECHO = """#!/bin/sh
while read -r line; do
    case "$line" in
    echo) echo ;;
    "echo "*) echo "${line#echo }" ;;
    "cat "*) printf 'two\\nlines\\n\\n' ;;
    -fails*) echo "*stdin*:1: libguestfs: error: $line" >&2 ;;
    fails*) echo "*stdin*:1: libguestfs: error: no such thing" >&2; exit 1 ;;
    add-drive*|launch*|config*|shutdown*|umount-all*) ;;
    *) printf '%s\\n' "$line" ;;
    esac
done
"""


@pytest.fixture
def guestfish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "guestfish"
    program.write_text(ECHO)
    program.chmod(0o755)
    monkeypatch.setattr(appliance, "_PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


def test_what_is_unusual_in_a_word_is_escaped() -> None:
    assert appliance.quote("/var/log/x") == '"/var/log/x"'
    assert appliance.quote('a"b\\c\nd $(e)') == '"a\\x22b\\x5cc\\x0ad\\x20\\x24\\x28e\\x29"'
    assert appliance.quote("/\udcff") == '"/\\xff"'


def test_without_guestfish_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(appliance, "_PATH", str(tmp_path))
    with pytest.raises(Unsupported, match=r"Sealing an image needs libguestfs.*guestfish") as raised:
        appliance.require("Sealing an image")
    assert raised.value.facts["package"] == "guestfish"
    with pytest.raises(Unsupported), Appliance([], doing="Looking", scratch=str(tmp_path)):
        pytest.fail("it began")


def test_answers_belong_to_their_commands(guestfish: Path, tmp_path: Path) -> None:
    with Appliance([("/x", "raw")], doing="Looking", scratch=str(tmp_path)) as session:
        assert session.do("find", "/a") == ['find "/a"']
        assert session.read("/file") == b"two\nlines\n"
        assert session.do("launch") == []
        assert session.attempt("launch")
        assert not session.attempt("fails", "x")
        session.try_all([("fails", str(number)) for number in range(250)])
    assert [path.name for path in tmp_path.iterdir()] == ["guestfish"]


def test_a_failure_says_what_libguestfs_said(guestfish: Path, tmp_path: Path) -> None:
    told = "Looking: libguestfs could not do it: no such thing"
    session = Appliance([("/x", "raw")], doing="Looking", scratch=str(tmp_path))
    with pytest.raises(ApplianceFailed, match=told), session:
        session.do("fails")
    assert [path.name for path in tmp_path.iterdir()] == ["guestfish"]


def test_one_that_hangs_is_given_up(guestfish: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guestfish.write_text("#!/bin/sh\ncat >/dev/null\n")
    monkeypatch.setattr(appliance, "LAUNCH_SECONDS", 0.1)
    with (
        pytest.raises(ApplianceFailed, match="did not answer within 0 s"),
        Appliance([], doing="Looking", scratch=str(tmp_path)),
    ):
        pytest.fail("it began")


def test_what_a_killed_run_left_goes_and_what_is_in_use_stays(guestfish: Path, tmp_path: Path) -> None:
    killed, foreign = tmp_path / "vmkeeper-appliance-killed", tmp_path / "somebodys"
    for directory in (killed, foreign):
        directory.mkdir()
        (directory / "overlay1.qcow2").touch()
    (tmp_path / "vmkeeper-appliance-link").symlink_to(foreign)
    (tmp_path / "vmkeeper-appliance-file").touch()
    with Appliance([("/x", "raw")], doing="Looking", scratch=str(tmp_path)):
        assert not killed.exists()
        used = set(tmp_path.glob("vmkeeper-appliance-????????"))
        assert len(used) == 1
        appliance.sweep(str(tmp_path))
        assert all(one.is_dir() for one in used)
    assert not any(one.exists() for one in used)
    assert (foreign / "overlay1.qcow2").exists()
    assert (tmp_path / "vmkeeper-appliance-file").exists()
    appliance.sweep(str(tmp_path / "none"))


def test_guestfish_ends_in_the_middle_of_its_work_when_its_process_is_killed(guestfish: Path, tmp_path: Path) -> None:
    works = tmp_path / "works"
    guestfish.write_text(ECHO.replace("    fails*)", f"    resize*) echo $$ >{works}; exec sleep 600 ;;\n    fails*)"))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), Appliance([], doing="Looking", scratch=str(tmp_path)) as session:
            session.do("resize2fs", "/dev/sda")
        os._exit(0)
    _until(lambda: works.exists() and works.read_text().strip() != "")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _until(lambda: not Path("/proc", works.read_text().strip(), "exe").exists())
    assert list(tmp_path.glob("vmkeeper-appliance-*"))
    appliance.sweep(str(tmp_path))
    assert not list(tmp_path.glob("vmkeeper-appliance-*"))


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)
