# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fit a stored definition to the host and the identity that it is restored to. Pure: XML in, XML and notes out.

Whatever is changed is told in a note; nothing is silently connected to something that merely has the same name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree

from ..hypervisor.definition import encrypt
from ..hypervisor.domain_model import PERSISTENT_MEMORY, Layer

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"


@dataclass(frozen=True)
class Host:
    """What this host has. ``machines`` maps canonical and alias names to canonical ones; ``exists`` asks for a path."""

    domain_types: frozenset[str]
    machines: Mapping[str, str]
    networks: frozenset[str]
    bridges: frozenset[str]
    exists: Callable[[str], bool]
    cpu_fits: bool = True


@dataclass(frozen=True)
class Target:
    """What the restored domain is to be. ``disks`` are the restored images by target; ``fresh`` gives it a new identity.

    ``network`` is ``keep``, ``disconnected`` or the name of a network.  ``secrets`` are the UUIDs of the libvirt secrets of
    the encrypted ones; any other is not encrypted.
    """

    name: str
    uuid: str
    fresh: bool
    disks: Mapping[str, Layer]
    nvram: str | None = None
    network: str = "keep"
    secrets: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Mapped:
    """The definition and what was changed in it, as sentences."""

    xml: str
    notes: list[str] = field(default_factory=list)


def fit(xml: str, target: Target, host: Host) -> Mapped:
    """The definition to define."""
    ElementTree.register_namespace("qemu", _QEMU)
    root = ElementTree.fromstring(xml)
    notes: list[str] = []
    _identity(root, target, notes)
    _machine(root, host, notes)
    _firmware(root, target, host, notes)
    _disks(root, target, host, notes)
    _networks(root, target, host, notes)
    if target.fresh:
        _unshare(root, target, notes)
    _paths(root, host, notes)
    return Mapped(ElementTree.tostring(root, encoding="unicode"), notes)


def _set_text(root: ElementTree.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ElementTree.SubElement(root, tag)
    element.text = text


def _identity(root: ElementTree.Element, target: Target, notes: list[str]) -> None:
    root.attrib.pop("id", None)
    _set_text(root, "name", target.name)
    _set_text(root, "uuid", target.uuid)
    if root.find("genid") is not None:
        # The guest must notice that it went back in time (virtual machine generation id): libvirt makes a new one.
        root.find("genid").text = None  # type: ignore[union-attr]
        notes.append("it has a new generation id")
    for label in root.findall("seclabel"):
        if label.get("type") == "dynamic":
            for part in label.findall("label") + label.findall("imagelabel"):
                label.remove(part)
    if target.fresh:
        for interface in root.iterfind("devices/interface"):
            for mac in interface.findall("mac"):
                interface.remove(mac)
        sysinfo = root.find("sysinfo/system")
        for entry in sysinfo.findall("entry") if sysinfo is not None else ():
            if entry.get("name") == "uuid" and sysinfo is not None:
                sysinfo.remove(entry)
        notes.append(f"it has a new identity: name {target.name}, UUID {target.uuid}, new MAC addresses")


def _machine(root: ElementTree.Element, host: Host, notes: list[str]) -> None:
    kind = root.get("type", "kvm")
    if kind not in host.domain_types:
        new = "kvm" if "kvm" in host.domain_types else "qemu"
        root.set("type", new)
        notes.append(f"this host has no {kind} domains; it is a {new} domain")
    os_type = root.find("os/type")
    machine = os_type.get("machine") if os_type is not None else None
    if os_type is not None and machine and machine not in host.machines:
        family = re.sub(r"-[0-9.]+.*$", "", machine)
        alias = "q35" if "q35" in family else "pc"
        new = host.machines.get(alias, alias)
        os_type.set("machine", new)
        notes.append(f"this host lacks machine type {machine}; it has {new}, and Windows guests may ask for activation")
    cpu = root.find("cpu")
    if cpu is not None and not host.cpu_fits:
        numa = cpu.find("numa")
        topology = cpu.find("topology")
        cpu.clear()
        cpu.set("mode", "host-model")
        for kept in (topology, numa):
            if kept is not None:
                cpu.append(kept)
        notes.append("this host's CPU cannot be the one of the definition; it has host-model")
    emulator = root.find("devices/emulator")
    if emulator is not None and not host.exists(emulator.text or ""):
        notes.append(f"the emulator {emulator.text} is not on this host; libvirt chooses its own")
        root.find("devices").remove(emulator)  # type: ignore[union-attr]


def _firmware(root: ElementTree.Element, target: Target, host: Host, notes: list[str]) -> None:
    os_element = root.find("os")
    if os_element is None:
        return
    loader, nvram = os_element.find("loader"), os_element.find("nvram")
    if loader is not None and loader.text and not host.exists(loader.text):
        notes.append(f"the firmware {loader.text} is not on this host; libvirt chooses a UEFI of its own")
        os_element.remove(loader)
        os_element.set("firmware", "efi")
    if nvram is not None:
        template = nvram.get("template")
        if template and not host.exists(template):
            del nvram.attrib["template"]
        if target.nvram is not None or target.fresh:
            for source in nvram.findall("source"):
                nvram.remove(source)
            nvram.attrib.pop("type", None)
            nvram.text = target.nvram
        if target.nvram is None and target.fresh:
            notes.append("the point holds no UEFI variables; it starts with fresh ones")
    for tag in ("kernel", "initrd", "dtb"):
        element = os_element.find(tag)
        if element is not None and element.text and not host.exists(element.text):
            notes.append(f"its {tag} {element.text} is not on this host; put it there before you start it")


def _target_of(disk: ElementTree.Element) -> str:
    element = disk.find("target")
    return element.get("dev", "") if element is not None else ""


def _disks(root: ElementTree.Element, target: Target, host: Host, notes: list[str]) -> None:
    devices = root.find("devices")
    if devices is None:
        return
    for disk in devices.findall("disk"):
        name = _target_of(disk)
        layer = target.disks.get(name)
        if layer is not None:
            _stand_on(disk, layer, target.secrets.get(name))
            continue
        source = disk.find("source")
        if source is None:
            continue
        path = source.get("file") or source.get("dev")
        missing = path is not None and not host.exists(path)
        if disk.get("device") in ("cdrom", "floppy"):
            if missing:
                disk.remove(source)
                notes.append(f"the medium {path} of {name} is not on this host; the drive is empty")
            continue
        # One that is shareable is shared by the domains of a cluster, which a copy of one of them is not.
        if missing or (target.fresh and disk.find("readonly") is None):
            devices.remove(disk)
            why = "its image is not on this host" if missing else "it is the original's, and not part of the point"
            notes.append(f"disk {name} was left out: {why}")


def _stand_on(disk: ElementTree.Element, layer: Layer, secret: str | None) -> None:
    for tag in ("source", "backingStore", "mirror", "encryption"):
        for element in disk.findall(tag):
            disk.remove(element)
    disk.set("type", "file")
    driver = disk.find("driver")
    if driver is None:
        driver = ElementTree.Element("driver", name="qemu")
        disk.insert(0, driver)
    driver.set("type", layer.format or "qcow2")
    source = ElementTree.Element("source", file=layer.path or "")
    if secret is not None:
        encrypt(source, secret)
    disk.insert(list(disk).index(driver) + 1, source)


def _networks(root: ElementTree.Element, target: Target, host: Host, notes: list[str]) -> None:
    for number, interface in enumerate(root.iterfind("devices/interface")):
        source = interface.find("source")
        named = source.get("network") if source is not None else None
        bridge = source.get("bridge") if source is not None else None
        what = f"interface {number}"
        if target.network not in ("keep", "disconnected"):
            _connect(interface, target.network)
            notes.append(f"{what} is connected to network {target.network}")
            continue
        lost = (interface.get("type") == "network" and named not in host.networks) or (
            interface.get("type") == "bridge" and bridge not in host.bridges
        )
        if lost:
            notes.append(f"{what}: this host lacks {named or bridge}; it is disconnected")
            for element in [*interface.findall("source"), *interface.findall("virtualport")]:
                interface.remove(element)
            interface.set("type", "user")
            _link_down(interface)
        elif target.network == "disconnected":
            notes.append(f"{what} is disconnected")
            _link_down(interface)


def _connect(interface: ElementTree.Element, network: str) -> None:
    for tag in ("source", "virtualport", "link"):
        for element in interface.findall(tag):
            interface.remove(element)
    interface.set("type", "network")
    interface.insert(0, ElementTree.Element("source", network=network))


def _link_down(interface: ElementTree.Element) -> None:
    for element in interface.findall("link"):
        interface.remove(element)
    ElementTree.SubElement(interface, "link", state="down")


#: What stands for something of the original, or keeps its data, by tag; said of it in a note.
_ITS_OWN = {
    "hostdev": "a passed-through host device",
    "shmem": "memory shared with other guests",
    "lease": "a lock of its cluster",
}

#: Backends of a TPM that is no copy's to have, by type; said of it in a note.
_OTHERS_TPM = {"passthrough": "the TPM of the host", "external": "the TPM of a process besides libvirt"}

#: Interfaces that are a device or socket of the original's own.
_EXCLUSIVE_INTERFACES = ("hostdev", "vdpa", "vhostuser")


def _unshare(root: ElementTree.Element, target: Target, notes: list[str]) -> None:
    """What the original may be using at this moment, or has its data in."""
    devices = root.find("devices")
    if devices is None:
        return

    def leave_out(device: ElementTree.Element, what: str) -> None:
        devices.remove(device)
        notes.append(f"{what} was left out: it is the original's")

    for tag, what in _ITS_OWN.items():
        for device in devices.findall(tag):
            leave_out(device, what)
    for interface in devices.findall("interface"):
        for tap in interface.findall("target"):
            interface.remove(tap)  # the name of a device on the host, which there is once
        if interface.get("type") in _EXCLUSIVE_INTERFACES:
            leave_out(interface, f"an interface of type {interface.get('type')}")
    for share in devices.findall("filesystem"):
        if share.find("readonly") is None:
            source = share.find("source")
            named = " ".join(source.attrib.values()) if source is not None else ""
            leave_out(share, f"the shared directory {named}")
    for memory in devices.findall("memory"):
        if memory.get("model") in PERSISTENT_MEMORY:
            leave_out(memory, f"the persistent memory {memory.findtext('source/path', '')}")
    for tpm in devices.findall("tpm"):
        for backend in tpm.findall("backend"):
            if whose := _OTHERS_TPM.get(backend.get("type", "")):
                leave_out(tpm, whose)
                continue
            for source in backend.findall("source"):
                backend.remove(source)
                notes.append("its TPM is a new one")
    for vsock in devices.iterfind("vsock/cid"):
        vsock.attrib.pop("address", None)
        vsock.set("auto", "yes")
    for graphics in devices.findall("graphics"):
        if graphics.get("port") not in (None, "-1") and graphics.get("autoport") != "yes":
            graphics.attrib.pop("port", None)
            graphics.attrib.pop("tlsPort", None)
            graphics.set("autoport", "yes")
            notes.append(f"its {graphics.get('type')} console has a port that libvirt chooses")
    for tag in ("serial", "console", "parallel", "channel"):
        for device in devices.findall(tag):
            _own_end(device, target, notes)


def _own_end(device: ElementTree.Element, target: Target, notes: list[str]) -> None:
    """The host's end of a character device, and its log, are not those of the original."""
    for log in device.findall("log"):
        log.set("file", f"{log.get('file')}.{target.name}")
    source = device.find("source")
    if source is None or device.get("type") == "pty":
        return  # libvirt has chosen it, and chooses anew
    path = source.get("path")
    if device.get("type") == "file" and path is not None:
        source.set("path", f"{path}.{target.name}")
        notes.append(f"a {device.tag} writes to {path}.{target.name}, not into the original's {path}")
    elif device.tag == "channel":
        if device.get("type") == "unix":
            device.remove(source)  # libvirt makes one for each domain
    elif device.get("type") in ("unix", "tcp", "udp", "dev", "pipe"):
        notes.append(f"a {device.tag} is a terminal (pty), not the original's {device.get('type')} end")
        device.set("type", "pty")
        for element in [*device.findall("source"), *device.findall("protocol")]:
            device.remove(element)


def _paths(root: ElementTree.Element, host: Host, notes: list[str]) -> None:
    devices = root.find("devices")
    if devices is None:
        return
    for share in devices.findall("filesystem"):
        source = share.find("source")
        path = source.get("dir") if source is not None else None
        if path is not None and not host.exists(path):
            devices.remove(share)
            notes.append(f"the shared directory {path} is not on this host; it was left out")
