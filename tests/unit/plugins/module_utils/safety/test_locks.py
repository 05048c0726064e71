# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Busy, Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import locks

_HOLD = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, b'{"pid": 4711, "operation": "backup", "since": 1}')
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    directory = tmp_path / "locks"
    directory.mkdir(mode=0o700)
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(directory / "u1")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    yield str(directory), process
    process.kill()
    process.communicate()


def test_a_second_run_waits_and_then_names_the_holder(held):
    directory, _process = held
    waiting = locks.hold([("u1", "web")], "snapshot", patience=0.3, directory=directory)
    with pytest.raises(Busy, match=r"'web' is in use by another run: backup \(process 4711\)") as error:
        waiting.__enter__()
    assert error.value.facts["holder"]["pid"] == 4711
    found = locks.holder("u1", directory=directory)
    assert found is not None
    assert found["operation"] == "backup"


def test_a_dead_holder_holds_nothing(held):
    directory, process = held
    process.kill()
    process.wait()
    with locks.hold([("u1", "web")], "snapshot", patience=5, directory=directory):
        holder = locks.holder("u1", directory=directory)
        assert holder is not None
        assert holder["operation"] == "snapshot"
    assert locks.holder("u1", directory=directory) is None


def test_other_domains_are_not_in_the_way(held):
    directory, _process = held
    with locks.hold([("u2", "db"), ("u2", "db")], "snapshot", patience=0.3, directory=directory):
        pass


def test_nothing_is_held_after_a_group_that_could_not_be_locked_whole(held):
    directory, _process = held
    with pytest.raises(Busy), locks.hold([("u0", "a"), ("u1", "web")], "snapshot", patience=0.2, directory=directory):
        pass
    assert locks.holder("u0", directory=directory) is None


def test_a_domain_that_was_never_locked_has_no_holder(tmp_path):
    assert locks.holder("nobody", directory=str(tmp_path)) is None


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    directory = tmp_path / "locks"
    directory.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (directory / "u1").symlink_to(victim)
    with pytest.raises(OSError), locks.hold([("u1", "web")], "x", patience=0, directory=str(directory)):
        pass
    assert victim.read_text() == "precious"


def test_somebody_elses_lock_directory_is_refused(tmp_path):
    (tmp_path / "locks").write_text("a file")
    with pytest.raises(Refused), locks.hold([("u1", "web")], "x", patience=0, directory=str(tmp_path / "locks")):
        pass


def test_what_the_holder_wrote_may_be_garbage(tmp_path):
    (tmp_path / "u1").write_text("{half")
    assert locks._read(str(tmp_path / "u1")) == {}
    (tmp_path / "u1").write_text(json.dumps([1]))
    assert locks._read(str(tmp_path / "u1")) == {}
