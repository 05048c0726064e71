# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Change a domain's persistent definition: pure edits of its XML, and the one call that stores it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from . import chain
from .connection import constant, explaining
from .domain_model import Layer


def with_disk_layers(xml: str, layers: Mapping[str, Layer]) -> str:
    """The definition with the disks in ``layers`` (by target) standing on these images.

    A recorded backing chain is dropped: it belongs to the old image, and libvirt reads the new one from the file. Where that
    leads to a block device it is recorded anew (:func:`.chain.on_devices`).
    """
    root = ElementTree.fromstring(xml)
    with_layers(root, layers)
    return ElementTree.tostring(root, encoding="unicode")


def with_layers(root: ElementTree.Element, layers: Mapping[str, Layer]) -> None:
    """:func:`with_disk_layers` on a parsed ``<domain>``, in place."""
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        layer = layers.get(target.get("dev", "") if target is not None else "")
        source = disk.find("source")
        if layer is None or layer.path is None or source is None:
            continue
        disk.set("type", layer.kind)
        for attribute in ("file", "dev", "pool", "volume", "mode", "index", "startupPolicy"):
            source.attrib.pop(attribute, None)
        source.set("dev" if layer.kind == "block" else "file", layer.path)
        driver = disk.find("driver")
        if driver is None:
            driver = ElementTree.Element("driver", name="qemu")
            disk.insert(0, driver)
        driver.set("type", layer.format or "raw")
        for backing in disk.findall("backingStore"):
            disk.remove(backing)
        _record(disk, chain.on_devices(layer))


def without_media(xml: str, targets: Collection[str]) -> str:
    """The definition with these removable drives (by target) empty."""
    root = ElementTree.fromstring(xml)
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        if target is not None and target.get("dev") in targets:
            for medium in (*disk.findall("source"), *disk.findall("backingStore")):
                disk.remove(medium)
            disk.set("type", "file")
    return ElementTree.tostring(root, encoding="unicode")


def without_chains(xml: str, targets: Collection[str]) -> str:
    """The definition without what is recorded to lie below the images of these disks; the very same text where nothing is.

    libvirt puts a recorded chain below whatever image has that name, also one that stands on nothing.
    """
    root = ElementTree.fromstring(xml)
    found = [
        (disk, backing)
        for disk in root.iterfind("devices/disk")
        if (target := disk.find("target")) is not None and target.get("dev") in targets
        for backing in disk.findall("backingStore")
        if len(backing)
    ]
    for disk, backing in found:
        disk.remove(backing)
    return ElementTree.tostring(root, encoding="unicode") if found else xml


def _record(disk: ElementTree.Element, below: Sequence[Layer]) -> None:
    above = disk
    for layer in below:
        backing = ElementTree.SubElement(above, "backingStore", type=layer.kind)
        ElementTree.SubElement(backing, "format", type=layer.format or "raw")
        ElementTree.SubElement(backing, "source", {"dev" if layer.kind == "block" else "file": layer.path or ""})
        above = backing
    if below:
        ElementTree.SubElement(above, "backingStore")


def encrypt(source: ElementTree.Element, secret: str) -> None:
    """Say that a ``<source>`` is encrypted, and which libvirt secret opens it."""
    encryption = ElementTree.SubElement(source, "encryption", format="luks")
    ElementTree.SubElement(encryption, "secret", type="passphrase", uuid=secret)


def with_backing(
    xml: str,
    chains: Mapping[str, Sequence[Layer]],
    models: Collection[str],
    secrets: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The definition with what lies below the active layer of the disks in ``chains`` (by target), topmost first.

    libvirt leaves the owner and label of these layers alone: for each of the host's security ``models`` that would change
    them they carry ``relabel='no'``.  ``secrets`` are the UUIDs of the libvirt secrets that open the encrypted ones, by path.
    """
    root = ElementTree.fromstring(xml)
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        layers = chains.get(target.get("dev", "") if target is not None else "")
        if not layers:
            continue
        for stale in disk.findall("backingStore"):
            disk.remove(stale)
        above = disk
        for layer in layers:
            backing = ElementTree.SubElement(above, "backingStore", type="file")
            ElementTree.SubElement(backing, "format", type=layer.format or "qcow2")
            source = ElementTree.SubElement(backing, "source", file=layer.path or "")
            for model in ("dac", "selinux"):
                if model in models:
                    ElementTree.SubElement(source, "seclabel", model=model, relabel="no")
            secret = secrets.get(layer.path or "")
            if secret is not None:
                encrypt(source, secret)
            above = backing
        ElementTree.SubElement(above, "backingStore")
    return ElementTree.tostring(root, encoding="unicode")


def security_models(capabilities_xml: str) -> tuple[str, ...]:
    """The security models of this host, such as ``dac`` and ``apparmor``."""
    root = ElementTree.fromstring(capabilities_xml)
    return tuple(model.findtext("model", "") for model in root.iterfind("host/secmodel"))


def persistent_xml(domain: Any) -> str:
    """The definition of the next start, with its secrets, fit to be defined again."""
    flags = (constant("VIR_DOMAIN_XML_INACTIVE") or 0) | (constant("VIR_DOMAIN_XML_SECURE") or 0)
    with explaining(f"Reading the definition of domain {domain.name()!r}"):
        return str(domain.XMLDesc(flags))


def disks_on(domain: Any, paths: Collection[str], *, inactive: bool) -> list[str]:
    """The disks, as XML, whose image is one of the files ``paths``."""
    flags = (constant("VIR_DOMAIN_XML_INACTIVE") or 0) if inactive else 0
    with explaining(f"Reading the definition of domain {domain.name()!r}"):
        disks = ElementTree.fromstring(domain.XMLDesc(flags)).findall("devices/disk")
    found = [disk for disk in disks if any(source.get("file") in paths for source in disk.findall("source"))]
    return [ElementTree.tostring(disk, encoding="unicode") for disk in found]


def define(connection: Any, xml: str, *, doing: str, state: str) -> None:
    """Store a definition."""
    with explaining(doing, state=state):
        connection.defineXML(xml)
