# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The disk image of a nested hypervisor: built once per set of inputs, then shared by every machine."""

from __future__ import annotations

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROVISION = Path(__file__).with_name("provision.sh")
DISK_BYTES = 20 << 30
UNUSED_IMAGE_DAYS = 14

PACKAGES = (
    # the system
    "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "initramfs-tools", "zstd", "e2fsprogs", "linux-image-cloud-amd64",
    "libnss-myhostname",  # libvirt asks for the canonical host name whenever a domain starts
    # what Ansible needs of any host
    "openssh-server", "sudo", "python3",
    # the hypervisor, confined as Debian ships it
    "libvirt-daemon-system", "libvirt-clients", "python3-libvirt", "polkitd", "qemu-system-x86", "qemu-utils", "ovmf",
    "apparmor",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that the content of an image depends on, apart from the day it was built."""

    suite: str = "bookworm"
    packages: tuple[str, ...] = field(default=PACKAGES)

    def key(self, public_key: str) -> str:
        """Return the name of the image in the cache: a digest of the recipe, the provisioning script and the ssh key."""
        inputs = json.dumps(asdict(self)) + PROVISION.read_text() + public_key + Path(__file__).read_text()
        return f"{self.suite}-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Image:
    """A built image: boot `kernel` with `initrd`, `disk` (qcow2) as the backing file of the machine's own overlay."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.img"

    @property
    def host_key(self) -> str:
        """The machines' public ssh host key, without its comment."""
        return (self.directory / "ssh_host_ed25519_key.pub").read_text()


def cache_directory() -> Path:
    """Return (and make) the cache of the nested lab: ``VMK_LAB_CACHE``, by default ``.cache`` in the project."""
    root = os.environ.get("VMK_LAB_CACHE") or Path(__file__).parents[2] / ".cache"
    directory = Path(root).resolve() / "nested"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def ssh_key(cache: Path) -> Path:
    """Return the private ssh key of this cache, made on first use: no key is ever part of the project."""
    key = cache / "id_ed25519"
    with _locked(cache / "id_ed25519.lock"):
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmk-nested", "-f", str(key)], check=True)
    return key


def image(recipe: Recipe, cache: Path) -> Image:
    """Return the image of `recipe`, built now unless the cache has it. Needs root and ``mmdebstrap``; about a minute."""
    public_key = ssh_key(cache).with_suffix(".pub").read_text().strip()
    images = cache / "images"
    images.mkdir(exist_ok=True)
    directory = images / recipe.key(public_key)
    with _locked(images / "lock"):
        if not directory.exists():
            _remove_unused(images)
            with tempfile.TemporaryDirectory(prefix="building-", dir=images) as building:
                _build(recipe, public_key, Path(building))
                (Path(building) / "content").rename(directory)
    os.utime(directory)
    return Image(directory)


def _build(recipe: Recipe, public_key: str, building: Path) -> None:
    root = building / "root"
    content = building / "content"
    content.mkdir()
    subprocess.run(
        [
            # In a mount namespace of its own: were mmdebstrap killed, no mount would stay below the directory we remove.
            "unshare", "--mount", "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--components=main",
            f"--include={','.join(recipe.packages)}",
            *(f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")),
            f'--customize-hook={shlex.quote(str(PROVISION))} "$1"',
            recipe.suite, str(root),
        ],
        env=os.environ | {"VMK_AUTHORIZED_KEY": public_key},
        stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    for name, pattern in {"vmlinuz": "boot/vmlinuz-*", "initrd.img": "boot/initrd.img-*"}.items():
        (newest,) = root.glob(pattern)
        shutil.copyfile(newest, content / name)
    shutil.copyfile(root / "etc/ssh/ssh_host_ed25519_key.pub", content / "ssh_host_ed25519_key.pub")
    raw = building / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-N", "200000", "-d", str(root), str(raw)], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(content / "disk.qcow2")], check=True)


def _remove_unused(images: Path) -> None:
    for entry in images.iterdir():
        abandoned = entry.name.startswith("building-")  # the builder holds the lock, so nobody is building
        if entry.is_dir() and (abandoned or time.time() - entry.stat().st_mtime > UNUSED_IMAGE_DAYS * 86400):
            shutil.rmtree(entry)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
