# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""One nested hypervisor: a QEMU process with an overlay over the image and an ssh port on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

from lab import probe
from lab.waiting import until

from .image import Image, Recipe, built_image, cache_directory, ssh_key

MEMORY_MIB = 3072
VCPUS = 2
BOOT_SECONDS = 1200.0
"""How long a boot may take: 20 seconds on two idle cores without KVM, many times that where they are shared."""

_PANIC = "Kernel panic"
_LONGEST_SOCKET = 80  # of 107 characters that the kernel takes, ssh appends some of its own
_ABANDONED_SECONDS = 300.0  # a machine that is being made has no QEMU yet

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")  # it becomes a host name and a directory


class MachineError(RuntimeError):
    """A machine did not start or does not do what it was told; the message says what was seen."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A nested hypervisor that can be logged in to. All it has on this computer is below ``directory``."""

    name: str
    directory: Path
    port: int
    private_key: Path

    @property
    def known_hosts(self) -> Path:
        """A known_hosts file with this machine's key."""
        return self.directory / "known_hosts"

    @property
    def ssh_options(self) -> dict[str, str]:
        """Options for ``ssh -o``: the key of the cache, and no other machine than this is accepted."""
        return {
            "IdentityFile": str(self.private_key),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "60",
        }

    def ssh_command(self, user: str = "root") -> list[str]:
        """The ``ssh`` command line that logs in as ``root``, ``operator`` (sudo) or ``observer`` (libvirt group).

        Commands that follow one another share a connection: an emulated CPU needs seconds for each login.
        """
        shared = {}
        socket_path = self.directory / f"ssh-{user}"
        if len(str(socket_path)) <= _LONGEST_SOCKET:
            shared = {"ControlMaster": "auto", "ControlPersist": "60", "ControlPath": str(socket_path)}
        options = [word for name, value in (self.ssh_options | shared).items() for word in ("-o", f"{name}={value}")]
        return ["ssh", *options, "-p", str(self.port), f"{user}@127.0.0.1"]

    def ssh(self, command: str, user: str = "root", timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
        """Run a shell command line in the machine; its outcome, whatever that is."""
        return subprocess.run(
            [*self.ssh_command(user), command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run(self, command: str, user: str = "root", timeout: float = 600.0) -> str:
        """Run a shell command line in the machine; its stdout. Raises MachineError when it fails."""
        result = self.ssh(command, user, timeout)
        if result.returncode != 0:
            raise MachineError(
                f"{self.name}: `{command}` ended with {result.returncode}: {result.stderr.strip() or result.stdout.strip()}"
            )
        return result.stdout

    def require_running(self) -> None:
        """Raise MachineError, with what its console said last, once its QEMU process has ended: it will not answer any more."""
        if not _processes(self.directory):
            raise MachineError(f"machine {self.name} has ended\n{_console(self.directory)}")

    def put(self, source: Path, destination: str) -> None:
        """Copy a file of this computer into the machine; the directory is made, holes stay holes."""
        directory, name = os.path.split(destination)
        receive = f"mkdir -p {directory} && tar -xSf - -C {directory}"
        pack = ["tar", "-cSf", "-", "--owner=0", "--group=0", f"--transform=s,.*,{name},", "-C", str(source.parent)]
        with subprocess.Popen([*pack, source.name], stdout=subprocess.PIPE) as sender:
            received = subprocess.run([*self.ssh_command(), receive], stdin=sender.stdout, check=False)
        if sender.returncode or received.returncode:
            raise MachineError(f"{self.name}: could not copy {source} to {destination}")


def start(name: str, recipe: Recipe | None = None, *, kvm_inside: bool = True) -> Machine:
    """Start a new machine and wait until it can be logged in to.

    ``kvm_inside``: its CPU can virtualize, so that its guests have KVM. Debian 13's kernel was seen not to survive them
    on the virtualization that QEMU 7.2 emulates: it panicked after minutes ("corrupted stack end detected inside scheduler").
    What an interrupted run left of a machine of this name is destroyed first, and so are the disks of other such runs.
    Raises MachineError (or BuildError of the image), and then nothing of the machine is left.
    """
    if not _NAME.fullmatch(name):
        raise MachineError(f"{name!r} cannot be a machine's name: lower-case letters, digits and hyphens only")
    image = built_image(recipe)
    destroy(name)
    _remove_abandoned()
    directory = _directory(name)
    directory.mkdir(parents=True)
    machine = Machine(name, directory, _free_port(), ssh_key())
    try:
        _launch(machine, image, kvm_inside)
        _wait_for_login(machine)
    except BaseException:
        destroy(name)
        raise
    return machine


def running(name: str) -> Machine:
    """The machine of that name, which runs already. Raises MachineError."""
    directory = _directory(name)
    if not _processes(directory):
        raise MachineError(f"there is no machine {name} running; those that are: {', '.join(names()) or 'none'}")
    port = int((directory / "port").read_text())
    return Machine(name, directory, port, ssh_key())


def names() -> list[str]:
    """The names of all machines of this test host, or of this cache, also of what an interrupted run left."""
    return sorted(path.name for path in _machines().glob("*"))


def destroy(name: str) -> None:
    """End the machine and remove all it had. Nothing happens when there is none."""
    directory = _directory(name)
    for pid in _processes(directory):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not _processes(directory), f"the end of machine {name}", timeout=120)
    if _PANIC in _console(directory):
        with _panics().open("a", encoding="utf-8") as notes:
            notes.write(f"{name}: {_console(directory)}\n")
    shutil.rmtree(directory, ignore_errors=True)


def take_panics() -> str:
    """The last words of machines that were destroyed after their kernels had panicked, if any; they are told once."""
    try:
        return _panics().read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    finally:
        _panics().unlink(missing_ok=True)


def _remove_abandoned() -> None:
    """Remove what is left of machines whose QEMU is gone or never began; it may have run in another process namespace.

    QEMU holds a lock on the disk that it writes, which qemu-img respects.
    """
    for directory in _machines().glob("*"):
        try:
            young = time.time() - directory.stat().st_mtime < _ABANDONED_SECONDS
        except FileNotFoundError:
            continue  # its own run has just removed it
        if not young and not _in_use(_disk(directory)):
            shutil.rmtree(directory, ignore_errors=True)


def _in_use(disk: Path) -> bool:
    look = ["qemu-img", "info", "--output=json", str(disk)]
    return disk.exists() and subprocess.run(look, capture_output=True, check=False).returncode != 0


def _machines() -> Path:
    """Where machines are: below the root of the private test host, which goes with it however it ends; without one, in the cache."""
    host = os.environ.get("VMK_LAB_HOST_ROOT")
    return (Path(host) if host else cache_directory()) / "machines"


def _panics() -> Path:
    return _machines().parent / "panics"


def _directory(name: str) -> Path:
    return _machines() / name


def _disk(directory: Path) -> Path:
    return directory / "disk.qcow2"


def _processes(directory: Path) -> list[int]:
    """The machine's QEMU processes, known by the disk that they name: a process that wrote no pidfile counts too."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if words[0].endswith(b"qemu-system-x86_64") and any(os.fsencode(_disk(directory)) in word for word in words):
            found.append(int(entry.name))
    return found


def _free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return int(probe_socket.getsockname()[1])


def _launch(machine: Machine, image: Image, kvm_inside: bool) -> None:
    directory, disk = machine.directory, _disk(machine.directory)
    kvm = probe.acceleration() == "kvm"
    if kvm:
        cpu = "host" if kvm_inside else "host,svm=off,vmx=off"
    else:
        # On the "max" that QEMU 7.2 emulates, Debian 13's systemd reads garbage and mounts nothing.
        cpu = "max" if kvm_inside else "Nehalem"
    (directory / "port").write_text(f"{machine.port}\n")
    machine.known_hosts.write_text(f"[127.0.0.1]:{machine.port} {image.host_key}\n")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image.disk), str(disk)], check=True
    )
    # panic: the process ends (-no-reboot), and nobody waits for a kernel that is dead.
    kernel_words = "root=/dev/vda rootfstype=ext4 rw console=ttyS0 quiet net.ifnames=0 mitigations=off panic=-1"
    command = [
        *("qemu-system-x86_64", "-name", f"vmkeeper-nested-{machine.name}", "-uuid", str(uuid.uuid4())),
        # Without KVM here, QEMU emulates a CPU with SVM: what runs inside has KVM all the same.
        *("-machine", "q35", "-accel", "kvm" if kvm else "tcg", "-cpu", cpu),
        *("-m", str(MEMORY_MIB), "-smp", str(VCPUS), "-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", f"{kernel_words} systemd.hostname={machine.name}"),
        # The disk lives no longer than this process: flushing it to the real disk would be for nothing.
        *("-drive", f"if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap,file={disk}"),
        *("-device", "virtio-blk-pci,drive=disk"),
        # restrict: the machine reaches nothing, it is only reached.
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{machine.port}-:22"),
        *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
        *("-device", "virtio-balloon-pci,free-page-reporting=on"),
        *("-chardev", f"file,id=console,path={directory / 'console.log'}", "-serial", "chardev:console"),
        "-daemonize",
    ]
    launched = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if launched.returncode != 0:
        raise MachineError(f"QEMU did not start machine {machine.name}: {launched.stderr.strip()}")


def _wait_for_login(machine: Machine) -> None:
    problem = ""

    def settled() -> bool:
        nonlocal problem
        if not _processes(machine.directory):
            problem = "its QEMU process ended"
            return True
        try:
            answer = machine.ssh("true", timeout=120)
        except subprocess.TimeoutExpired:
            problem = "ssh is connected but gets no answer"
            return False
        welcome = answer.returncode == 0
        problem = "" if welcome else answer.stderr.strip()  # ssh also says there what is no failure
        return welcome

    try:
        until(settled, f"login to machine {machine.name}", timeout=BOOT_SECONDS, interval=1)
    except TimeoutError as error:
        raise MachineError(f"{error}: {problem}\n{_console(machine.directory)}") from error
    if problem:
        raise MachineError(f"machine {machine.name} did not come up: {problem}\n{_console(machine.directory)}")


def _console(directory: Path) -> str:
    log = directory / "console.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "Its console said last:\n" + "\n".join(lines[-30:])
