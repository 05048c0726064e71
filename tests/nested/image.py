# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The disk image of a nested hypervisor: built once for its inputs, then shared by every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from lab import assets, releases

PROVISION = Path(__file__).with_name("provision.sh")
DISK_BYTES = 20 << 30  # sparse

PACKAGES = (
    # the system
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "iproute2",
    "initramfs-tools",
    "zstd",
    "e2fsprogs",
    "acl",  # images are shared by access control lists
    "lvm2",  # volumes as disks
    "linux-image-cloud-amd64",
    "libnss-myhostname",  # libvirt asks for the host's canonical name whenever a domain starts
    # what Ansible needs of any host
    "openssh-server",
    "sudo",
    "python3",
    # the hypervisor, confined as Debian ships it
    "libvirt-daemon-system",
    "libvirt-clients",
    "python3-libvirt",
    "polkitd",
    "qemu-system-x86",
    "qemu-utils",
    "ovmf",
    "apparmor",
)


class BuildError(RuntimeError):
    """The image could not be built; the message says why."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that an image's content depends on but the day it was built, the key and this directory's sources."""

    suite: str = "bookworm"
    packages: tuple[str, ...] = PACKAGES


@dataclasses.dataclass(frozen=True)
class Image:
    """A built image: ``disk`` (qcow2) is the backing file of each machine's overlay, booted by kernel and initrd."""

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
        """The machines' public ssh host key: ``TYPE KEY COMMENT``."""
        return (self.directory / "ssh_host_ed25519_key.pub").read_text().strip()


def cache_directory() -> Path:
    """Where images and machines are kept: ``nested`` in the lab's cache (``$VMK_LAB_CACHE``, else ``.cache/lab``)."""
    directory = assets.cache_directory().resolve() / "nested"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def ssh_key() -> Path:
    """The private key that opens every machine of this cache; made on first use, never part of the project."""
    key = cache_directory() / "id_ed25519"
    with assets.locked(key.with_suffix(".lock")):
        if not key.exists():
            # ssh-keygen writes the public half last: a key without it was interrupted
            temporary = key.with_suffix(".new")
            temporary.unlink(missing_ok=True)
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmkeeper-nested", "-f", str(temporary))
            temporary.with_suffix(".new.pub").rename(key.with_suffix(".pub"))
            temporary.rename(key)
    return key


def built_image(recipe: Recipe | None = None) -> Image:
    """The image of ``recipe``, built (one minute on an idle machine, as root) unless the cache has it.

    Safe to call from several processes at once: one builds, the others wait. Raises BuildError.
    """
    recipe = recipe or Recipe()
    public_key = ssh_key().with_suffix(".pub").read_text().strip()
    images, digest = cache_directory() / "images", _digest(recipe, public_key)
    return Image(releases.kept(images, recipe.suite, digest, lambda scratch: _build(recipe, public_key, scratch)))


def _digest(recipe: Recipe, public_key: str) -> str:
    inputs = (json.dumps(dataclasses.asdict(recipe)), public_key, PROVISION.read_text(), Path(__file__).read_text())
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def _build(recipe: Recipe, public_key: str, scratch: Path) -> Path:
    if os.geteuid() != 0:
        raise BuildError("building a nested hypervisor's image needs root")
    if shutil.which("mmdebstrap") is None:
        raise BuildError("a nested hypervisor's image is built by mmdebstrap: apt-get install mmdebstrap")
    root, content = scratch / "root", scratch / "content"
    content.mkdir()
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")]
    _run(
        # A mount namespace of its own: were mmdebstrap killed, no mount stays below what is removed then.
        *("unshare", "--mount"),
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory"),
        *("--components=main", f"--include={','.join(recipe.packages)}", *left_out),
        *releases.STANDING_STILL,
        f'--customize-hook={shlex.quote(str(PROVISION))} "$1"',
        *(recipe.suite, str(root)),
        environment={"VMK_AUTHORIZED_KEY": public_key},
    )
    for name, pattern in (("vmlinuz", "boot/vmlinuz-*"), ("initrd.img", "boot/initrd.img-*")):
        (only,) = root.glob(pattern)
        shutil.copyfile(only, content / name)
    shutil.copyfile(root / "etc/ssh/ssh_host_ed25519_key.pub", content / "ssh_host_ed25519_key.pub")
    raw = scratch / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
    _run("mke2fs", "-q", "-t", "ext4", "-N", "200000", "-d", str(root), str(raw))
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(content / "disk.qcow2"))
    return content


def _run(*argv: str, environment: dict[str, str] | None = None) -> None:
    result = subprocess.run(
        argv,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        output = "\n".join(result.stdout.splitlines()[-30:])
        raise BuildError(f"{argv[0]} failed with exit code {result.returncode}:\n{output}")
