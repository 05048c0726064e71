# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""One nested hypervisor: a QEMU process with an overlay of the image and an ssh port on 127.0.0.1."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .accelerator import accelerator
from .image import Image, Recipe, image, ssh_key

MEMORY_MIB = 3072
VCPUS = 2
BOOT_SECONDS = 900
"""How long a boot may take. On two shared cores with an emulated CPU it takes one to two minutes."""


class MachineError(Exception):
    """A nested hypervisor did not start, with what its console said last."""


@dataclass(frozen=True)
class Machine:
    """A running nested hypervisor. Everything it has on this computer is below `directory`."""

    name: str
    directory: Path
    port: int
    private_key: Path
    accelerator: str

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    def ssh_options(self) -> list[str]:
        """Return the ``ssh`` options that make it log in with the key of the cache and accept this machine only."""
        settings = {
            "IdentityFile": self.private_key,
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.known_hosts,
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "20",
        }
        return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]

    def ssh(self, *command: str, user: str = "root", timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run one shell command line in the machine and return its outcome, whatever that is."""
        return subprocess.run(
            ["ssh", *self.ssh_options(), "-p", str(self.port), f"{user}@127.0.0.1", *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


def start(name: str, cache: Path, recipe: Recipe | None = None) -> Machine:
    """Start a new machine called `name` and wait until it can be logged in to.

    What an interrupted run left of a machine of this name is destroyed first.

    Raises:
        MachineError: it did not come up; nothing of it is left.
    """
    built = image(recipe or Recipe(), cache)
    destroy(name, cache)
    directory = _directory(name, cache)
    directory.mkdir(parents=True)
    machine = Machine(name, directory, _free_port(), ssh_key(cache), accelerator(built.kernel, cache))
    try:
        _launch(machine, built)
        _wait_for_ssh(machine)
    except BaseException:
        destroy(name, cache)
        raise
    return machine


def destroy(name: str, cache: Path) -> None:
    """End the machine called `name` and remove all it had; nothing happens when there is none."""
    directory = _directory(name, cache)
    pid = _running_pid(directory)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while _running_pid(directory) is not None:
            if time.monotonic() > deadline:
                raise MachineError(f"QEMU process {pid} of machine {name} does not end")
            time.sleep(0.1)
    shutil.rmtree(directory, ignore_errors=True)


def _directory(name: str, cache: Path) -> Path:
    return cache / "machines" / name


def _running_pid(directory: Path) -> int | None:
    """Return the machine's QEMU process, or None. A process is recognised by its disk, never by its number alone."""
    try:
        pid = int((directory / "pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(directory / "disk.qcow2") in command else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launch(machine: Machine, built: Image) -> None:
    directory = machine.directory
    disk = directory / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(built.disk), str(disk)], check=True
    )
    machine.known_hosts.write_text(f"[127.0.0.1]:{machine.port} {built.host_key}")
    append = (
        "root=/dev/vda rootfstype=ext4 rw console=ttyS0 net.ifnames=0 mitigations=off quiet "
        f"systemd.hostname={machine.name}"
    )
    subprocess.run(
        [
            "qemu-system-x86_64", "-name", f"vmk-nested-{machine.name}", "-uuid", str(uuid.uuid4()),
            "-machine", "q35", "-accel", "kvm" if machine.accelerator == "kvm" else "tcg,thread=multi",
            "-cpu", "host" if machine.accelerator == "kvm" else "max",
            "-m", str(MEMORY_MIB), "-smp", str(VCPUS),
            "-nodefaults", "-display", "none", "-no-reboot",
            "-kernel", str(built.kernel), "-initrd", str(built.initrd), "-append", append,
            # The disk lives no longer than the QEMU process: flushing it to this computer's disk would be for nothing.
            "-drive", f"if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap,file={disk}",
            "-device", "virtio-blk-pci,drive=disk",
            "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{machine.port}-:22",
            "-device", "virtio-net-pci,netdev=net",
            "-device", "virtio-rng-pci",
            "-device", "virtio-balloon-pci,free-page-reporting=on",
            "-chardev", f"file,id=console,path={directory / 'console.log'}", "-serial", "chardev:console",
            "-pidfile", str(directory / "pid"), "-daemonize",
        ],
        stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def _wait_for_ssh(machine: Machine) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        try:
            answer = machine.ssh("true", timeout=60)
            if answer.returncode == 0:
                return
            problem = answer.stderr.strip()
        except subprocess.TimeoutExpired:
            problem = "ssh connects, but gets no answer"
        alive = _running_pid(machine.directory) is not None
        if not alive or time.monotonic() > deadline:
            console = (machine.directory / "console.log").read_text(errors="replace").splitlines()[-30:]
            state = f"cannot be reached after {BOOT_SECONDS} s ({problem})" if alive else "ended during its boot"
            raise MachineError(f"machine {machine.name} {state}; its console said:\n" + "\n".join(console))
        time.sleep(1)
