# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What whole Debian guests have in common: built once by mmdebstrap and kept in the lab's cache, booted from their own kernel.

The tiny guest of :mod:`lab.guest` is for almost everything; :mod:`lab.debian` and :mod:`lab.inventory_guest` say what theirs are for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import libvirt

from . import assets, probe
from .host import TestHost
from .images import run

IMAGES = Path("/var/lib/libvirt/images/lab")
BOOT = Path("/var/lib/libvirt/boot")
BOOT_SECONDS = 600  # emulated, on a busy machine

KERNEL_FILES = {"vmlinuz": "boot/vmlinuz-*", "initrd.img": "boot/initrd.img-*"}

#: Every root file system begins so: a kernel, an initrd that knows these disks, and no timers that would write by themselves.
PACKAGES = ("systemd-sysv", "dbus", "udev", "kmod", "initramfs-tools", "zstd", "e2fsprogs", "linux-image-cloud-amd64")
PROVISION = """
set -eu
rm -f /etc/resolv.conf
sed -i 's/^MODULES=.*/MODULES=list/' /etc/initramfs-tools/initramfs.conf
printf 'virtio_pci\\nvirtio_blk\\n' >/etc/initramfs-tools/modules
update-initramfs -u -k all
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \\
    fstrim.timer getty@tty1.service systemd-timesyncd.service systemd-pstore.service
"""


def cached(kind: str, recipe: Sequence[str], build: Callable[[Path, Path], None]) -> Path:
    """The directory that ``build(scratch, content)`` has filled for this ``recipe``; older ones of the kind are removed."""
    inputs = (*recipe, repr(PACKAGES), PROVISION)
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    cache = assets.cache_directory().resolve() / kind
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / digest
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            for stale in cache.glob("*/"):
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as scratch:
                content = Path(scratch) / "content"
                content.mkdir()
                build(Path(scratch), content)
                content.rename(directory)
    return directory


def make_root(root: Path, packages: Sequence[str], provision: str, hooks: Sequence[str], content: Path) -> None:
    """A Debian 12 in the directory ``root``; its kernel and initrd go to ``content``."""
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "info")]
    run(
        # A mount and a process namespace of its own: were it killed, neither mounts nor processes stay behind.
        *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--components=main"),
        *(f"--include={','.join((*PACKAGES, *packages))}", *left_out),
        f'--customize-hook=chroot "$1" sh -c {shlex.quote(PROVISION + provision)}',
        *(f"--customize-hook={hook}" for hook in hooks),
        *("bookworm", root),
    )
    for file, pattern in KERNEL_FILES.items():
        (only,) = root.glob(pattern)
        shutil.copyfile(only, content / file)


class WholeGuest:
    """A domain with built disks."""

    def __init__(self, host: TestHost, name: str) -> None:
        self.host = host
        self.name = name
        self.directory = IMAGES / name

    def image(self, target: str) -> Path:
        """The image of a disk."""
        return self.directory / f"{target}.qcow2"

    def define_from(
        self, source: Path, disks: Mapping[str, object], memory: int, arguments: Sequence[str] = ()
    ) -> None:
        """Copy the disks and define the domain: ``memory`` in MiB, ``arguments`` for QEMU itself."""
        self.directory.mkdir(parents=True)
        self.directory.chmod(0o711)
        BOOT.mkdir(exist_ok=True)
        for file in KERNEL_FILES:
            shutil.copyfile(source / file, BOOT / f"{self.name}-{file}")
        devices = []
        for target in disks:
            shutil.copyfile(source / f"{target}.qcow2", self.image(target))
            devices.append(
                f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>"
                f"<source file='{self.image(target)}'/><target dev='{target}' bus='virtio'/></disk>"
            )
        passed = "".join(f"<qemu:arg value='{argument}'/>" for argument in arguments)
        self.host.connect().defineXML(
            f"<domain type='{probe.acceleration()}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
            f"<name>{self.name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{BOOT}/{self.name}-vmlinuz</kernel>"
            f"<initrd>{BOOT}/{self.name}-initrd.img</initrd>"
            "<cmdline>root=LABEL=root console=ttyS0 quiet panic=-1 mitigations=off audit=0</cmdline></os>"
            "<features><acpi/><apic/></features><clock offset='utc'/>"
            f"<devices>{''.join(devices)}"
            f"<serial type='file'><source path='/var/log/libvirt/qemu/{self.name}-serial.log' append='on'/></serial>"
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            "<memballoon model='virtio'/></devices>"
            f"{f'<qemu:commandline>{passed}</qemu:commandline>' if passed else ''}</domain>"
        )

    def domain(self) -> libvirt.virDomain:
        """The libvirt domain, looked up afresh."""
        return self.host.connect().lookupByName(self.name)

    def cleanup(self) -> None:
        """Remove the domain and its files."""
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            )
        shutil.rmtree(self.directory, ignore_errors=True)
        for file in KERNEL_FILES:
            (BOOT / f"{self.name}-{file}").unlink(missing_ok=True)
