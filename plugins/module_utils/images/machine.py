# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The definition of a launched image, built from checked facts.

Nothing of the exporting host's definition travels, so no emulator, loader, command line, device, path, script or network of
it can come back: there is no way for one to be in :class:`~.manifest.Machine`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from .._errors import NotFound, Unsupported
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import explaining
from .manifest import ImageDisk, Machine

#: Our element in the domain's metadata: which image it was launched from, and with what.
NAMESPACE = "urn:vmkeeper:libvirt:image:1"

#: The disk controller for each bus that needs one spelled out.
_SCSI_MODEL = "virtio-scsi"


@dataclass(frozen=True)
class Launch:
    """One machine to define. ``memory`` in bytes; ``paths`` and ``bases`` (of linked disks) by target."""

    name: str
    uuid: str
    digest: str
    vcpus: int
    memory: int
    network: str | None
    paths: dict[str, str]
    bases: dict[str, str]
    nvram: str | None = None


@dataclass(frozen=True)
class HostMachine:
    """What this host offers for an image: ``virt_type`` is kvm or qemu, ``cpu_mode`` one of libvirt's or None."""

    virt_type: str
    cpu_mode: str | None


def choose_host(connection: Any, machine: Machine, virt_type: str, *, kvm_usable: bool) -> HostMachine:
    """Ask this host for the image's kind of machine; raises :class:`Unsupported` where it has none."""
    wanted = [virt_type] if virt_type != "auto" else (["kvm", "qemu"] if kvm_usable else ["qemu"])
    said = ""
    for candidate in wanted:
        try:
            xml = connection.getDomainCapabilities(None, machine.arch, machine.family, candidate, 0)
        except libvirt.libvirtError as error:
            said = str(error)
            continue
        return HostMachine(candidate, _cpu_mode(xml, candidate))
    raise Unsupported(
        f"This host cannot run a machine of type {machine.family} for {machine.arch} with {' or '.join(wanted)}: {said}",
        advice="Launch it on a host of that kind, or set virt_type",
    )


def _cpu_mode(capabilities: str, virt_type: str) -> str | None:
    """The CPU that shows the guest this host's features: its own model under KVM, all that can be emulated else."""
    supported = {
        mode.get("name")
        for mode in ElementTree.fromstring(capabilities).iterfind("cpu/mode")
        if mode.get("supported") == "yes"
    }
    wanted = "host-model" if virt_type == "kvm" else "maximum"
    return wanted if wanted in supported else None


def check_network(connection: Any, network: str | None) -> None:
    """Raise :class:`NotFound` unless this host has that libvirt network."""
    if network is None:
        return
    with explaining("Listing the networks"):
        existing = sorted(one.name() for one in connection.listAllNetworks())
    if network not in existing:
        raise NotFound(
            f"There is no network {network!r} on this host",
            advice="Its networks are: " + (", ".join(existing) if existing else "none"),
            existing=existing,
        )


def definition(launch: Launch, machine: Machine, disks: Sequence[ImageDisk], host: HostMachine) -> str:
    """The domain XML. libvirt fills in MAC addresses, the machine type's version and the rest of the hardware."""
    root = ElementTree.Element("domain", type=host.virt_type)
    ElementTree.SubElement(root, "name").text = launch.name
    ElementTree.SubElement(root, "uuid").text = launch.uuid
    metadata = ElementTree.SubElement(root, "metadata")
    ElementTree.register_namespace("vmkeeper-image", NAMESPACE)
    size = {"vcpus": str(launch.vcpus), "memory": str(launch.memory)}
    ElementTree.SubElement(metadata, f"{{{NAMESPACE}}}image", size).text = launch.digest
    ElementTree.SubElement(root, "memory", unit="KiB").text = str(launch.memory // 1024)
    ElementTree.SubElement(root, "vcpu").text = str(launch.vcpus)
    system = ElementTree.SubElement(root, "os")
    if machine.firmware == "uefi":
        system.set("firmware", "efi")
    ElementTree.SubElement(system, "type", arch=machine.arch, machine=machine.family).text = "hvm"
    if launch.nvram is not None:
        ElementTree.SubElement(system, "nvram").text = launch.nvram
    if machine.arch in ("x86_64", "i686", "aarch64"):
        features = ElementTree.SubElement(root, "features")
        ElementTree.SubElement(features, "acpi")
        if machine.arch != "aarch64":
            ElementTree.SubElement(features, "apic")
    if host.cpu_mode:
        ElementTree.SubElement(root, "cpu", mode=host.cpu_mode)
    ElementTree.SubElement(root, "clock", offset="utc")
    devices = ElementTree.SubElement(root, "devices")
    if any(_bus(disk, machine) == "scsi" for disk in disks):
        ElementTree.SubElement(devices, "controller", type="scsi", model=_SCSI_MODEL)
    for number, disk in enumerate(disks, start=1):
        devices.append(_disk(launch, disk, _bus(disk, machine), number))
    if launch.network is not None:
        for _number in range(max(1, machine.interfaces)):
            interface = ElementTree.SubElement(devices, "interface", type="network")
            ElementTree.SubElement(interface, "source", network=launch.network)
            ElementTree.SubElement(interface, "model", type="virtio")
    ElementTree.SubElement(devices, "serial", type="pty")
    channel = ElementTree.SubElement(devices, "channel", type="unix")
    ElementTree.SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    rng = ElementTree.SubElement(devices, "rng", model="virtio")
    ElementTree.SubElement(rng, "backend", model="random").text = "/dev/urandom"
    ElementTree.SubElement(devices, "memballoon", model="virtio")
    return ElementTree.tostring(root, encoding="unicode")


def _bus(disk: ImageDisk, machine: Machine) -> str:
    """The disk's bus; q35 has no IDE, and SATA is what its guests' drivers expect in its place."""
    return "sata" if disk.bus == "ide" and machine.family == "q35" else disk.bus


def _target(disk: ImageDisk, bus: str) -> str:
    """The target's name has to fit the bus, else libvirt guesses another one from it."""
    prefix = {"virtio": "vd", "ide": "hd"}.get(bus, "sd")
    return prefix + disk.target[2:]


def _disk(launch: Launch, disk: ImageDisk, bus: str, order: int) -> ElementTree.Element:
    element = ElementTree.Element("disk", type="file", device="disk")
    ElementTree.SubElement(element, "driver", name="qemu", type="qcow2", discard="unmap")
    ElementTree.SubElement(element, "source", file=launch.paths[disk.target])
    base = launch.bases.get(disk.target)
    if base is not None:
        backing = ElementTree.SubElement(element, "backingStore", type="file")
        ElementTree.SubElement(backing, "format", type="qcow2")
        source = ElementTree.SubElement(backing, "source", file=base)
        # The base is shared by every machine that is linked to it: its owner is not one guest's to change.
        ElementTree.SubElement(source, "seclabel", model="dac", relabel="no")
        ElementTree.SubElement(backing, "backingStore")
    ElementTree.SubElement(element, "target", dev=_target(disk, bus), bus=bus)
    if disk.serial is not None:
        ElementTree.SubElement(element, "serial").text = disk.serial
    ElementTree.SubElement(element, "boot", order=str(order))
    return element


def nvram_misfit(handle: Any, size: int | None) -> int | None:
    """The bytes of UEFI variables that the firmware of a defined domain takes, where an image's ``size`` is another.

    Firmware and variables have to be of one size, else QEMU does not start.  None also where an older libvirt chooses the
    firmware only at the start.
    """
    if size is None:
        return None
    element = ElementTree.fromstring(handle.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).find("os/nvram")
    template = element.get("template") if element is not None else None
    wanted = os.stat(template).st_size if template is not None else size
    return wanted if wanted != size else None


def launched_from(xml: str) -> str | None:
    """The digest of the image that a domain was launched from, or None."""
    text = ElementTree.fromstring(xml).findtext(f"metadata/{{{NAMESPACE}}}image")
    return text.strip() if text else None


def launched_with(xml: str) -> dict[str, int]:
    """The ``vcpus`` and ``memory`` (bytes) of a domain's launch; nothing where an earlier version launched it."""
    element = ElementTree.fromstring(xml).find(f"metadata/{{{NAMESPACE}}}image")
    recorded = element.attrib if element is not None else {}
    return {what: int(value) for what, value in recorded.items() if what in ("vcpus", "memory") and value.isdecimal()}
