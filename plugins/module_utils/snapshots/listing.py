# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ``snapshot_info`` shows: the tree of snapshots with what each stands on, and the chain of every disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import chain
from ..hypervisor.domain_model import Domain, Layer, read_domain
from ..safety.space import allocated_in_all
from .model import Snapshot, read_snapshots

#: Layers that a live chain may have before it is worth shortening (DESIGN: chains).
CHAIN_LIMIT = 8


def list_domain(handle: Any, *, name: str | None = None, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``{snapshots, chains, warnings}`` of one domain."""
    domain = read_domain(handle)
    snapshots = read_snapshots(handle)
    chains, warnings = _chains(domain, snapshots)
    stands_on = {snapshot.name: files_under(snapshot, warnings) for snapshot in snapshots}
    live = {entry["path"] for layers in chains.values() for entry in layers}
    shown = []
    for snapshot in snapshots:
        if name is not None and snapshot.name != name:
            continue
        labels = snapshot.labels.tags if snapshot.labels else {}
        if tags and any(labels.get(key) != value for key, value in tags.items()):
            continue
        shown.append(
            {
                **snapshot.as_result(domain.name),
                "depth": _depth(snapshot, snapshots),
                "children": [child.name for child in snapshots if child.parent == snapshot.name],
                "bootable": bootable(snapshot, stands_on[snapshot.name]),
                "depends_on": list(stands_on[snapshot.name]),
                "needed_by": needed_by(snapshot, stands_on, live, domain.name),
                "bytes": allocated_in_all(_own_files(snapshot)),
            }
        )
    return {"snapshots": shown, "chains": chains, "warnings": warnings}


def _depth(snapshot: Snapshot, snapshots: Sequence[Snapshot]) -> int:
    parents = {one.name: one.parent for one in snapshots}
    depth, parent = 0, snapshot.parent
    while parent is not None and depth < len(snapshots):
        depth, parent = depth + 1, parents.get(parent)
    return depth


def _own_files(snapshot: Snapshot) -> list[str]:
    """Files that exist because of this snapshot: the overlays that it started, its memory and UEFI variables."""
    return [*(disk.overlay for disk in snapshot.disks if disk.overlay), *snapshot.side_files]


def files_under(snapshot: Snapshot, warnings: list[str]) -> tuple[str, ...]:
    """Every file that the snapshot's content is read from."""
    files: dict[str, None] = {}
    for disk in snapshot.captured:
        if disk.base is None:
            continue
        kind = "block" if disk.base.startswith("/dev/") else "file"
        try:
            for layer in chain.follow(Layer(disk.base, disk.base_format, kind)):
                if layer.path:
                    files[layer.path] = None
        except VmkeeperError as error:
            files[disk.base] = None
            warnings.append(f"snapshot {snapshot.name}: {error.problem}")
    files.update(dict.fromkeys(snapshot.side_files))
    return tuple(files)


def bootable(snapshot: Snapshot, files: Sequence[str]) -> bool:
    """Whether everything that a revert to it would read is there, and whole."""
    if snapshot.labels is not None and snapshot.labels.ending:
        return False
    return bool(snapshot.captured) and all(os.path.exists(path) for path in files)


def needed_by(
    snapshot: Snapshot, stands_on: Mapping[str, Sequence[str]], live: set[str], domain: str
) -> list[dict[str, str]]:
    """Who else reads the layers that hold this snapshot's content: ``{kind: snapshot|domain, name}``."""
    bases = {disk.base for disk in snapshot.captured if disk.base}
    needs = [
        {"kind": "snapshot", "name": other}
        for other, files in stands_on.items()
        if other != snapshot.name and bases & set(files)
    ]
    if bases & live:
        needs.append({"kind": "domain", "name": domain})
    return needs


def _chains(domain: Domain, snapshots: Sequence[Snapshot]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    made_by = {disk.overlay: snapshot.name for snapshot in snapshots for disk in snapshot.disks if disk.overlay}
    chains: dict[str, list[dict[str, Any]]] = {}
    warnings: list[str] = []
    for disk in domain.disks:
        if disk.device in ("cdrom", "floppy") or disk.active is None:
            continue
        try:
            layers = chain.chain_of(disk)
        except VmkeeperError as error:
            layers = disk.chain
            warnings.append(f"{domain.name}, disk {disk.target}: {error.problem}")
        chains[disk.target] = [
            {
                "path": layer.path,
                "format": layer.format,
                "allocated": allocated_in_all(() if layer.path is None else (layer.path,)),
                "virtual_size": chain.virtual_size(layer),
                "after_snapshot": made_by.get(layer.path) if layer.path else None,
            }
            for layer in layers
        ]
        if len(layers) > CHAIN_LIMIT:
            warnings.append(
                f"{domain.name}, disk {disk.target}: the chain has {len(layers)} layers"
                f" (more than {CHAIN_LIMIT}); shorten it with blockcommit"
            )
    return chains, warnings
