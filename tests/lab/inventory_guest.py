# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A whole Debian guest that Ansible reaches over ssh, and whose agent runs no programs, as RHEL and its relatives ship it.

Its root file system is ext4 on the last partition of a GPT, as cloud images have it; ``/srv`` is an XFS without a partition.
It is built once (a minute) and kept in the lab's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import shlex
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import libvirt

from . import assets, probe
from .host import TestHost
from .images import run
from .waiting import until

IMAGES = Path("/var/lib/libvirt/images/lab")
BOOT = Path("/var/lib/libvirt/boot")
BOOT_SECONDS = 600  # emulated, on a busy machine
MIB = 1 << 20

USER = "operator"
ROOT_PARTITION = 1  # the last by its place
ROOT_START, ROOT_SIZE = 9 * MIB, 1100 * MIB
DISKS = {"vda": ROOT_START + ROOT_SIZE + MIB, "vdb": 320 * MIB}

PACKAGES = (
    *("systemd-sysv", "dbus", "udev", "kmod", "initramfs-tools", "zstd", "iproute2", "linux-image-cloud-amd64"),
    *("e2fsprogs", "xfsprogs", "fdisk", "cloud-guest-utils"),
    *("openssh-server", "sudo", "python3", "qemu-guest-agent"),
)

#: What /etc/sysconfig/qemu-ga of RHEL 9 disables.
DISABLED = (
    "guest-file-open,guest-file-close,guest-file-read,guest-file-write,guest-file-seek,guest-file-flush,"
    "guest-exec,guest-exec-status"
)

PROVISION = f"""
set -eu
echo inventory >/etc/hostname
rm -f /etc/resolv.conf
printf '127.0.0.1 localhost inventory\\n' >/etc/hosts
printf 'LABEL=root / ext4 noatime,errors=remount-ro 0 0\\n/dev/vdb /srv xfs noatime,x-systemd.device-timeout=900 0 0\\n' >/etc/fstab
printf '[Match]\\nName=e*\\n[Network]\\nAddress=10.0.2.15/24\\nLinkLocalAddressing=no\\n' >/etc/systemd/network/user.network
sed -i 's/^MODULES=.*/MODULES=list/' /etc/initramfs-tools/initramfs.conf
printf 'virtio_pci\\nvirtio_blk\\n' >/etc/initramfs-tools/modules
update-initramfs -u -k all
useradd --create-home --shell /bin/sh --gid {USER} {USER}
echo '{USER} ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/{USER}
chmod 0440 /etc/sudoers.d/{USER}
install -d -m 0700 -o {USER} -g {USER} /home/{USER}/.ssh
printf 'UseDNS no\\nPasswordAuthentication no\\n' >/etc/ssh/sshd_config.d/lab.conf
printf '[general]\\nblacklist=%s\\n' {DISABLED} >/etc/qemu/qemu-ga.conf
systemctl enable systemd-networkd.service ssh.service
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \\
    fstrim.timer getty@tty1.service systemd-networkd-wait-online.service systemd-timesyncd.service systemd-pstore.service
"""


def built() -> Path:
    """The directory with ``vmlinuz``, ``initrd.img``, ``vda.qcow2``, ``vdb.qcow2`` and the key ``id_ed25519``; built once."""
    recipe = (inspect.getsource(function) for function in (_build, _disks))
    inputs = (json.dumps([PACKAGES, DISKS, ROOT_START]), PROVISION, *recipe)
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    cache = assets.cache_directory().resolve() / "inventory-guest"
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / digest
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            for stale in cache.glob("*/"):
                shutil.rmtree(stale)
            _build(directory)
    return directory


def _build(directory: Path) -> None:
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "info")]
    with tempfile.TemporaryDirectory(prefix="building-", dir=directory.parent) as name:
        root, content = Path(name) / "root", Path(name) / "content"
        content.mkdir()
        key = content / "id_ed25519"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key)
        authorize = f"install -m 0600 {shlex.quote(str(key))}.pub $1/home/{USER}/.ssh/authorized_keys"
        run(
            # A mount and a process namespace of its own: were it killed, no mounts stay behind.
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--components=main"),
            *(f"--include={','.join(PACKAGES)}", *left_out),
            f'--customize-hook=chroot "$1" sh -c {shlex.quote(PROVISION)}',
            f"--customize-hook={authorize}",
            f'--customize-hook=chroot "$1" chown {USER}: /home/{USER}/.ssh/authorized_keys',
            *("bookworm", root),
        )
        for file, pattern in (("vmlinuz", "boot/vmlinuz-*"), ("initrd.img", "boot/initrd.img-*")):
            (only,) = root.glob(pattern)
            shutil.copyfile(only, content / file)
        _disks(root, Path(name))
        for target in DISKS:
            raw = Path(name) / f"{target}.raw"
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, content / f"{target}.qcow2")
        content.rename(directory)


def _disks(root: Path, scratch: Path) -> None:
    for target, size in DISKS.items():
        with (scratch / f"{target}.raw").open("wb") as file:
            file.truncate(size)
    tree = scratch / "tree"
    with tree.open("wb") as file:
        file.truncate(ROOT_SIZE)
    run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, tree)
    run(
        *(assets.guest_assets().sfdisk, "-q", scratch / "vda.raw"),
        stdin=f"label: gpt\n15: start=1MiB, size=8MiB, type=uefi\n{ROOT_PARTITION}: start={ROOT_START // MIB}MiB, type=linux\n",
    )
    place = ("bs=1M", f"seek={ROOT_START // MIB}", "conv=notrunc,sparse", "status=none")
    run("dd", f"if={tree}", f"of={scratch / 'vda.raw'}", *place)
    run("mkfs.xfs", "-q", scratch / "vdb.raw")


class InventoryGuest:
    """A domain with the built disks."""

    def __init__(self, host: TestHost, name: str) -> None:
        self.host = host
        self.name = name
        self.directory = IMAGES / name
        self.port = _free_port()
        self.key = self.directory / "id_ed25519"

    def define(self) -> None:
        """Copy the disks and define the domain."""
        source = built()
        self.directory.mkdir(parents=True)
        self.directory.chmod(0o711)
        BOOT.mkdir(exist_ok=True)
        for file in ("vmlinuz", "initrd.img"):
            shutil.copyfile(source / file, BOOT / f"{self.name}-{file}")
        shutil.copyfile(source / self.key.name, self.key)
        self.key.chmod(0o600)
        disks = []
        for target in DISKS:
            shutil.copyfile(source / f"{target}.qcow2", self.image(target))
            disks.append(
                f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{self.image(target)}'/>"
                f"<target dev='{target}' bus='virtio'/></disk>"
            )
        network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"
        self.host.connect().defineXML(
            f"<domain type='{probe.acceleration()}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
            f"<name>{self.name}</name><memory unit='MiB'>384</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{BOOT}/{self.name}-vmlinuz</kernel>"
            f"<initrd>{BOOT}/{self.name}-initrd.img</initrd>"
            "<cmdline>root=LABEL=root console=ttyS0 quiet panic=-1 mitigations=off audit=0</cmdline></os>"
            "<features><acpi/><apic/></features><clock offset='utc'/>"
            f"<devices>{''.join(disks)}"
            f"<serial type='file'><source path='/var/log/libvirt/qemu/{self.name}-serial.log' append='on'/></serial>"
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            "<memballoon model='virtio'/></devices>"
            f"<qemu:commandline><qemu:arg value='-netdev'/><qemu:arg value='{network}'/>"
            "<qemu:arg value='-device'/><qemu:arg value='virtio-net-pci,netdev=net,addr=0x10'/></qemu:commandline>"
            "</domain>"
        )

    def image(self, target: str) -> Path:
        """The image of a disk."""
        return self.directory / f"{target}.qcow2"

    def domain(self) -> libvirt.virDomain:
        """The libvirt domain, looked up afresh."""
        return self.host.connect().lookupByName(self.name)

    def start(self) -> None:
        """Start it and wait until one can log in and its agent has come up."""
        self.domain().create()
        until(lambda: self._ssh("systemctl is-active qemu-guest-agent").returncode == 0, "a login", BOOT_SECONDS, 0.5)

    def shutdown(self) -> None:
        """Shut it down cleanly and wait."""
        self.domain().shutdown()
        until(lambda: not self.domain().isActive(), f"{self.name} shutting down")

    def run(self, command: str) -> str:
        """Run a shell command as root over ssh; its output. Asserts that it succeeded."""
        done = self._ssh(f"sudo sh -c {shlex.quote(command)}")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _ssh(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ssh", "-F", "none", "-i", self.key, "-p", str(self.port), *_SSH_OPTIONS, f"{USER}@127.0.0.1", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def as_inventory_host(self) -> dict[str, Any]:
        """Its variables in an inventory."""
        return {
            "ansible_connection": "ssh",
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": USER,
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": "-F none " + " ".join(_SSH_OPTIONS),
            "ansible_python_interpreter": "/usr/bin/python3",
        }

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
            (BOOT / f"{self.name}-{file}").unlink(missing_ok=True)


# Emulated key exchanges take seconds.
_SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60"),
)


def _free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return int(probing.getsockname()[1])
