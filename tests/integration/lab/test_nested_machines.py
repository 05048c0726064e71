# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Where nested hypervisors lie, what goes of them, and when one counts as up. None is booted here: tests/nested does that."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from lab import probe
from lab.host import TestHost
from nested import __main__ as commands
from nested import guest, machine


def test_machines_go_with_the_private_host_that_they_are_in(host: TestHost) -> None:
    root = Path(os.environ["VMK_LAB_HOST_ROOT"])
    assert machine._directory("integration").is_relative_to(root)
    # ssh shares a connection only through a socket whose name is short enough.
    made = machine.Machine("integration", machine._directory("integration"), 22, root / "key")
    assert any("ControlPath" in word for word in made.ssh_command("operator"))


def test_what_no_qemu_uses_goes_with_and_without_a_disk_and_what_one_writes_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VMK_LAB_HOST_ROOT", str(tmp_path))
    directories = {name: tmp_path / "machines" / name for name in ("bare", "left", "used", "young")}
    for name, directory in directories.items():
        directory.mkdir(parents=True)
        if name in ("left", "used"):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", directory / "disk.qcow2", "1M"], check=True)
        if name != "young":
            os.utime(directory, (0, 0))
    used = ["qemu-io", "-f", "qcow2", str(directories["used"] / "disk.qcow2")]
    with subprocess.Popen(used, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"length\n")
        writer.stdin.flush()
        writer.stdout.readline()  # it has opened, and locked, the disk
        machine._remove_abandoned()
        assert machine.names() == ["used", "young"]
        writer.stdin.close()


def test_a_login_that_succeeds_is_one_whatever_ssh_says_besides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = subprocess.CompletedProcess(["ssh"], 0, "", "ControlSocket already exists, disabling multiplexing")
    monkeypatch.setattr(machine, "_processes", lambda _directory: [1])
    monkeypatch.setattr(machine.Machine, "ssh", lambda *_words, **_named: said)
    machine._wait_for_login(machine.Machine("talkative", tmp_path, 22, tmp_path / "key"))


@pytest.mark.parametrize(
    ("console", "statuses", "runs"),
    [("Kernel panic - not syncing", [1, 0], 2), ("Kernel panic - not syncing", [1, 1], 2), ("login:", [1, 0], 1)],
)
def test_scenarios_run_once_more_where_a_hypervisors_kernel_panicked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, console: str, statuses: list[int], runs: int
) -> None:
    monkeypatch.setenv("VMK_LAB_HOST_ROOT", str(tmp_path))
    monkeypatch.setattr(probe, "acceleration", lambda: "tcg")
    directories: list[str] = []

    def molecule(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[bytes]:
        assert command[1:] == ["test", "--report", "--all"]
        directories.append(env["MOLECULE_EPHEMERAL_DIRECTORY"])
        (tmp_path / "machines/kvm01").mkdir(parents=True)
        (tmp_path / "machines/kvm01/console.log").write_text(console)
        machine.destroy("kvm01")
        return subprocess.CompletedProcess(command, statuses[len(directories) - 1])

    monkeypatch.setattr(commands.subprocess, "run", molecule)
    assert commands.main(["scenarios", "--", "--all"]) == statuses[runs - 1]
    assert len(directories) == len(set(directories)) == runs


def test_nobody_waits_for_a_guest_of_a_machine_that_has_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.Machine, "ssh", lambda *_words, **_named: pytest.fail("there is nobody to ask"))
    (tmp_path / "console.log").write_text("Kernel panic - not syncing")
    with pytest.raises(machine.MachineError, match=r"(?s)machine dead has ended.*Kernel panic"):
        guest.wait_agent(machine.Machine("dead", tmp_path, 22, tmp_path / "key"), "lab-web")
