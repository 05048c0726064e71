# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A run that is ended while a nested hypervisor boots leaves neither that nor its files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import kernel
from lab.waiting import until

TESTS = Path(__file__).resolve().parents[1]


def emulated(root: Path) -> set[str]:
    """The machines below a directory that a QEMU process runs."""
    found = set()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        name = re.search(r" -name vmkeeper-nested-(\w+) ", line)
        if name is not None and str(root) in line:
            found.add(name[1])
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_machine(tmp_path: Path, number: signal.Signals) -> None:
    tmp_path.chmod(0o711)
    command = [sys.executable, str(TESTS / "lab/enter"), "--no-libvirtd", "--", sys.executable, "-m", "nested"]
    environment = {**os.environ, "VMK_LAB_ROOT": str(tmp_path), "PYTHONPATH": str(TESTS)}
    with subprocess.Popen([*command, "up", "one", "two"], env=environment) as run:
        try:
            until(lambda: emulated(tmp_path) == {"one", "two"} or run.poll() is not None, "both machines", 600)
            time.sleep(5)  # into their boot
            assert run.poll() is None
            run.send_signal(number)
            assert run.wait(60) != 0
            until(lambda: not emulated(tmp_path), "the machines ending", 60)
            until(lambda: not list(tmp_path.iterdir()), "the directory of the host going", 60)
        finally:
            run.kill()
    assert not kernel.loop_devices_backed_below(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text(encoding="utf-8")
