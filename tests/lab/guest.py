# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""One lab guest: from its spec to its removal."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import libvirt_qemu

from . import assets, images, kernel, probe
from .channel import ChannelError, ExecResult, LabChannel
from .evidence import WriterLog, parse_writer_log
from .host import TestHost
from .spec import AGENT_PORT, LAB_PORT, PREFIX, Boot, DiskSpec, GuestSpec, agent_word, command_line, domain_xml
from .waiting import PATIENCE, until

__all__ = ["Boot", "DiskSpec", "ExecResult", "Gap", "Gaps", "Guest", "GuestSpec"]

IMAGES = Path("/var/lib/libvirt/images/lab")
BOOT = Path("/var/lib/libvirt/boot")
LOGS = Path("/var/log/libvirt/qemu")


@dataclasses.dataclass(frozen=True)
class Gap:
    """A time without a completed write: ``ns`` long, ended by record ``count`` at ``tick``."""

    ns: int
    count: int
    tick: int


@dataclasses.dataclass(frozen=True)
class Gaps:
    """What a writer keeps in memory: its last completed record and its largest gaps since it started."""

    count: int
    tick: int
    monotonic_ns: int
    largest: tuple[Gap, ...]

    @property
    def longest_ms(self) -> float:
        """The longest gap in milliseconds, 0 when there is none."""
        return self.largest[0].ns / 1e6 if self.largest else 0.0


class Guest:
    """A guest of the private host. ``define()`` before anything else, ``cleanup()`` at the end, always."""

    def __init__(self, host: TestHost, spec: GuestSpec) -> None:
        self.host = host
        self.spec = spec
        self.name = PREFIX + spec.name
        self.directory = IMAGES / spec.name
        self.serial_log = LOGS / f"{self.name}-serial.log"
        self.images: dict[str, Path] = {}
        """Disk target -> the image file made for it (of a block disk: the file behind its loop device)."""
        self._loops: dict[str, str] = {}
        self._pools: list[str] = []
        self._connection: libvirt.virConnect | None = None

    # --- libvirt -----------------------------------------------------------------------------------

    def connection(self) -> libvirt.virConnect:
        """This guest's own connection, opened again after libvirtd has been away."""
        if self._connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                if self._connection.isAlive():
                    self._connection.getLibVersion()  # a socket can look alive after its daemon has gone
                    return self._connection
        self._connection = self.host.connect()
        return self._connection

    def domain(self) -> libvirt.virDomain:
        """The libvirt domain, looked up afresh."""
        return self.connection().lookupByName(self.name)

    def define(self) -> Guest:
        """Make disks and define the domain (shut off)."""
        self.directory.mkdir(parents=True)
        self.directory.chmod(0o711)
        kernel_path, initramfs = self._boot_files()
        files = images.BootFiles(kernel_path, initramfs, command_line(self.spec))
        sources = {disk.target: self._make_disk(disk, files) for disk in self.spec.disks}
        boot = Boot(probe.acceleration(), kernel_path, initramfs, self.serial_log, sources)
        self.connection().defineXML(domain_xml(self.spec, boot))
        return self

    def _make_disk(self, disk: DiskSpec, boot: images.BootFiles) -> str:
        directory = disk.directory or self.directory
        if disk.kind == "volume":
            directory = self.directory / f"pool-{disk.target}"
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o711)
        path = directory / (f"{disk.target}.img" if disk.kind == "block" else f"{disk.target}.{disk.format}")
        images.make_image(disk, path, boot)
        self.images[disk.target] = path
        if disk.kind == "block":
            node = images.attach_loop(path)
            self._loops[disk.target] = node
            return f"<source dev='{node}'/>"
        if disk.kind == "volume":
            pool_name = f"{self.name}-{disk.target}"
            pool = self.connection().storagePoolDefineXML(
                f"<pool type='dir'><name>{pool_name}</name><target><path>{directory}</path></target></pool>"
            )
            self._pools.append(pool_name)
            pool.create()
            return f"<source pool='{pool_name}' volume='{path.name}'/>"
        return f"<source file='{path}'/>"

    def _boot_files(self) -> tuple[Path, Path]:
        """Copies of kernel and initramfs inside the private host: libvirt changes the owner of what a domain boots."""
        built = assets.guest_assets()
        kernel_path = BOOT / f"lab-{built.digest}-vmlinuz"
        if not kernel_path.exists():
            shutil.copyfile(built.kernel, kernel_path)
        files = {f"/etc/qemu/fsfreeze-hook.d/{name}": text.encode() for name, text in self.spec.hooks.items()}
        files.update(self.spec.files)
        if not files:
            initramfs = BOOT / f"lab-{built.digest}-initramfs"
            if not initramfs.exists():
                shutil.copyfile(built.initramfs, initramfs)
        else:
            initramfs = self.directory / "initramfs"
            initramfs.write_bytes(built.initramfs.read_bytes() + assets.extra_files(files))
        return kernel_path, initramfs

    # --- life --------------------------------------------------------------------------------------

    def start(self, wait: bool = True) -> Guest:
        """Start the domain; with ``wait``, return when disks are mounted and the configured agent is connected."""
        self.domain().create()
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        """Wait until the guest's init has mounted its disks, started its writers and its agent."""
        deadline_what = f"guest {self.name} getting ready (serial log: {self.serial_log})"
        until(self._is_ready, deadline_what, timeout)
        if self.spec.agent not in ("none", "absent"):
            self.wait_agent(timeout)

    def _is_ready(self) -> bool:
        if not self.is_running():
            raise RuntimeError(f"guest {self.name} has ended: {self.state()}; {self.serial_tail()}")
        if "Kernel panic" in self.serial_tail(200):
            raise RuntimeError(f"the kernel of guest {self.name} panicked: {self.serial_tail()}")
        try:
            return self.channel().exec(["/bin/test", "-e", "/run/lab-ready"], 5).rc == 0
        except (OSError, ChannelError, LookupError):
            return False

    def wait_agent(self, timeout: float = PATIENCE) -> None:
        """Wait until libvirt shows the agent's channel as connected and, for ``real``, the agent answers a ping."""
        until(self.agent_connected, f"the agent of {self.name} connecting", timeout)
        if self.spec.agent.startswith("real"):
            until(self._agent_pings, f"the agent of {self.name} answering", timeout)

    def replace_agent(self, agent: str, timeout: float = PATIENCE) -> None:
        """Put another agent behind the channel of a running guest (values as of ``GuestSpec.agent``, not ``absent``).

        The old one ends as if killed, also one that hangs; what it froze stays frozen (see thaw_inside()).
        """
        self.exec(["/lab/lab-agent", "none"])
        until(lambda: not self.agent_connected(), f"libvirt noticing that the agent of {self.name} has gone", timeout)
        if agent != "none":
            self.exec(["/lab/lab-agent", agent_word(agent)])
            until(self.agent_connected, f"the agent of {self.name} connecting", timeout)
        if agent.startswith("real"):
            until(self._agent_pings, f"the agent of {self.name} answering", timeout)

    def thaw_inside(self) -> None:
        """Thaw whatever is frozen, past the agent."""
        self.exec("for d in /disk/*; do fsfreeze -u $d 2>/dev/null; done; true")

    def agent_connected(self) -> bool:
        """Whether libvirt shows the agent's channel as connected."""
        channels = self.xml().iterfind(f"./devices/channel/target[@name='{AGENT_PORT}']")
        return any(target.get("state") == "connected" for target in channels)

    def _agent_pings(self) -> bool:
        try:
            self.agent_command("guest-ping", timeout=5)
        except libvirt.libvirtError:
            return False
        return True

    def agent_command(self, command: str, arguments: dict[str, Any] | None = None, timeout: int = 30) -> Any:
        """Send a raw command to the agent under test through libvirt; its ``return``. Raises libvirtError."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain(), json.dumps(request), timeout, 0))["return"]

    def state(self) -> tuple[int, int]:
        """``(VIR_DOMAIN_*, reason)``."""
        state, reason = self.domain().state()
        return state, reason

    def is_running(self) -> bool:
        """Whether the domain is active (running or paused)."""
        return bool(self.domain().isActive())

    def wait_shutoff(self, timeout: float = PATIENCE) -> int:
        """Wait until the domain is shut off; the reason (``VIR_DOMAIN_SHUTOFF_*``)."""
        until(lambda: not self.is_running(), f"guest {self.name} shutting off", timeout)
        return self.state()[1]

    def shutdown(self, timeout: float = PATIENCE) -> int:
        """Press the power button and wait; the reason (``VIR_DOMAIN_SHUTOFF_SHUTDOWN`` when clean)."""
        self.domain().shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        return self.wait_shutoff(timeout)

    def destroy(self) -> None:
        """Pull the plug; quiet when it is off."""
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().destroy()

    # --- definition --------------------------------------------------------------------------------

    def xml_text(self, inactive: bool = False) -> str:
        """The domain XML, live where it runs, or the saved one."""
        return self.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)

    def xml(self, inactive: bool = False) -> ElementTree.Element:
        """The parsed domain XML."""
        return ElementTree.fromstring(self.xml_text(inactive))

    def active_paths(self) -> dict[str, Path]:
        """Disk target -> the file or device that the running guest writes now (or, shut off, would write)."""
        found = {}
        for disk in self.xml().iterfind("./devices/disk"):
            path = self._source_path(disk.find("source"))
            if path is not None:
                found[_target(disk)] = path
        return found

    def chain(self, target: str) -> list[Path]:
        """The files of a running guest's disk from the active layer down, as libvirt has them."""
        for disk in self.xml().iterfind("./devices/disk"):
            if _target(disk) == target:
                layers = []
                node: ElementTree.Element | None = disk
                while node is not None:
                    path = self._source_path(node.find("source"))
                    if path is not None:
                        layers.append(path)
                    node = node.find("backingStore")
                return layers
        raise LookupError(f"guest {self.name} has no disk {target}")

    def _source_path(self, source: ElementTree.Element | None) -> Path | None:
        if source is None:
            return None
        path = source.get("file") or source.get("dev")
        if path:
            return Path(path)
        pool, volume = source.get("pool"), source.get("volume")
        if pool and volume:
            return Path(self.connection().storagePoolLookupByName(pool).storageVolLookupByName(volume).path())
        return None

    # --- inside the guest --------------------------------------------------------------------------

    def channel(self) -> LabChannel:
        """The lab's own way in. Raises LookupError while the domain is not running."""
        for source in self.xml().iterfind("./devices/channel"):
            target, end = source.find("target"), source.find("source")
            if target is not None and target.get("name") == LAB_PORT and end is not None and end.get("path"):
                return LabChannel(Path(str(end.get("path"))))
        raise LookupError(f"guest {self.name} is not running")

    def exec(self, argv: Sequence[str] | str, timeout: float = PATIENCE, check: bool = True) -> ExecResult:
        """Run a program (a str: a shell command) in the guest. With ``check``, a failure raises RuntimeError."""
        words = ["/bin/sh", "-c", argv] if isinstance(argv, str) else list(argv)
        if "/" not in words[0]:
            words = ["/bin/busybox", "env", *words]
        result = self.channel().exec(words, timeout)
        if check and result.rc != 0:
            raise RuntimeError(
                f"in guest {self.name}: {argv}: exit code {result.rc}: {result.stderr.decode(errors='replace')}"
            )
        return result

    def write_file(self, path: str, data: bytes, timeout: float = PATIENCE) -> None:
        """Write a file and fsync it."""
        self.channel().write_file(path, data, timeout)
        self.exec(["/bin/sync", path], timeout)

    def read_file(self, path: str, timeout: float = PATIENCE) -> bytes:
        """The content of a file."""
        return self.channel().read_file(path, timeout)

    def sha256(self, path: str, timeout: float = PATIENCE) -> str:
        """The hex digest of a file or device, computed in the guest."""
        return self.exec(["/bin/sha256sum", path], timeout).text.split()[0]

    def sync(self) -> None:
        """sync(2) in the guest."""
        self.exec(["/bin/sync"])

    def writer_log(self, target: str, timeout: float = PATIENCE) -> WriterLog:
        """What the writer of ``target`` has written so far, as the guest sees it."""
        return parse_writer_log(self.read_file(f"/disk/{target}/writer.log", timeout))

    def gaps(self, target: str) -> Gaps:
        """The writer's last record and largest gaps, from the guest's memory."""
        text = self.exec(["/bin/cat", f"/run/writer-{target}.gaps"]).text
        last = _numbers(text.splitlines()[0])
        largest = tuple(Gap(**_numbers(line)) for line in text.splitlines() if line.startswith("gap "))
        return Gaps(largest=largest, **last)

    def writer_errors(self, target: str) -> list[str]:
        """Failed writes that the writer has noted."""
        return self.exec(f"cat /run/writer-{target}.errors 2>/dev/null || true").text.splitlines()

    def stop_writers(self) -> None:
        """Stop every writer (its last record is fsynced) and wait."""
        self.exec("killall labwriter 2>/dev/null; while pidof labwriter >/dev/null; do sleep 0.05; done; sync")

    def start_writer(self, target: str, sync: bool = False) -> None:
        """Start the writer of a mounted disk again (gaps since its last start are forgotten)."""
        mode = "sync" if sync else ""
        self.exec(f"setsid labwriter {target} /disk/{target} {mode} >/dev/null 2>&1 </dev/null &")
        until(
            lambda: self.exec(f"test -e /run/writer-{target}.gaps", check=False).rc == 0,
            f"the writer of {target} starting",
        )

    def frozen_filesystems(self) -> list[str]:
        """Mount points below /disk that do not take a write: tried by a write in the background."""
        script = """
            for d in /disk/*; do touch "$d/.touched" >/dev/null 2>&1 & pids="$pids $!:$d"; done
            n=0
            while [ $n -lt 30 ]; do
                left=
                for entry in $pids; do
                    grep -qs 'State:.[^Z]' /proc/${entry%%:*}/status && left="$left ${entry#*:}"
                done
                [ -z "$left" ] && break
                sleep 0.1; n=$((n+1))
            done
            echo $left
        """
        return self.exec(script).text.split()

    # --- end ---------------------------------------------------------------------------------------

    def serial_tail(self, lines: int = 40) -> str:
        """The end of the serial console's log."""
        try:
            return "\n".join(self.serial_log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(no serial log: {error})"

    def qemu_log(self, lines: int = 40) -> str:
        """The end of QEMU's log."""
        try:
            return "\n".join((LOGS / f"{self.name}.log").read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(no QEMU log: {error})"

    def cleanup(self) -> None:
        """Remove every trace: domain with snapshots, checkpoints, saved state and NVRAM; pools, loop devices, files."""
        self.host.start()
        self.destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            )
        for name in self._pools:
            with contextlib.suppress(libvirt.libvirtError):
                pool = self.connection().storagePoolLookupByName(name)
                with contextlib.suppress(libvirt.libvirtError):
                    pool.destroy()
                pool.undefine()
        for node in self._loops.values():
            kernel.detach_loop(node)
        for path in self.images.values():
            path.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        for log in (self.serial_log, LOGS / f"{self.name}.log"):
            log.unlink(missing_ok=True)
        if self._connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.close()
            self._connection = None


def _target(disk: ElementTree.Element) -> str:
    target = disk.find("target")
    assert target is not None
    return str(target.get("dev"))


def _numbers(line: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}


def digest(data: bytes) -> str:
    """Hex SHA-256 of ``data``, to compare with Guest.sha256()."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def running(host: TestHost, spec: GuestSpec, prepare: Callable[[Guest], None] | None = None) -> Iterator[Guest]:
    """A guest for the length of a ``with`` block, outside pytest."""
    guest = Guest(host, spec)
    try:
        guest.define()
        if prepare:
            prepare(guest)
        yield guest.start()
    finally:
        guest.cleanup()
