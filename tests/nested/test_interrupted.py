# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A run that is ended while a nested hypervisor boots leaves neither that nor its files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab import kernel
from lab.waiting import until

TESTS = Path(__file__).resolve().parents[1]


def emulators(root: Path) -> list[str]:
    """The command lines of the machines that lie below a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if "qemu-system" in line and str(root) in line:
            found.append(line)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_machine(tmp_path: Path, number: signal.Signals) -> None:
    tmp_path.chmod(0o711)
    command = [sys.executable, str(TESTS / "lab/enter"), "--no-libvirtd", "--", sys.executable, "-m", "nested"]
    environment = {**os.environ, "VMK_LAB_ROOT": str(tmp_path), "PYTHONPATH": str(TESTS)}
    with subprocess.Popen([*command, "up", "one", "two"], env=environment) as run:
        try:
            until(lambda: len(emulators(tmp_path)) == 2 or run.poll() is not None, "both machines' emulators", 120)
            assert run.poll() is None
            run.send_signal(number)
            assert run.wait(60) != 0
            until(lambda: not emulators(tmp_path), "the emulators ending", 60)
            until(lambda: not list(tmp_path.iterdir()), "the directory of the host going", 60)
        finally:
            run.kill()
    assert not kernel.loop_devices_backed_below(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text(encoding="utf-8")
