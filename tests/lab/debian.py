# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A whole Debian guest with PostgreSQL, its data and its write-ahead log on disks of their own.

The tiny guest of :mod:`lab.guest` is for almost everything. This one is for what only a real database shows: whether a
restored machine comes up and its pages and indexes are whole. It is built once (two minutes) and kept in the lab's cache.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from . import assets, probe
from .host import TestHost
from .waiting import until

IMAGES = Path("/var/lib/libvirt/images/lab")
BOOT = Path("/var/lib/libvirt/boot")
BOOT_SECONDS = 600  # emulated, on a busy machine

#: Target of a disk -> the directory of the guest that lies on it, and its size.
DISKS = {"vda": ("/", 2 << 30), "vdb": ("/srv/data", 512 << 20), "vdc": ("/srv/wal", 512 << 20)}

PACKAGES = (
    *("systemd-sysv", "dbus", "udev", "kmod", "initramfs-tools", "zstd", "e2fsprogs", "linux-image-cloud-amd64"),
    *("qemu-guest-agent", "postgresql"),
)

#: Runs in the new root file system. The database is made by the builder's CPU, not by the emulated one.
PROVISION = """
set -eu
echo debian >/etc/hostname
rm -f /etc/resolv.conf
printf '127.0.0.1 localhost\\n' >/etc/hosts
cat >/etc/fstab <<'FSTAB'
LABEL=root / ext4 noatime,errors=remount-ro 0 1
LABEL=data /srv/data ext4 noatime,errors=remount-ro 0 2
LABEL=wal /srv/wal ext4 noatime,errors=remount-ro 0 2
FSTAB
sed -i 's/^MODULES=.*/MODULES=list/' /etc/initramfs-tools/initramfs.conf
printf 'virtio_pci\\nvirtio_blk\\n' >/etc/initramfs-tools/modules
update-initramfs -u -k all
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \\
    fstrim.timer getty@tty1.service systemd-timesyncd.service systemd-pstore.service
pg=$(ls /usr/lib/postgresql)
pg_dropcluster "$pg" main 2>/dev/null || true
install -d -o postgres -g postgres /srv/data /srv/wal
pg_createcluster "$pg" main -d /srv/data/main -- --waldir=/srv/wal/main --data-checksums
printf "full_page_writes = on\\nfsync = on\\nsynchronous_commit = on\\ncheckpoint_timeout = 30s\\n" \\
    >"/etc/postgresql/$pg/main/conf.d/test.conf"
pg_ctlcluster --skip-systemctl-redirect "$pg" main start
runuser -u postgres -- createdb bench
runuser -u postgres -- pgbench -q -i -s 2 bench
runuser -u postgres -- psql -qc 'CREATE EXTENSION amcheck' bench
pg_ctlcluster --skip-systemctl-redirect "$pg" main stop
"""


class BuildError(RuntimeError):
    """The guest could not be built; the message says why."""


def built() -> Path:
    """The directory with ``vmlinuz``, ``initrd.img`` and ``<target>.qcow2``; built unless the cache has it."""
    inputs = (json.dumps([PACKAGES, DISKS]), PROVISION, Path(__file__).read_text())
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    cache = assets.cache_directory().resolve() / "debian"
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"postgresql-{digest}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            for stale in cache.glob("*/"):
                shutil.rmtree(stale)
            _build(directory)
    return directory


def _build(directory: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise BuildError("a Debian guest is built by mmdebstrap: apt-get install mmdebstrap")
    with tempfile.TemporaryDirectory(prefix="building-", dir=directory.parent) as name:
        root, content = Path(name) / "root", Path(name) / "content"
        content.mkdir()
        left_out = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "info")]
        _run(
            # A mount and a process namespace of its own: were it killed, neither mounts nor a database stay behind.
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--components=main"),
            *(f"--include={','.join(PACKAGES)}", *left_out),
            f'--customize-hook=chroot "$1" sh -c {shlex.quote(PROVISION)}',
            *("bookworm", str(root)),
        )
        for target, (path, size) in reversed(DISKS.items()):
            _disk(root / path.lstrip("/"), size, content / f"{target}.qcow2", path)
        for file, pattern in (("vmlinuz", "boot/vmlinuz-*"), ("initrd.img", "boot/initrd.img-*")):
            (only,) = root.glob(pattern)
            shutil.copyfile(only, content / file)
        content.rename(directory)


def _disk(tree: Path, size: int, image: Path, path: str) -> None:
    """A file system of a directory, which is then emptied: what lies deeper has a disk of its own."""
    raw = image.with_suffix(".raw")
    with raw.open("wb") as file:
        file.truncate(size)
    label = path.rsplit("/", 1)[1] or "root"
    _run("mke2fs", "-q", "-t", "ext4", "-L", label, "-d", str(tree), str(raw))
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
    raw.unlink()
    if path != "/":
        for entry in tree.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _run(*argv: str) -> None:
    result = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        raise BuildError(f"{argv[0]} failed with exit code {result.returncode}:\n{result.stdout[-3000:]}")


@dataclass(frozen=True)
class Ran:
    """What a command in the guest came to."""

    rc: int
    output: str


class DebianGuest:
    """A domain with the built disks. It is talked to through its agent only."""

    def __init__(self, host: TestHost, name: str) -> None:
        self.host = host
        self.name = name
        self.directory = IMAGES / name

    def define(self) -> None:
        """Copy the disks and define the domain."""
        source = built()
        self.directory.mkdir(parents=True)
        self.directory.chmod(0o711)
        BOOT.mkdir(exist_ok=True)
        for file in ("vmlinuz", "initrd.img"):
            shutil.copyfile(source / file, BOOT / f"{self.name}-{file}")
        disks = []
        for target in DISKS:
            shutil.copyfile(source / f"{target}.qcow2", self.directory / f"{target}.qcow2")
            disks.append(
                f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>"
                f"<source file='{self.directory}/{target}.qcow2'/><target dev='{target}' bus='virtio'/></disk>"
            )
        self.host.connect().defineXML(
            f"<domain type='{probe.acceleration()}'><name>{self.name}</name><memory unit='MiB'>512</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{BOOT}/{self.name}-vmlinuz</kernel>"
            f"<initrd>{BOOT}/{self.name}-initrd.img</initrd>"
            "<cmdline>root=LABEL=root console=ttyS0 quiet panic=-1 mitigations=off audit=0</cmdline></os>"
            "<features><acpi/><apic/></features><clock offset='utc'/>"
            f"<devices>{''.join(disks)}"
            f"<serial type='file'><source path='/var/log/libvirt/qemu/{self.name}-serial.log' append='on'/></serial>"
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            "<memballoon model='virtio'/></devices></domain>"
        )

    def domain(self) -> libvirt.virDomain:
        """The libvirt domain, looked up afresh."""
        return self.host.connect().lookupByName(self.name)

    def start(self) -> None:
        """Start it and wait until its database answers."""
        self.domain().create()
        self.wait_database()

    def wait_database(self) -> None:
        """Wait until the database answers."""
        until(self._database_answers, f"the database of {self.name} answering", BOOT_SECONDS)

    def _database_answers(self) -> bool:
        try:
            return self.run("runuser -u postgres -- psql -Atc 'SELECT 1' bench").rc == 0
        except libvirt.libvirtError:
            return False

    def sql(self, statement: str) -> str:
        """The output of one statement, unaligned."""
        ran = self.run(f"runuser -u postgres -- psql -v ON_ERROR_STOP=1 -Atc {shlex.quote(statement)} bench")
        assert ran.rc == 0, ran.output
        return ran.output.strip()

    def run(self, command: str, timeout: float = 300) -> Ran:
        """Run a shell command in the guest; both of its outputs. Raises libvirtError where the agent does not answer."""
        arguments = {"path": "/bin/sh", "arg": ["-c", f"exec 2>&1; {command}"], "capture-output": True}
        pid = self._agent("guest-exec", arguments)["pid"]
        deadline = time.monotonic() + timeout
        while True:
            status = self._agent("guest-exec-status", {"pid": pid})
            if status["exited"]:
                return Ran(status.get("exitcode", -1), base64.b64decode(status.get("out-data", "")).decode())
            assert time.monotonic() < deadline, f"{command!r} takes longer than {timeout} s"
            time.sleep(0.2)

    def _agent(self, command: str, arguments: dict[str, Any]) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain(), request, 30, 0))["return"]

    def cleanup(self) -> None:
        """Remove the domain and its files."""
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            )
        shutil.rmtree(self.directory, ignore_errors=True)
        for file in ("vmlinuz", "initrd.img"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(BOOT / f"{self.name}-{file}")
