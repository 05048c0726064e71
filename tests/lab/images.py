# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Making a guest's disks on the host: file systems, partition tables, loop devices."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from . import assets
from .spec import MIB, DiskSpec

PARTITION_START = MIB
BOOT_PARTITION = 64 * MIB


@dataclasses.dataclass(frozen=True)
class BootFiles:
    """What a disk with a boot loader gets on its first partition."""

    kernel: Path
    initramfs: Path
    command_line: str


def run(*argv: str | Path, stdin: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run a program of the host; its stdout. Raises RuntimeError with its stderr."""
    result = subprocess.run(
        [str(word) for word in argv], input=stdin, capture_output=True, text=True, check=False, env=env
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit code {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def make_image(disk: DiskSpec, path: Path, boot: BootFiles) -> None:
    """Create the image of ``disk`` at ``path`` (for a block disk: what its loop device will hold)."""
    if disk.backing is not None:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", disk.backing_format, "-b", disk.backing, path)
        return
    if disk.fs is None and not disk.partitioned and not disk.boot:
        _empty(disk, path)
        return
    raw = path.with_name(path.name + ".raw")
    try:
        _formatted_raw(disk, raw, boot)
        if disk.format == "raw":
            raw.rename(path)
        else:
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
            if disk.kind == "block":  # room for growth: metadata and every cluster
                with path.open("r+b") as image:
                    image.truncate(disk.size + disk.size // 64 + 4 * MIB)
    finally:
        raw.unlink(missing_ok=True)


def _empty(disk: DiskSpec, path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", disk.format, path, str(disk.size))
    if disk.kind == "block" and disk.format == "qcow2":
        with path.open("r+b") as image:
            image.truncate(disk.size + disk.size // 64 + 4 * MIB)


def _formatted_raw(disk: DiskSpec, raw: Path, boot: BootFiles) -> None:
    with raw.open("wb") as image:
        image.truncate(disk.size)
    start = 0
    if disk.boot:
        start = PARTITION_START + BOOT_PARTITION
        table = f"label: dos\nstart=1MiB, size={BOOT_PARTITION // MIB}MiB, type=c, bootable\nstart={start // MIB}MiB\n"
        run(assets.guest_assets().sfdisk, "-q", raw, stdin=table)
        _make_bootable(raw, boot)
    elif disk.partitioned:
        start = PARTITION_START
        run(assets.guest_assets().sfdisk, "-q", raw, stdin="label: gpt\nstart=1MiB, type=linux\n")
    if disk.fs is None:
        return
    if start == 0:
        _mkfs(disk.fs, raw)
        return
    inner = raw.with_name(raw.name + ".fs")
    try:
        with inner.open("wb") as image:
            image.truncate(disk.size - start - MIB)
        _mkfs(disk.fs, inner)
        _put(inner, raw, start)
    finally:
        inner.unlink(missing_ok=True)


def _put(inner: Path, raw: Path, start: int) -> None:
    run("dd", f"if={inner}", f"of={raw}", "bs=1M", f"seek={start // MIB}", "conv=notrunc,sparse", "status=none")


def _make_bootable(raw: Path, boot: BootFiles) -> None:
    """Put a FAT file system with SYSLINUX, kernel and initramfs at 1 MiB, and a boot record into the first sector."""
    loader = assets.guest_assets().loader
    environment = {"PATH": f"{loader}:/usr/bin:/bin", "MTOOLS_SKIP_CHECK": "1"}
    fat = raw.with_name(raw.name + ".fat")
    try:
        with fat.open("wb") as image:
            image.truncate(BOOT_PARTITION)
        run("/bin/busybox", "mkdosfs", fat)
        with fat.open("r+b") as image:  # where the partition starts, in sectors: the loader reads relative to it
            image.seek(28)
            image.write(struct.pack("<I", PARTITION_START // 512))
        run(loader / "syslinux", "--install", fat, env=environment)
        configuration = f"DEFAULT guest\nLABEL guest\n  KERNEL vmlinuz\n  INITRD initrd\n  APPEND {boot.command_line}\n"
        run("mcopy", "-i", fat, boot.kernel, "::vmlinuz", env=environment)
        run("mcopy", "-i", fat, boot.initramfs, "::initrd", env=environment)
        run("mcopy", "-i", fat, "-", "::syslinux.cfg", stdin=configuration, env=environment)
        _put(fat, raw, PARTITION_START)
    finally:
        fat.unlink(missing_ok=True)
    with raw.open("r+b") as image:
        image.write((loader / "mbr.bin").read_bytes()[:440])


def _mkfs(fs: str, path: Path) -> None:
    if fs == "xfs":
        run("mkfs.xfs", "-q", "-f", path)
    else:
        # Tables written now: otherwise the guest's kernel writes them in the background, into every increment.
        run("mkfs.ext4", "-q", "-F", "-i", "65536", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)


@contextlib.contextmanager
def filesystem(directory: Path, size: int) -> Iterator[Path]:
    """A small filesystem of its own below ``directory``: ext4 without extents, where fallocate is not supported."""
    image = directory / "small.img"
    with image.open("wb") as stream:
        stream.truncate(size)
    run("mkfs.ext4", "-q", "-F", "-O", "^extents,^64bit", image)
    where = directory / "small"
    where.mkdir()
    run("mount", "-o", "loop", image, where)
    try:
        where.chmod(0o755)
        yield where
    finally:
        run("umount", where)


def attach_loop(path: Path) -> str:
    """Attach ``path`` to a free loop device; its node."""
    return run("losetup", "--find", "--show", path).strip()
