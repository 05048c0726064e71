# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guest that a memory file resumes, and the images that it opens besides those of its snapshot.

It has the drives of its moment.  Those that the domain still has are where they are today; a disk that was detached since is
where it was, and may have found another use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..hypervisor import definition
from ..hypervisor.connection import constant, explaining
from ..hypervisor.domain_model import Domain, Layer, parse_domain, read_domain
from ..safety.host_graph import openers
from .ground import Ground
from .model import by_name

_REMOVABLE = ("cdrom", "floppy")


def fitted(xml: str, held: Mapping[str, Layer], present: Domain, exists: Callable[[str], bool] = os.path.exists) -> str:
    """The definition in a memory file with the disks that the snapshot ``held`` on these images. Pure.

    ``present``: the domain as it is today.  A removable drive whose medium was taken out, or has gone, is empty.
    """
    layers = dict(held)
    empty = []
    for disk in parse_domain(xml, present.state).disks:
        today = present.disk(disk.target)
        if disk.target in held:
            continue
        if disk.device in _REMOVABLE and (
            today is None or today.active is None or (today.path is not None and not exists(today.path))
        ):
            empty.append(disk.target)
        elif today is not None and today.active is not None and today.kind in ("file", "block"):
            layers[disk.target] = today.active
    return definition.without_media(definition.with_disk_layers(xml, layers), empty)


def read_xml(connection: Any, memory_file: str) -> str:
    """The definition in a memory file, with its secrets."""
    return str(connection.saveImageGetXMLDesc(memory_file, constant("VIR_SAVE_IMAGE_XML_SECURE") or 0))


def with_resumed(handle: Any, ground: Ground, name: str) -> Ground:
    """The facts with what the memory of that snapshot, if it has any, would open besides the disks that the snapshot holds."""
    snapshot = by_name(ground.snapshots, name)
    if snapshot is None or snapshot.memory_file is None or not os.path.exists(snapshot.memory_file):
        return ground
    with explaining(
        f"Reading the memory of snapshot {name!r} of domain {ground.domain.name!r} in {snapshot.memory_file}",
        advice="Restore that file from a backup first",
    ):
        xml = read_xml(handle.connect(), snapshot.memory_file)
    held = {disk.target for disk in snapshot.captured}
    present = read_domain(handle, inactive=True)
    resumed = parse_domain(fitted(xml, {}, present), present.state).disks
    others = tuple(disk for disk in resumed if disk.target not in held and disk.path is not None)
    opened = openers([disk.path for disk in others if disk.path], besides=ground.domain.uuid)
    return replace(ground, resumed=others, opened={**ground.opened, **opened})
