# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A lab guest that boots from its own disk, so that an image of it can be launched anywhere.

GRUB lies before the first partition, kernel and initramfs in the ext4 of that partition; nothing is mounted to make it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

from lab import assets
from lab.guest import Guest
from lab.images import run
from lab.spec import MIB, DiskSpec, GuestSpec, command_line

GRUB = Path("/usr/lib/grub/i386-pc")
SECTOR = 512


def make_bootable(guest: Guest) -> None:
    """Call after ``define()``: put a boot loader on the guest's first disk, and take its kernel out of the definition."""
    spec = guest.spec
    disk = spec.disks[0]
    assert disk.partitioned
    assert disk.format == "qcow2"
    work = guest.directory / "boot"
    work.mkdir()
    try:
        _write_disk(spec, disk, work, guest.images[disk.target])
    finally:
        shutil.rmtree(work)
    root = guest.xml(inactive=True)
    system = root.find("os")
    assert system is not None
    for tag in ("kernel", "initrd", "cmdline"):
        element = system.find(tag)
        if element is not None:
            system.remove(element)
    guest.connection().defineXML(ElementTree.tostring(root, encoding="unicode"))


def _write_disk(spec: GuestSpec, disk: DiskSpec, work: Path, image: Path) -> None:
    built = assets.guest_assets()
    tree = work / "tree"
    tree.mkdir()
    shutil.copyfile(built.kernel, tree / "vmlinuz")
    shutil.copyfile(built.initramfs, tree / "initramfs")
    inner = work / "fs"
    with inner.open("wb") as stream:
        stream.truncate(disk.size - 2 * MIB)
    run("mkfs.ext4", "-q", "-F", "-i", "65536", "-O", "^metadata_csum_seed,^orphan_file", "-E",
        "lazy_itable_init=0,lazy_journal_init=0", "-d", tree, inner)  # fmt: skip
    raw = work / "raw"
    with raw.open("wb") as stream:
        stream.truncate(disk.size)
    run(built.sfdisk, "-q", raw, stdin="label: dos\nstart=1MiB, type=83, bootable\n")
    config = work / "grub.cfg"
    line = command_line(spec)
    config.write_text(f"set root=(hd0,msdos1)\nlinux /vmlinuz {line}\ninitrd /initramfs\nboot\n", encoding="ascii")
    core = work / "core.img"
    modules = ("biosdisk", "part_msdos", "ext2", "linux", "boot")
    run("grub-mkimage", "-O", "i386-pc", "-p", "/", "-c", config, "-o", core, *modules)
    with raw.open("r+b") as stream:
        stream.write((GRUB / "boot.img").read_bytes()[:440])
        stream.seek(SECTOR)
        content = core.read_bytes()
        assert len(content) < MIB - SECTOR
        stream.write(content)
    run("dd", f"if={inner}", f"of={raw}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
