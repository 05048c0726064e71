# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a stored definition meets when it comes to a host: the definition itself, and what the host has."""

from __future__ import annotations

import os
from typing import Any
from xml.etree import ElementTree

from .._errors import Refused
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import constant, explaining
from . import digests
from .manifest import Point
from .mapping import Host
from .repository import Repository


def stored_definition(repository: Repository, point: Point) -> str:
    """The definition of a point; raises :class:`Refused` when it is not what was written."""
    path = os.path.join(repository.point_directory(point.domain_uuid, point.id), "domain.xml")
    if digests.file_digest(path) != point.files.get("domain.xml"):
        raise Refused(f"{path} is not what was written", advice="Restore another point")
    with open(path, encoding="utf-8") as stream:
        return stream.read()


def read_host(connection: Any, xml: str) -> Host:
    """What this host has that the definition may need."""
    stored = ElementTree.fromstring(xml)
    arch = (stored.find("os/type").get("arch") if stored.find("os/type") is not None else None) or "x86_64"  # type: ignore[union-attr]
    with explaining("Reading what this host can run"):
        capabilities = ElementTree.fromstring(connection.getCapabilities())
        networks = frozenset(one.name() for one in connection.listAllNetworks())
    machines: dict[str, str] = {}
    types: set[str] = set()
    for guest in capabilities.iterfind("guest"):
        element = guest.find("arch")
        if element is None or element.get("name") != arch:
            continue
        types.update(one.get("type", "") for one in element.iterfind("domain"))
        for machine in element.iter("machine"):
            text = machine.text or ""
            machines[text] = machine.get("canonical", text)
    return Host(
        domain_types=frozenset(types),
        machines=machines,
        networks=networks,
        bridges=_bridges(),
        exists=os.path.exists,
        cpu_fits=_cpu_fits(connection, stored, arch),
    )


def _cpu_fits(connection: Any, stored: ElementTree.Element, arch: str) -> bool:
    cpu = stored.find("cpu")
    if cpu is None or cpu.find("model") is None or cpu.get("mode", "custom") != "custom":
        return True
    if cpu.get("check") == "none":
        return True
    try:
        result = connection.compareHypervisorCPU(
            None, arch, None, stored.get("type"), ElementTree.tostring(cpu, encoding="unicode"), 0
        )
    except libvirt.libvirtError:
        return True  # it cannot tell, so the definition stays as it is
    return bool(result != constant("VIR_CPU_COMPARE_INCOMPATIBLE"))


def _bridges() -> frozenset[str]:
    try:
        return frozenset(
            name for name in os.listdir("/sys/class/net") if os.path.isdir(f"/sys/class/net/{name}/bridge")
        )
    except OSError:
        return frozenset()
