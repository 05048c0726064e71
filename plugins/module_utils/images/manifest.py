# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The manifest of an image: what a bundle says of itself, as frozen dataclasses.

:func:`parse` is the only way in, and it trusts nothing: every value is checked for type and range before a dataclass exists,
unknown keys are refused, and nothing in it is a path, a command or XML (docs/image-format.md is the schema).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._errors import Refused, Unsupported
from ..safety.consistency import LEVELS
from . import strict_json

FORMAT = "vmkeeper.libvirt/image"
VERSION = 1
FILE_NAME = "manifest.json"

#: The formats that an image's disks may have, and the ending of their files.
FORMATS = {"qcow2": "qcow2", "raw": "raw", "vmdk": "vmdk", "vhdx": "vhdx"}
COMPRESSIONS = ("none", "zlib", "zstd")
ENCRYPTIONS = ("none", "luks")
BUSES = ("virtio", "scsi", "sata", "ide", "usb")
FIRMWARES = ("bios", "uefi")

#: QEMU's families of machines that keep a guest's view of its hardware; the version is the launching host's.
FAMILIES = ("q35", "pc", "virt", "s390-ccw-virtio", "pseries")

LARGEST_DISK = 1 << 46  # 64 TiB
LARGEST_MEMORY = 1 << 44  # 16 TiB
MOST_VCPUS = 4096
MOST_DISKS = 64
NVRAM_FILE = "nvram.fd"
LARGEST_NVRAM = 64 << 20  # AAVMF's variable store; OVMF's has half a MiB

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@=-]{0,99}")
_TARGET = re.compile(r"(vd|sd|hd)[a-z]{1,2}")
_DISK_FILE = re.compile(r"(vd|sd|hd)[a-z]{1,2}\.(qcow2|raw|vmdk|vhdx)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ARCH = re.compile(r"[a-z0-9_]{1,16}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\+00:00|Z)")
_SERIAL = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class ImageDisk:
    """One disk of an image. Sizes in bytes: ``virtual_size`` as the guest sees it, ``stored_size`` of ``file``,
    ``content_size`` of the same content as a plain qcow2 (what a launch will need at least).  ``serial`` is what the guest
    may know the disk by (``/dev/disk/by-id``).  ``unsealed_sha256`` is that of the content before it was sealed (see
    :func:`.conversion.content_digest`): it tells whether a stopped domain is still the one that was exported."""

    target: str
    bus: str
    file: str
    format: str
    compression: str
    virtual_size: int
    stored_size: int
    content_size: int
    sha256: str
    serial: str | None = None
    unsealed_sha256: str | None = None
    encryption: str = "none"

    def as_json(self) -> dict[str, Any]:
        """As stored."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Machine:
    """What the guest ran on, as far as another host should give it the same. ``memory`` in bytes."""

    arch: str
    family: str
    firmware: str
    vcpus: int
    memory: int
    interfaces: int

    def as_json(self) -> dict[str, Any]:
        """As stored."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Nvram:
    """The UEFI variables that travel with the image."""

    file: str
    size: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """As stored."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Source:
    """Where the image came from. For people; nothing is decided by it."""

    domain: str
    uuid: str
    snapshot: str | None

    def as_json(self) -> dict[str, Any]:
        """As stored."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Manifest:
    """A whole image. ``created`` is ISO 8601 in UTC; ``frozen_ms`` is None when nothing was frozen."""

    name: str
    created: str
    source: Source
    consistency: str
    frozen_ms: int | None
    machine: Machine
    disks: tuple[ImageDisk, ...]
    nvram: Nvram | None
    not_captured: tuple[Mapping[str, str], ...]
    tags: Mapping[str, str]
    sealed: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """As stored: the digest of these bytes is the image's identity."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "created": self.created,
            "source": self.source.as_json(),
            "consistency": self.consistency,
            "frozen_ms": self.frozen_ms,
            "machine": self.machine.as_json(),
            "disks": [disk.as_json() for disk in self.disks],
            "nvram": self.nvram.as_json() if self.nvram else None,
            "not_captured": [dict(part) for part in self.not_captured],
            "tags": dict(self.tags),
            "sealed": list(self.sealed),
        }
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def files(self) -> list[tuple[str, int, str]]:
        """``(file, size, sha256)`` of everything beside the manifest."""
        files = [(disk.file, disk.stored_size, disk.sha256) for disk in self.disks]
        if self.nvram:
            files.append((self.nvram.file, self.nvram.size, self.nvram.sha256))
        return files


class _Reader:
    """One JSON object of a manifest, read key by key; what nobody asked for is refused at the end."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise refuse(f"{where} is not an object")
        self._values = dict(value)
        self._where = where

    def take(self, key: str, check: Callable[[Any], bool], expected: str) -> Any:
        if key not in self._values:
            raise refuse(f"{self._where} has no {key!r}")
        value = self._values.pop(key)
        if not check(value):
            raise refuse(f"{key!r} of {self._where} is not {expected}")
        return value

    def text(self, key: str, pattern: re.Pattern[str]) -> str:
        return str(
            self.take(key, lambda value: isinstance(value, str) and bool(pattern.fullmatch(value)), "as expected")
        )

    def number(self, key: str, least: int, most: int) -> int:
        return int(
            self.take(key, lambda value: _whole(value) and least <= value <= most, f"between {least} and {most}")
        )

    def one_of(self, key: str, choices: tuple[str, ...] | list[str]) -> str:
        return str(
            self.take(key, lambda value: isinstance(value, str) and value in choices, "one of " + ", ".join(choices))
        )

    def items(self, key: str, most: int) -> list[Any]:
        return list(
            self.take(key, lambda value: isinstance(value, list) and len(value) <= most, f"a list of up to {most}")
        )

    def done(self) -> None:
        if self._values:
            raise refuse(f"{self._where} has an unknown key {min(self._values)[:64]!r}")


def refuse(why: str) -> Refused:
    """The error for a bundle that is not believed."""
    return Refused(
        f"The image is refused: {why}", advice="Get it again from where it was exported; do not repair it by hand"
    )


def is_serial(value: Any) -> bool:
    """What libvirt takes as a disk's serial number without changing it."""
    return isinstance(value, str) and bool(_SERIAL.fullmatch(value))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any, limit: int) -> bool:
    return isinstance(value, str) and len(value) <= limit and not _CONTROL.search(value)


def parse(content: bytes) -> Manifest:
    """The manifest in ``content``; raises :class:`Refused` for anything that is not wholly as documented."""
    value = strict_json.read(content, "The image's manifest")
    reader = _Reader(value, "the manifest")
    reader.take("format", lambda found: found == FORMAT, repr(FORMAT))
    version = reader.number("version", 1, 1 << 31)
    if version != VERSION:
        raise Unsupported(f"The image is of format version {version}", advice="Import it with a newer vmkeeper.libvirt")
    disks = tuple(_disk(item) for item in reader.items("disks", MOST_DISKS))
    if not disks:
        raise refuse("it has no disk")
    for names in ([disk.target for disk in disks], [disk.file for disk in disks]):
        if len(set(names)) != len(names):
            raise refuse("two of its disks have the same name")
    manifest = Manifest(
        name=reader.text("name", _NAME),
        created=reader.text("created", _TIME),
        source=_source(reader.take("source", lambda found: True, "")),
        consistency=reader.one_of("consistency", LEVELS),
        frozen_ms=reader.take(
            "frozen_ms", lambda found: found is None or (_whole(found) and 0 <= found < 1 << 40), "milliseconds"
        ),
        machine=_machine(reader.take("machine", lambda found: True, "")),
        disks=disks,
        nvram=_nvram(reader.take("nvram", lambda found: True, "")),
        not_captured=tuple(_left_out(item) for item in reader.items("not_captured", 1024)),
        tags=_tags(reader.take("tags", lambda found: isinstance(found, dict) and len(found) <= 256, "a dictionary")),
        sealed=tuple(_sealed(item) for item in reader.items("sealed", 64)),
    )
    reader.done()
    return manifest


def _disk(value: Any) -> ImageDisk:
    reader = _Reader(value, "a disk")
    disk = ImageDisk(
        target=reader.text("target", _TARGET),
        bus=reader.one_of("bus", BUSES),
        file=reader.text("file", _DISK_FILE),
        format=reader.one_of("format", list(FORMATS)),
        compression=reader.one_of("compression", COMPRESSIONS),
        virtual_size=reader.number("virtual_size", 512, LARGEST_DISK),
        stored_size=reader.number("stored_size", 1, LARGEST_DISK * 2),
        content_size=reader.number("content_size", 0, LARGEST_DISK * 2),
        sha256=reader.text("sha256", _SHA256),
        serial=reader.take("serial", lambda found: found is None or is_serial(found), "a serial number"),
        encryption=reader.one_of("encryption", ENCRYPTIONS),
        unsealed_sha256=reader.take("unsealed_sha256", lambda found: found is None or _is_sha256(found), "a digest"),
    )
    reader.done()
    if disk.file != f"{disk.target}.{FORMATS[disk.format]}":
        raise refuse(f"disk {disk.target} is said to be {disk.format} and lies in {disk.file}")
    if disk.encryption != "none" and (disk.format != "qcow2" or disk.compression != "none"):
        raise refuse(f"disk {disk.target} is said to be encrypted and {disk.format}, {disk.compression}")
    if disk.virtual_size % 512:
        raise refuse(f"the size of disk {disk.target} is not a multiple of 512")
    return disk


def _machine(value: Any) -> Machine:
    reader = _Reader(value, "the machine")
    machine = Machine(
        arch=reader.text("arch", _ARCH),
        family=reader.one_of("family", FAMILIES),
        firmware=reader.one_of("firmware", FIRMWARES),
        vcpus=reader.number("vcpus", 1, MOST_VCPUS),
        memory=reader.number("memory", 1 << 20, LARGEST_MEMORY),
        interfaces=reader.number("interfaces", 0, 32),
    )
    reader.done()
    return machine


def _nvram(value: Any) -> Nvram | None:
    if value is None:
        return None
    reader = _Reader(value, "the UEFI variables")
    nvram = Nvram(
        file=reader.one_of("file", (NVRAM_FILE,)),
        size=reader.number("size", 1, LARGEST_NVRAM),
        sha256=reader.text("sha256", _SHA256),
    )
    reader.done()
    return nvram


def _source(value: Any) -> Source:
    reader = _Reader(value, "the source")
    source = Source(
        domain=reader.take("domain", lambda found: _plain(found, 256), "a name"),
        uuid=reader.text("uuid", _UUID),
        snapshot=reader.take("snapshot", lambda found: found is None or _plain(found, 256), "a name"),
    )
    reader.done()
    return source


def _left_out(value: Any) -> Mapping[str, str]:
    reader = _Reader(value, "a part that was not captured")
    part = {
        key: reader.take(key, lambda found: _plain(found, 4096), "a text") for key in ("kind", "name", "reason", "why")
    }
    reader.done()
    return part


def _sealed(value: Any) -> str:
    """The name of an operation. A newer version may know more of them, and none of them decides anything here."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise refuse("the name of an operation that sealed it is not a name")
    return value


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _tags(value: Mapping[str, Any]) -> Mapping[str, str]:
    for key, text in value.items():
        if not _NAME.fullmatch(key) or not isinstance(text, str) or len(text) > 1024:
            raise refuse("a tag is not a short text")
    return dict(value)
