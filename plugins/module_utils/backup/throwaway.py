# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A definition made harmless: the same guest, with nothing that reaches the host, a network or the original. Pure.

What the guest boots from and is booted by stays; what connects it to anything goes, or is there and leads nowhere.
"""

from __future__ import annotations

from collections.abc import Collection
from xml.etree import ElementTree

from ..hypervisor.domain_model import AGENT_CHANNEL

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"

#: Of the domain: tuning for the original's place on its host, raw QEMU options, labels, other programs' notes.
_NOT_NEEDED = (
    "metadata",
    "cputune",
    "numatune",
    "blkiotune",
    "memtune",
    "memoryBacking",
    "resource",
    "seclabel",
    "idmap",
    "perf",
    f"{_QEMU}commandline",
    f"{_QEMU}override",
    f"{_QEMU}capabilities",
)

#: Devices that lead out of the guest, or hold state of the original.
_NOT_HARMLESS = (
    "interface",
    "hostdev",
    "filesystem",
    "redirdev",
    "redirfilter",
    "smartcard",
    "shmem",
    "tpm",
    "sound",
    "audio",
    "graphics",
    "parallel",
    "vsock",
    "lease",
    "crypto",
    "nvram",
)

#: Drives stay, without a medium.
_DRIVES = ("cdrom", "floppy")


def throw_away(xml: str, title: str, disks: Collection[str]) -> str:
    """The definition for a guest that is started once, looked at and destroyed. Its identity is that of ``xml``.

    ``disks`` are the targets of those that are its own. Any other may be in use, here or on another host, also one that it
    would only read.
    """
    root = ElementTree.fromstring(xml)
    for tag in _NOT_NEEDED:
        for element in root.findall(tag):
            root.remove(element)
    for tag, text in (("title", title), ("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        _set(root, tag, text)
    for cell in root.iterfind("cpu/numa/cell"):
        cell.attrib.pop("memAccess", None)
    devices = root.find("devices")
    if devices is not None:
        for tag in _NOT_HARMLESS:
            for element in devices.findall(tag):
                devices.remove(element)
        _inputs_and_entropy(devices)
        _ports(devices)
        _screen(devices)
        for disk in devices.findall("disk"):
            target = disk.find("target")
            if disk.get("device") in _DRIVES or (target is not None and target.get("dev") in disks):
                _disk(disk)
            else:
                devices.remove(disk)
        for watchdog in devices.findall("watchdog"):
            watchdog.set("action", "none")
        for memory in devices.findall("memory"):
            if memory.find("source/path") is not None or memory.get("model") in ("nvdimm", "virtio-pmem"):
                devices.remove(memory)
    return ElementTree.tostring(root, encoding="unicode")


def _set(root: ElementTree.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ElementTree.SubElement(root, tag)
    element.text = text


def _inputs_and_entropy(devices: ElementTree.Element) -> None:
    for device in devices.findall("input"):
        if device.get("type") in ("passthrough", "evdev"):
            devices.remove(device)
    for device in devices.findall("rng"):
        backend = device.find("backend")
        if backend is None or backend.get("model") == "egd":
            devices.remove(device)


def _ports(devices: ElementTree.Element) -> None:
    """Every port stays, since the guest may write to it; only the agent's leads anywhere."""
    for tag in ("serial", "console", "channel"):
        for device in devices.findall(tag):
            target = device.find("target")
            if tag == "console" and (target is None or target.get("type", "serial") == "serial"):
                devices.remove(device)  # libvirt's second name of the first serial port
                continue
            for child in ("source", "protocol", "log", "alias"):
                for element in device.findall(child):
                    device.remove(element)
            for attribute in ("path", "tty", "mode"):
                device.attrib.pop(attribute, None)
            agent = tag == "channel" and target is not None and target.get("name") == AGENT_CHANNEL
            device.set("type", "unix" if agent else "null")


def _screen(devices: ElementTree.Element) -> None:
    """There must be one to look at; QXL and 3D acceleration need a viewer that is not there."""
    videos = devices.findall("video")
    for video in videos:
        model = video.find("model")
        kind = model.get("type") if model is not None else None
        if kind in (None, "qxl", "none") or (model is not None and model.find("acceleration") is not None):
            devices.remove(video)
    if devices.find("video") is None:
        video = ElementTree.SubElement(devices, "video")
        ElementTree.SubElement(video, "model", type="vga")


def _disk(disk: ElementTree.Element) -> None:
    for tag in ("iotune", "transient", "shareable", "alias"):
        for element in disk.findall(tag):
            disk.remove(element)
    driver = disk.find("driver")
    if disk.get("device") in _DRIVES:
        disk.set("type", "file")
        for tag in ("source", "backingStore", "mirror"):
            for element in disk.findall(tag):
                disk.remove(element)
    elif driver is not None:
        driver.set("cache", "unsafe")  # nobody needs its writes after a power cut
        driver.attrib.pop("io", None)
