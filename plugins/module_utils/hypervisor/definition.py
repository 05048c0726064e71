# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Change a domain's persistent definition: pure edits of its XML, and the one call that stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from .connection import constant, explaining
from .domain_model import Layer


def with_disk_layers(xml: str, layers: Mapping[str, Layer]) -> str:
    """The definition with the disks in ``layers`` (by target) standing on these images.

    A recorded backing chain is dropped: it belongs to the old image, and libvirt reads the new one from the file.
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


def persistent_xml(domain: Any) -> str:
    """The definition of the next start, with its secrets, fit to be defined again."""
    flags = (constant("VIR_DOMAIN_XML_INACTIVE") or 0) | (constant("VIR_DOMAIN_XML_SECURE") or 0)
    with explaining(f"Reading the definition of domain {domain.name()!r}"):
        return str(domain.XMLDesc(flags))


def define(connection: Any, xml: str, *, doing: str, state: str) -> None:
    """Store a definition."""
    with explaining(doing, state=state):
        connection.defineXML(xml)
