# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt checkpoints of ours: one live one for each repository. Other people's are never touched."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from ..hypervisor import qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import constant, explaining
from ..hypervisor.domain_model import Domain, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2

#: Eight characters of the repository's UUID, then the point's id.
OURS = re.compile(r"vmk-[0-9a-f]{8}-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{4}")


@dataclass(frozen=True)
class Checkpoint:
    """``dirty``: target -> bytes changed since, for the disks whose bitmaps libvirt found whole from the top layer down.

    A disk in ``covers`` and not in ``dirty`` has a bitmap that is missing, inconsistent or has a gap.
    """

    name: str
    covers: frozenset[str]
    dirty: Mapping[str, int]


def parse_checkpoint(xml: str) -> Checkpoint:
    """From ``virDomainCheckpointGetXMLDesc`` with sizes (https://libvirt.org/formatcheckpoint.html)."""
    root = ElementTree.fromstring(xml)
    covers, dirty = set(), {}
    for disk in root.iterfind("disks/disk"):
        if disk.get("checkpoint") != "bitmap":
            continue
        target = disk.get("name", "")
        covers.add(target)
        if disk.get("size") is not None:
            dirty[target] = int(disk.get("size", "0"))
    return Checkpoint(root.findtext("name", ""), frozenset(covers), dirty)


def read_ours(handle: Any, prefix: str, active: bool) -> dict[str, Checkpoint]:
    """The checkpoints whose names begin with ``prefix``. Only a running domain can count what changed."""
    found = {}
    with explaining(f"Reading the checkpoints of domain {handle.name()!r}"):
        listed = [one for one in handle.listAllCheckpoints() if one.getName().startswith(prefix)]
    for one in listed:
        flags = constant("VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN") or 0
        if active:
            flags |= constant("VIR_DOMAIN_CHECKPOINT_XML_SIZE") or 0
        try:
            xml = one.getXMLDesc(flags)
        except libvirt.libvirtError:
            # Sizes need the bitmaps; without them the name still tells that it exists.
            xml = one.getXMLDesc(constant("VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN") or 0)
        found[one.getName()] = parse_checkpoint(xml)
    return found


def names_of_ours(handle: Any) -> list[str]:
    """The names of all checkpoints that this collection made, for whichever repository."""
    with explaining(f"Reading the checkpoints of domain {handle.name()!r}"):
        return [name for one in handle.listAllCheckpoints() if OURS.match(name := one.getName())]


def full_xml(handle: Any, name: str) -> str:
    """What is kept beside the point, to put the checkpoint back if libvirt forgets it."""
    with explaining(f"Reading checkpoint {name!r}"):
        return str(handle.checkpointLookupByName(name).getXMLDesc(constant("VIR_DOMAIN_CHECKPOINT_XML_SECURE") or 0))


def put_back(handle: Any, xml: str) -> bool:
    """Redefine a checkpoint that libvirt forgot (undefine, another host); False where its bitmaps are not there."""
    flags = (constant("VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE") or 0) | (
        constant("VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE") or 0
    )
    try:
        handle.checkpointCreateXML(_without_parent(xml), flags)
        return True
    except libvirt.libvirtError:
        return False


def _without_parent(xml: str) -> str:
    # Its parent may be gone with the rest; bitmaps of libvirt 7.6 and later do not depend on each other.
    root = ElementTree.fromstring(xml)
    for parent in root.findall("parent"):
        root.remove(parent)
    return ElementTree.tostring(root, encoding="unicode")


def remove(handle: Any, names: Iterable[str]) -> None:
    """Remove checkpoints with their bitmaps; those that do not exist are passed over."""
    wanted = set(names)
    if not wanted:
        return
    domain = read_domain(handle)
    with explaining(f"Reading the checkpoints of domain {domain.name!r}"):
        present = [one for one in handle.listAllCheckpoints() if one.getName() in wanted]
    for one in present:
        name = one.getName()
        with explaining(f"Removing checkpoint {name!r} of domain {domain.name!r}", state="It is still there."):
            if domain.state.active:
                try:
                    one.delete(0)
                    continue
                except libvirt.libvirtError:
                    pass  # its bitmap went some other way; what libvirt remembers goes below
            one.delete(constant("VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY") or 0)
    if not domain.state.active:
        _remove_stored(domain, sorted(wanted))


def _remove_stored(domain: Domain, names: Sequence[str]) -> None:
    """Drop bitmaps from the top layers of a stopped domain. Layers below may be other domains' too; they keep theirs."""
    for disk in domain.disks:
        if disk.path is None or disk.format != "qcow2":
            continue
        try:
            stored = {bitmap.name for bitmap in read_qcow2(disk.path).bitmaps}
        except (OSError, BadHeader):
            continue
        for name in names:
            if name in stored:
                # In use by somebody after all: then it stays, which costs some bytes and harms nothing.
                with contextlib.suppress(qemu_img.ImageToolFailed):
                    qemu_img.run(
                        ["bitmap", "--remove", "-f", "qcow2", disk.path, name],
                        doing=f"Removing a bitmap of {disk.path}",
                    )
