# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operations of this trade leave behind: the definition on other layers, and files that nobody needs any more."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import Refused
from ..hypervisor import definition
from ..hypervisor.domain_model import Layer
from ..safety import places
from ..safety.host_graph import canonical, openers, read_graph

#: QEMU closes an image a moment after libvirt says that it has let go of it.
_CLOSING_SECONDS = 10.0


@dataclass
class Merged:
    """What was done. ``kept``: files that stay because somebody needs them, with the reason."""

    committed_bytes: dict[str, int] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def layer_at(path: str, image_format: str) -> Layer:
    """The layer of a local image."""
    return Layer(path, image_format, "block" if path.startswith("/dev/") else "file")


def put_definition_on(handle: Any, layers: Mapping[str, Layer]) -> None:
    """Let the definition of the next start name these images, and no chain below them: the headers tell that."""
    definition.define(
        handle.connect(),
        definition.with_disk_layers(definition.persistent_xml(handle), layers),
        doing=f"Putting the definition of domain {handle.name()!r} on {', '.join(str(one.path) for one in layers.values())}",
        state="The images are as they should be, and its definition still names others; run this again.",
    )


def remove_unneeded(handle: Any, paths: Sequence[str], done: Merged) -> None:
    """Delete the files that no definition, snapshot, image or process needs any more, from the top down."""
    progress = True
    left = [path for path in paths if os.path.lexists(path)]
    while progress and left:
        graph = read_graph(handle.connect())
        progress = False
        for path in list(left):
            if graph.named_by(path) or graph.children(path):
                continue
            _wait_until_closed(path)
            places.unlink_quietly(path)
            places.fsync_directory(os.path.dirname(path))
            graph = graph.without_files([path])
            left.remove(path)
            done.removed.append(path)
            progress = True
    if left:
        graph = read_graph(handle.connect())
        for path in left:
            done.kept[path] = ", ".join(str(reader) for reader in (*graph.named_by(path), *graph.readers(path)))


def _wait_until_closed(path: str) -> None:
    give_up = time.monotonic() + _CLOSING_SECONDS
    while True:
        holders = openers([path], besides="").get(canonical(path), ())
        if not holders:
            return
        if time.monotonic() > give_up:
            raise Refused(
                f"{path} is no longer needed by libvirt, and still open in {holders[0]}",
                state="It was kept.",
                advice="If QEMU writes to an image that libvirt does not know, shut the guest down and run recover_domain",
            )
        time.sleep(0.1)
