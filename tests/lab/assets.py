# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The tiny guest: Debian's cloud kernel and an initramfs, built once and cached by a hash of what went in.

The cache is ``$VMK_LAB_CACHE``, else ``.cache/lab`` of the checkout. Packages are fetched with
``apt-get download`` and unpacked there, never installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "guestfs"

_KEPT_SECONDS = 14 * 24 * 3600  # a built guest that nobody has used for so long goes

_KERNEL_META = "linux-image-cloud-amd64"
# Fetched, not installed: partition tools that the guest has and a hypervisor may lack, and a boot loader for disks.
_TOOL_PACKAGES = ("fdisk", "cloud-guest-utils", "syslinux", "syslinux-common", "mtools")
# Installed on the host and copied into the guest.
_HOST_PACKAGES = ("busybox-static", "e2fsprogs", "xfsprogs", "qemu-guest-agent", "gcc", "libc6-dev", "util-linux")

_MODULES = [
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio_mem",
    "virtio_rng",
    "sd_mod",
    "sr_mod",
    "xfs",
    "button",
    "evdev",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "isofs",
    "loop",
    "ata_piix",
    "ahci",
    "crc32c_generic",
    "libcrc32c",
    "dm_mod",
    "virtio_vsock",
    "vmw_vsock_virtio_transport",
]

# Programs of the host that the guest gets, with the shared libraries that they name.
_PROGRAMS = (
    "/usr/sbin/qemu-ga",
    "/sbin/resize2fs",
    "/sbin/e2fsck",
    "/sbin/mke2fs",
    "/sbin/tune2fs",
    "/sbin/dumpe2fs",
    "/usr/sbin/xfs_growfs",
    "/usr/sbin/xfs_io",
    "/sbin/xfs_repair",
    "/sbin/mkfs.xfs",
    "/sbin/blkid",
    "/usr/bin/lsblk",
    "/usr/bin/findmnt",
    "/usr/sbin/fsfreeze",
    "/usr/bin/partx",
    "/usr/bin/flock",
)
_FROM_PACKAGES = ("sbin/sfdisk", "usr/bin/growpart")


class AssetError(RuntimeError):
    """The guest cannot be built; the message says what is missing and how to get it."""


@dataclasses.dataclass(frozen=True)
class Assets:
    """What a guest boots from."""

    kernel: Path
    initramfs: Path
    sfdisk: Path
    """Runs on the host: not every host has the fdisk package."""
    loader: Path
    """A directory with the programs ``syslinux`` and ``mcopy`` and the master boot record ``mbr.bin``."""
    digest: str


def cache_directory() -> Path:
    """Where built guests are kept: ``$VMK_LAB_CACHE`` or ``.cache/lab`` of the checkout."""
    configured = os.environ.get("VMK_LAB_CACHE")
    return Path(configured) if configured else HERE.parent.parent / ".cache" / "lab"


@functools.cache
def guest_assets() -> Assets:
    """The kernel and initramfs, built if the cache has none for today's inputs.

    Safe to call from several processes at once: one builds, the others wait. Raises AssetError.
    """
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        packages = _fetched_packages(cache / "debs")
        digest = _digest(packages)
        directory = cache / f"guest-{digest}"
        if not directory.exists():
            _build(directory, packages)
            _forget_old(cache)
        os.utime(directory)
    return Assets(directory / "vmlinuz", directory / "initramfs", directory / "sfdisk", directory / "loader", digest)


def _forget_old(cache: Path) -> None:
    for directory in cache.glob("guest-*"):
        if time.time() - directory.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(directory)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file of the cache."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _digest(packages: list[Path]) -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.iterdir(), Path(__file__)]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for package in packages:
        digest.update(package.name.encode() + b"\0")
    versions = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n", *_HOST_PACKAGES],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    ).stdout
    missing = [
        name for name in _HOST_PACKAGES if not re.search(rf"^{name} .* installed$".encode(), versions, re.MULTILINE)
    ]
    if missing:
        raise AssetError(
            f"the lab's guest is built from packages that are missing: apt-get install {' '.join(missing)}"
        )
    digest.update(versions)
    return digest.hexdigest()[:16]


# --- packages ----------------------------------------------------------------------------------------


def _fetched_packages(directory: Path) -> list[Path]:
    """The .deb files of the kernel and the tools, downloaded on first use and then left alone."""
    directory.mkdir(exist_ok=True)
    found = []
    for name in (_kernel_package(directory), *_TOOL_PACKAGES):
        present = sorted(directory.glob(f"{name}_*.deb"))
        if not present:
            _download(name, directory)
            present = sorted(directory.glob(f"{name}_*.deb"))
        found.append(present[-1])
    return found


def kernel_package(cache: Path) -> Path:
    """The .deb file of the lab's kernel, with all of its modules."""
    with locked(cache / "lock"):
        return _fetched_packages(cache / "debs")[0]


def _kernel_package(directory: Path) -> str:
    present = sorted(directory.glob("linux-image-*-cloud-amd64_*.deb"))
    if present:
        return present[-1].name.split("_")[0]
    for _attempt in _before_and_after_an_update():
        listing = _apt("apt-cache", "depends", _KERNEL_META).stdout
        match = re.search(r"Depends: (linux-image-\S+)", listing)
        if match:
            return match.group(1)
    raise AssetError(f"apt knows no {_KERNEL_META}, from which the lab's guest has its kernel")


def _download(name: str, directory: Path) -> None:
    for _attempt in _before_and_after_an_update():
        result = _apt("apt-get", "download", "-q", name, directory=directory)
        if result.returncode == 0:
            return
    raise AssetError(f"cannot download the package {name} for the lab's guest: {result.stdout.strip()}")


def _before_and_after_an_update() -> Iterator[None]:
    """Try with apt's lists as they are; lists that are missing or name what the archive no longer has are renewed once."""
    yield
    _apt("apt-get", "update", "-q")
    yield


def _apt(*command: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


# --- build -------------------------------------------------------------------------------------------


def _build(directory: Path, packages: list[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="building-") as scratch_name:
        scratch = Path(scratch_name)
        unpacked = scratch / "packages"
        for package in packages:
            subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
        root = scratch / "root"
        _lay_root(root, unpacked)
        result = scratch / "result"
        result.mkdir()
        kernel = next((unpacked / "boot").glob("vmlinuz-*"))
        shutil.copy(kernel, result / "vmlinuz")
        shutil.copy(unpacked / "sbin/sfdisk", result / "sfdisk")
        loader = result / "loader"
        loader.mkdir()
        for name in ("usr/bin/syslinux", "usr/bin/mtools", "usr/lib/syslinux/mbr/mbr.bin"):
            shutil.copy(unpacked / name, loader)
        for name in ("mcopy", "mattrib", "mmove"):
            (loader / name).symlink_to("mtools")
        (result / "initramfs").write_bytes(cpio(_tree(root)))
        result.rename(directory)


def _lay_root(root: Path, unpacked: Path) -> None:
    for name in [
        "bin",
        "sbin",
        "usr/bin",
        "usr/sbin",
        "lab",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "disk",
        "etc/qemu/fsfreeze-hook.d",
    ]:
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    applets = subprocess.run(["/bin/busybox", "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("/bin/busybox")
    programs = [Path(name) for name in _PROGRAMS] + [unpacked / name for name in _FROM_PACKAGES]
    for program in programs:
        destination = root / "usr/sbin" / program.name
        (root / "bin" / program.name).unlink(missing_ok=True)
        shutil.copy(program, destination)
        for library in _libraries(program):
            placed = root / library.relative_to("/")
            placed.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, placed)
    for name in ("mkfs.ext4", "mkfs.ext3"):
        (root / "usr/sbin" / name).symlink_to("mke2fs")
    _copy_modules(root, unpacked)
    for name in ("labwriter", "labagent"):
        subprocess.run(
            ["gcc", "-static", "-O2", "-Wall", "-o", str(root / "lab" / name), str(SOURCES / f"{name}.c")], check=True
        )
    places = {"init": "init", "fsfreeze-hook": "etc/qemu/fsfreeze-hook", "shutdown": "sbin/shutdown"}
    for source in SOURCES.iterdir():
        if source.suffix != ".c":
            placed = root / places.get(source.name, f"lab/{source.name}")
            shutil.copy(source, placed)
            placed.chmod(0o755)
    (root / "sbin/modprobe").symlink_to("/bin/busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/os-release").write_text('ID=vmkeeper-lab\nPRETTY_NAME="vmkeeper lab guest"\n')
    (root / "etc/mtab").symlink_to("/proc/self/mounts")


def _libraries(program: Path) -> list[Path]:
    output = subprocess.run(
        ["ldd", str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    ).stdout
    return [Path(match) for match in re.findall(r"(/\S+) \(0x", output)]


def _copy_modules(root: Path, unpacked: Path) -> None:
    tree = next((unpacked / "lib/modules").iterdir())
    by_name = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    wanted = [name for name in _MODULES if name in by_name]  # the rest is built in
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        source = by_name[name]
        placed = root / "lib/modules" / tree.name / source.relative_to(tree)
        placed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, placed)
        depends = re.search(rb"\0depends=([^\0]*)\0", source.read_bytes())
        if depends:
            wanted += [needed.replace("-", "_") for needed in depends.group(1).decode().split(",") if needed]
    for name in ("modules.builtin", "modules.order"):
        shutil.copy(tree / name, root / "lib/modules" / tree.name / name)
    subprocess.run(["/bin/busybox", "depmod", "-b", str(root), tree.name], check=True)


# --- cpio --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CpioEntry:
    """One file, directory or symbolic link of an initramfs."""

    mode: int
    data: bytes = b""


def _tree(root: Path) -> dict[str, CpioEntry]:
    entries: dict[str, CpioEntry] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            entries[name] = CpioEntry(status.st_mode, os.readlink(path).encode())
        elif stat.S_ISDIR(status.st_mode):
            entries[name] = CpioEntry(status.st_mode)
        else:
            entries[name] = CpioEntry(status.st_mode, path.read_bytes())
    return entries


def extra_files(files: Mapping[str, bytes]) -> bytes:
    """A cpio archive of executable files (absolute path -> content), to be appended to the initramfs."""
    entries: dict[str, CpioEntry] = {}
    for path, data in sorted(files.items()):
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts)):
            entries["/".join(parts[:depth])] = CpioEntry(stat.S_IFDIR | 0o755)
        entries["/".join(parts)] = CpioEntry(stat.S_IFREG | 0o755, data)
    return cpio(entries)


def cpio(entries: Mapping[str, CpioEntry]) -> bytes:
    """A "newc" cpio archive (the kernel's initramfs format), everything owned by root."""
    archive = bytearray()
    for number, (name, entry) in enumerate([*entries.items(), ("TRAILER!!!", CpioEntry(0))], start=1):
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name.encode()) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += b"\0" * (-len(archive) % 4)
        archive += entry.data
        archive += b"\0" * (-len(archive) % 4)
    archive += b"\0" * (-len(archive) % 512)
    return bytes(archive)
