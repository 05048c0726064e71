# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hostile bundles against the real module, with canaries that no import may touch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

from . import tasks

MIB = 1 << 20
CANARY = "the canary's own words"
KEY = "correct horse battery"


@functools.cache
def encrypted_disk() -> bytes:
    """A qcow2 of 4 MiB that :data:`KEY` opens."""
    with tempfile.TemporaryDirectory() as work:
        key, disk = Path(work) / "key", Path(work) / "disk"
        key.write_text(KEY)
        options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=50"
        secret = ["--object", f"secret,id=key,file={key}", "-o", options]

        def is_made() -> bool:
            create = ["qemu-img", "create", "-q", "-f", "qcow2", *secret, disk, "4M"]
            return subprocess.run(create, capture_output=True, check=False).returncode == 0

        until(is_made, "QEMU measuring how fast this host is")  # which it cannot do every time on a busy one
        return disk.read_bytes()


class Bundle:
    """A valid bundle of one small disk, to be spoiled."""

    def __init__(self, path: Path, canary: Path) -> None:
        self.path = path
        self.canary = canary
        path.mkdir(mode=0o700)
        self.disk = path / "vda.qcow2"
        self.qemu_img("create", "-q", "-f", "qcow2", self.disk, "4M")
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", self.disk], check=True, capture_output=True)
        self.manifest: dict[str, Any] = {
            "format": "vmkeeper.libvirt/image", "version": 1, "name": "bad", "created": "2026-01-01T00:00:00+00:00",
            "source": {"domain": "web", "uuid": "00000000-0000-4000-8000-000000000001", "snapshot": None},
            "consistency": "offline", "frozen_ms": None,
            "machine": {
                "arch": "x86_64", "family": "q35", "firmware": "bios", "vcpus": 1, "memory": 128 * MIB, "interfaces": 0,
            },
            "disks": [{
                "target": "vda", "bus": "virtio", "file": "vda.qcow2", "format": "qcow2", "compression": "none",
                "virtual_size": 4 * MIB, "stored_size": 0, "content_size": MIB, "sha256": "", "serial": None,
                "encryption": "none", "unsealed_sha256": None,
            }],
            "nvram": None, "not_captured": [], "tags": {}, "sealed": [],
        }  # fmt: skip
        self.text: bytes | None = None
        self.passphrase: str | None = None
        self.is_summed = True

    @property
    def entry(self) -> dict[str, Any]:
        return self.manifest["disks"][0]

    def qemu_img(self, *arguments: object) -> None:
        subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)

    def use(self, image_format: str) -> Path:
        """Make the disk another format's."""
        self.disk.unlink(missing_ok=True)
        self.disk = self.path / f"vda.{image_format}"
        self.entry.update(format=image_format, file=self.disk.name)
        return self.disk

    def patch(self, offset: int, content: bytes) -> None:
        with self.disk.open("r+b") as stream:
            stream.seek(offset)
            stream.write(content)

    def encrypt(self) -> None:
        """Make the disk one that :data:`KEY` opens, and say so everywhere."""
        self.disk.write_bytes(encrypted_disk())
        self.entry["encryption"] = "luks"
        self.passphrase = KEY

    def patch_luks(self, offset: int, content: bytes) -> None:
        """Change the LUKS header, which is encrypted with nothing."""
        extension = self.disk.read_bytes().index(struct.pack(">II", 0x0537BE77, 16))
        (start,) = struct.unpack_from(">Q", self.disk.read_bytes(), extension + 8)
        self.patch(start + offset, content)

    def write(self) -> None:
        """The manifest with the true size and sum of the disk, so that only the disk itself is at fault."""
        if self.is_summed and self.disk.is_file():
            content = self.disk.read_bytes()
            self.entry.update(stored_size=len(content), sha256=hashlib.sha256(content).hexdigest())
        text = self.text if self.text is not None else json.dumps(self.manifest).encode()
        if not (self.path / "manifest.json").is_symlink():
            (self.path / "manifest.json").write_bytes(text)


Spoil = Callable[[Bundle], None]
CLASSES: dict[str, tuple[Spoil, str]] = {}


def hostile(why: str) -> Callable[[Spoil], Spoil]:
    """Register one class; ``why`` is in the refusal."""

    def register(spoil: Spoil) -> Spoil:
        CLASSES[spoil.__name__] = (spoil, why)
        return spoil

    return register


@hostile("stands on another file")
def backing_file(bundle: Bundle) -> None:
    bundle.qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", bundle.canary, bundle.disk, "4M")


@hostile("stands on another file")
def backing_json(bundle: Bundle) -> None:
    name = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(bundle.canary)}})
    bundle.qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", f"json:{name}", bundle.disk, "4M")


@hostile("stands on another file")
def backing_nbd(bundle: Bundle) -> None:
    name = f"nbd+unix:///x?socket={bundle.canary}.sock"
    bundle.qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, bundle.disk, "4M")


@hostile("its data lies in another file")
def data_file(bundle: Bundle) -> None:
    other = bundle.path.parent / "data"
    bundle.disk.unlink()
    bundle.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={other},data_file_raw=on", bundle.disk, "4M")
    other.unlink()
    os.link(bundle.canary, other)


@hostile("sparse extent")
def vmdk_descriptor(bundle: Bundle) -> None:
    bundle.use("vmdk").write_text(
        f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 8192 FLAT "{bundle.canary}" 0\n'
    )


@hostile("made of other files")
def vmdk_embedded_extent(bundle: Bundle) -> None:
    disk = bundle.use("vmdk")
    bundle.qemu_img("create", "-q", "-f", "vmdk", disk, "4M")
    content = disk.read_bytes().replace(b'"monolithicSparse"', b'"monolithicFlat"  ')
    disk.write_bytes(content)


@hostile("out of range")
def vmdk_without_capacity(bundle: Bundle) -> None:
    bundle.qemu_img("create", "-q", "-f", "vmdk", bundle.use("vmdk"), "4M")
    bundle.patch(12, bytes(8))


@hostile("stands on another file")
def vmdk_parent(bundle: Bundle) -> None:
    disk = bundle.use("vmdk")
    bundle.qemu_img("create", "-q", "-f", "vmdk", disk, "4M")
    disk.write_bytes(disk.read_bytes().replace(b"parentCID=ffffffff", b"parentCID=00000001"))


@hostile("it is not a qcow2 image")
def lying_format(bundle: Bundle) -> None:
    other = bundle.path / "other.vmdk"
    bundle.qemu_img("create", "-q", "-f", "vmdk", other, "4M")
    other.rename(bundle.disk)


@hostile("as expected")
def traversal(bundle: Bundle) -> None:
    bundle.entry["file"] = "../canary"


@hostile("as expected")
def absolute_path(bundle: Bundle) -> None:
    bundle.entry["file"] = str(bundle.canary)


@hostile("not a regular file")
def symbolic_link(bundle: Bundle) -> None:
    bundle.disk.unlink()
    bundle.disk.symlink_to(bundle.canary)
    content = bundle.canary.read_bytes()
    bundle.entry.update(stored_size=len(content), sha256=hashlib.sha256(content).hexdigest())
    bundle.is_summed = False


@hostile("hard link")
def hard_link(bundle: Bundle) -> None:
    bundle.disk.unlink()
    os.link(bundle.canary, bundle.disk)


@hostile("not a regular file")
def fifo(bundle: Bundle) -> None:
    bundle.disk.unlink()
    os.mkfifo(bundle.disk)
    bundle.entry.update(stored_size=1, sha256="0" * 64)


@hostile("not a regular file")
def device_node(bundle: Bundle) -> None:
    bundle.disk.unlink()
    os.mknod(bundle.disk, 0o20600, os.makedev(1, 5))  # /dev/zero
    bundle.entry.update(stored_size=1, sha256="0" * 64)


@hostile("not a regular file")
def manifest_link(bundle: Bundle) -> None:
    (bundle.path / "manifest.json").symlink_to(bundle.canary)


@hostile("declared size")
def bomb(bundle: Bundle) -> None:
    """Ten thousand times its size once unpacked, and it says otherwise."""
    raw = bundle.path.parent / "raw"
    with raw.open("wb") as stream:
        for _piece in range(64):
            stream.write(b"\1" * MIB)
    bundle.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, bundle.disk)
    raw.unlink()
    bundle.entry.update(virtual_size=64 * MIB, content_size=MIB)


@hostile("the manifest says")
def another_size(bundle: Bundle) -> None:
    bundle.entry["virtual_size"] = 8 * MIB


@hostile("sha256 or size differs")
def wrong_sum(bundle: Bundle) -> None:
    bundle.write()
    bundle.entry["sha256"] = "0" * 64
    bundle.is_summed = False


@hostile("cluster size is out of range")
def oversized_cluster(bundle: Bundle) -> None:
    bundle.patch(20, struct.pack(">I", 63))


@hostile("does not know")
def unknown_feature(bundle: Bundle) -> None:
    bundle.patch(72, struct.pack(">Q", 1 << 40))


@hostile("is not JSON")
def xml_in_place_of_json(bundle: Bundle) -> None:
    """A definition with an entity bomb, a command line and a host's path: there is no reader for one."""
    bundle.text = b'<!DOCTYPE d [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><domain type="kvm">&b;</domain>'


@hostile("unknown key")
def qemu_commandline(bundle: Bundle) -> None:
    bundle.manifest["qemu_commandline"] = ["-chardev", f"file,id=x,path={bundle.canary}"]


@hostile("unknown key")
def emulator(bundle: Bundle) -> None:
    bundle.manifest["machine"]["emulator"] = str(bundle.canary)


@hostile("unknown key")
def loader(bundle: Bundle) -> None:
    bundle.manifest["machine"]["loader"] = str(bundle.canary)


@hostile("unknown key")
def host_device(bundle: Bundle) -> None:
    bundle.manifest["hostdevs"] = ["0000:00:1f.2"]


@hostile("unknown key")
def script(bundle: Bundle) -> None:
    bundle.entry["script"] = f"rm {bundle.canary}"


@hostile("not one of")
def xml_in_a_text(bundle: Bundle) -> None:
    bundle.manifest["machine"]["family"] = f"q35'/><loader>{bundle.canary}</loader><x y='"


@hostile("out of range")
def oversized_number(bundle: Bundle) -> None:
    bundle.write()
    bundle.text = json.dumps(bundle.manifest).replace(str(128 * MIB), "9" * 5000).encode()


@hostile("is there twice")
def duplicate_keys(bundle: Bundle) -> None:
    bundle.write()
    bundle.text = json.dumps(bundle.manifest).replace('"target"', '"file": "../canary", "target"').encode()


@hostile("nested deeper")
def nesting(bundle: Bundle) -> None:
    bundle.text = b"[" * 100_000


@hostile("larger than")
def endless_manifest(bundle: Bundle) -> None:
    bundle.text = b" " * (2 * MIB)


#: Offsets in a LUKS header of version 1 (see the specification), and the size of a key slot.
KEY_BYTES, MASTER_ROUNDS, SLOTS, SLOT = 108, 164, 208, 48
SLOT_ON = struct.pack(">I", 0x00AC71F3)


@hostile("is encrypted")
def luks_and_nobody_gave_a_passphrase(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.passphrase = None


@hostile("the passphrase does not open it")
def luks_of_another_passphrase(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.passphrase = "another passphrase"


@hostile("the passphrase does not open it")
def luks_with_spoiled_key_material(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(4096, b"\xff" * 4096)


@hostile("the manifest says none")
def luks_that_the_manifest_denies(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.entry["encryption"] = "none"


@hostile("its encryption is none")
def plaintext_that_says_it_is_encrypted(bundle: Bundle) -> None:
    bundle.entry["encryption"] = "luks"
    bundle.passphrase = KEY


@hostile("of an unknown kind")
def encryption_that_qemu_gave_up(bundle: Bundle) -> None:
    bundle.patch(32, struct.pack(">I", 1))
    bundle.entry["encryption"] = "luks"
    bundle.passphrase = KEY


@hostile("stands on another file")
def luks_over_a_backing_file(bundle: Bundle) -> None:
    bundle.encrypt()
    content = bundle.disk.read_bytes()
    name = str(bundle.canary).encode()
    bundle.patch(8, struct.pack(">QI", 60000, len(name)))
    bundle.patch(60000, name)
    assert len(content) > 60000 + len(name)


@hostile("has no LUKS header")
def luks_without_a_header(bundle: Bundle) -> None:
    bundle.patch(32, struct.pack(">I", 2))
    bundle.entry["encryption"] = "luks"
    bundle.passphrase = KEY


@hostile("outside of the file")
def luks_header_past_the_end(bundle: Bundle) -> None:
    bundle.encrypt()
    extension = bundle.disk.read_bytes().index(struct.pack(">II", 0x0537BE77, 16))
    bundle.patch(extension + 8, struct.pack(">Q", 1 << 40))


@hostile("not one of version 1")
def luks_header_that_is_something_else(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(0, b"SKUL")


@hostile("none that QEMU makes")
def luks_that_encrypts_nothing(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(8, b"cipher_null".ljust(32, b"\0") + b"ecb".ljust(32, b"\0"))


@hostile("rounds of key derivation")
def luks_that_calculates_for_hours(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(SLOTS + 4, b"\xff" * 4)


@hostile("rounds of key derivation")
def luks_whose_master_key_calculates_for_hours(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(MASTER_ROUNDS, b"\xff" * 4)


@hostile("rounds of key derivation")
def luks_with_every_slot_in_use(bundle: Bundle) -> None:
    """Each alone would be bearable."""
    bundle.encrypt()
    for slot in range(8):
        bundle.patch_luks(SLOTS + slot * SLOT, SLOT_ON + struct.pack(">I", 1 << 24))


@hostile("key slot is out of range")
def luks_with_a_gigantic_key(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(SLOTS + 44, b"\xff" * 4)  # stripes: that many copies of the key in memory


@hostile("out of range")
def luks_with_a_key_of_gigabytes(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(KEY_BYTES, b"\x7f" + b"\xff" * 3)


@hostile("key slot is out of range")
def luks_with_a_key_outside_of_its_header(bundle: Bundle) -> None:
    bundle.encrypt()
    bundle.patch_luks(SLOTS + 40, b"\x7f" + b"\xff" * 3)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file and a listening socket beside it; neither may have been touched in the end."""
    path = tmp_path / "canary"
    path.write_text(CANARY + "\n" * (4096 - len(CANARY)))
    path.chmod(0o600)
    os.utime(path, ns=(10**9, 10**9))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.sock")
        listener.listen(1)
        listener.settimeout(0)
        links = path.stat().st_nlink
        yield path
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert path.read_text().startswith(CANARY)
    status = path.stat()
    assert (status.st_mtime_ns, status.st_uid, status.st_mode & 0o777, links) == (10**9, 0, 0o600, 1)


def test_a_bundle_that_nobody_spoiled_is_accepted(
    host: TestHost, tmp_path: Path, canary: Path, launched: list[str]
) -> None:
    bundle = Bundle(tmp_path / "bundle", canary)
    bundle.write()
    launched.append("lab-good")
    assert tasks.ok("import_image", src=str(bundle.path), domain="lab-good", virt_type="qemu").changed


def test_an_encrypted_bundle_that_nobody_spoiled_is_accepted(
    host: TestHost, tmp_path: Path, canary: Path, launched: list[str]
) -> None:
    bundle = Bundle(tmp_path / "bundle", canary)
    bundle.encrypt()
    bundle.write()
    launched.append("lab-good")
    options = {"src": str(bundle.path), "domain": "lab-good", "virt_type": "qemu"}
    assert tasks.ok("import_image", passphrase=KEY, **options).changed


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_hostile_bundle_is_refused_and_leaves_nothing(
    host: TestHost, tmp_path: Path, canary: Path, name: str
) -> None:
    bundle = Bundle(tmp_path / "bundle", canary)
    spoil, why = CLASSES[name]
    spoil(bundle)
    bundle.write()
    before = canary.stat().st_atime_ns
    images = Path("/var/lib/libvirt/images")
    present = sorted(images.iterdir())
    options = {"src": str(bundle.path), "domain": "lab-bad", "virt_type": "qemu", "passphrase": bundle.passphrase}
    tasks.refused("import_image", why, **options)
    assert canary.stat().st_atime_ns == before
    assert sorted(images.iterdir()) == present
    connection = host.connect()
    assert "lab-bad" not in [domain.name() for domain in connection.listAllDomains()]
    connection.close()
    assert not list(Path("/var/lib/vmkeeper.libvirt/journal").iterdir())
    shutil.rmtree(bundle.path)


def test_there_are_at_least_twenty_five_classes() -> None:
    assert len(CLASSES) >= 25
