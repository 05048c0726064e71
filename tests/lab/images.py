# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Making a guest's disks on the host: file systems, partition tables, loop devices."""

from __future__ import annotations

import subprocess
from pathlib import Path

from . import assets
from .spec import MIB, DiskSpec

PARTITION_START = MIB


def run(*argv: str | Path, stdin: str | None = None) -> str:
    """Run a program of the host; its stdout. Raises RuntimeError with its stderr."""
    result = subprocess.run([str(word) for word in argv], input=stdin, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit code {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def make_image(disk: DiskSpec, path: Path) -> None:
    """Create the image of ``disk`` at ``path`` (for a block disk: what its loop device will hold)."""
    if disk.backing is not None:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", disk.backing_format, "-b", disk.backing, path)
        return
    if disk.fs is None and not disk.partitioned:
        _empty(disk, path)
        return
    raw = path.with_name(path.name + ".raw")
    try:
        _formatted_raw(disk, raw)
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


def _formatted_raw(disk: DiskSpec, raw: Path) -> None:
    with raw.open("wb") as image:
        image.truncate(disk.size)
    if not disk.partitioned:
        if disk.fs:
            _mkfs(disk.fs, raw)
        return
    run(assets.guest_assets().sfdisk, "-q", raw, stdin="label: gpt\nstart=1MiB, type=linux\n")
    if disk.fs is None:
        return
    inner = raw.with_name(raw.name + ".fs")
    try:
        with inner.open("wb") as image:
            image.truncate(disk.size - PARTITION_START - MIB)
        _mkfs(disk.fs, inner)
        run("dd", f"if={inner}", f"of={raw}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    finally:
        inner.unlink(missing_ok=True)


def _mkfs(fs: str, path: Path) -> None:
    if fs == "xfs":
        run("mkfs.xfs", "-q", "-f", path)
    else:
        # Tables written now: otherwise the guest's kernel writes them in the background, into every increment.
        run("mkfs.ext4", "-q", "-F", "-i", "65536", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)


def attach_loop(path: Path) -> str:
    """Attach ``path`` to a free loop device; its node."""
    return run("losetup", "--find", "--show", path).strip()
