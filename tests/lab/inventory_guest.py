# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A whole Debian guest that Ansible reaches over ssh, and whose agent runs no programs, as RHEL and its relatives ship it.

Its root file system is ext4 on the last partition of a GPT, as cloud images have it; ``/srv`` is an XFS without a partition.
It is built once (a minute) and kept in the lab's cache.
"""

from __future__ import annotations

import inspect
import json
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from . import assets
from .host import TestHost
from .images import run
from .waiting import until
from .whole_debian import BOOT_SECONDS, WholeGuest, cached, make_root

MIB = 1 << 20

USER = "operator"
ROOT_PARTITION = 1  # the last by its place
ROOT_START, ROOT_SIZE = 9 * MIB, 1100 * MIB
DISKS = {"vda": ROOT_START + ROOT_SIZE + MIB, "vdb": 320 * MIB}

PACKAGES = (
    *("iproute2", "xfsprogs", "fdisk", "cloud-guest-utils"),
    *("openssh-server", "sudo", "python3", "qemu-guest-agent"),
)

#: What /etc/sysconfig/qemu-ga of RHEL 9 disables.
DISABLED = (
    "guest-file-open,guest-file-close,guest-file-read,guest-file-write,guest-file-seek,guest-file-flush,"
    "guest-exec,guest-exec-status"
)

PROVISION = f"""
echo inventory >/etc/hostname
printf '127.0.0.1 localhost inventory\\n' >/etc/hosts
printf 'LABEL=root / ext4 noatime,errors=remount-ro 0 0\\n/dev/vdb /srv xfs noatime,x-systemd.device-timeout=900 0 0\\n' >/etc/fstab
printf '[Match]\\nName=e*\\n[Network]\\nAddress=10.0.2.15/24\\nLinkLocalAddressing=no\\n' >/etc/systemd/network/user.network
useradd --create-home --shell /bin/sh --gid {USER} {USER}
echo '{USER} ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/{USER}
chmod 0440 /etc/sudoers.d/{USER}
install -d -m 0700 -o {USER} -g {USER} /home/{USER}/.ssh
printf 'UseDNS no\\nPasswordAuthentication no\\n' >/etc/ssh/sshd_config.d/lab.conf
printf '[general]\\nblacklist=%s\\n' {DISABLED} >/etc/qemu/qemu-ga.conf
systemctl enable systemd-networkd.service ssh.service
systemctl mask systemd-networkd-wait-online.service
"""


def built() -> Path:
    """The directory with ``vmlinuz``, ``initrd.img``, ``vda.qcow2``, ``vdb.qcow2`` and the key ``id_ed25519``; built once."""
    recipe = [inspect.getsource(function) for function in (_build, _disks)]
    return cached("inventory-guest", [json.dumps([PACKAGES, DISKS, ROOT_START]), PROVISION, *recipe], _build)


def _build(scratch: Path, content: Path) -> None:
    key = content / "id_ed25519"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key)
    authorize = (
        f"install -m 0600 {shlex.quote(str(key))}.pub $1/home/{USER}/.ssh/authorized_keys",
        f'chroot "$1" chown {USER}: /home/{USER}/.ssh/authorized_keys',
    )
    root = scratch / "root"
    make_root(root, PACKAGES, PROVISION, authorize, content)
    _disks(root, scratch)
    for target in DISKS:
        raw = scratch / f"{target}.raw"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, content / f"{target}.qcow2")


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


class InventoryGuest(WholeGuest):
    """A domain with the built disks."""

    def __init__(self, host: TestHost, name: str) -> None:
        super().__init__(host, name)
        self.port = _free_port()
        self.key = self.directory / "id_ed25519"

    def define(self) -> None:
        """Copy the disks and define the domain."""
        network = ("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22")
        device = ("-device", "virtio-net-pci,netdev=net,addr=0x10")
        self.define_from(built(), DISKS, memory=384, arguments=(*network, *device))
        shutil.copyfile(built() / self.key.name, self.key)
        self.key.chmod(0o600)

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


# Emulated key exchanges take seconds.
_SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60"),
)


def _free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return int(probing.getsockname()[1])
