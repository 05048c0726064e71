# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's records of snapshots whose layers are merged: marked first, then put on another layer, or forgotten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, constant, explaining
from ..safety.checkpoints_aside import set_aside
from .merge_plan import Rebased
from .model import Labels, by_name, read_snapshot, read_snapshots, with_base, write_labels
from .remains import layer_at


def mark_ending(handle: Any, name: str) -> None:
    """Note in a snapshot that its layers are going, so that nobody reverts to it; quiet when it is gone."""
    snapshot = by_name(read_snapshots(handle), name)
    if snapshot is None or (snapshot.labels is not None and snapshot.labels.ending):
        return
    labels = snapshot.labels or Labels(consistency=snapshot.consistency)
    write_labels(handle, name, replace(labels, ending=True))


def unmark_ending(handle: Any, name: str) -> None:
    """Take the mark back, of a snapshot whose layers were not touched."""
    snapshot = by_name(read_snapshots(handle), name)
    if snapshot is not None and snapshot.labels is not None and snapshot.labels.ending:
        write_labels(handle, name, replace(snapshot.labels, ending=False))


def rebase_snapshot(handle: Any, rebased: Rebased) -> None:
    """Let a snapshot say that its content lies in another image now; quiet when it is gone."""
    found = by_name(read_snapshots(handle), rebased.snapshot)
    if found is None:
        return
    with explaining(
        f"Noting that snapshot {rebased.snapshot!r} of domain {handle.name()!r} lies in {rebased.path} now",
        state="The layers are merged; run this again.",
    ):
        snapshot = handle.snapshotLookupByName(rebased.snapshot)
        xml = snapshot.getXMLDesc(constant("VIR_DOMAIN_SNAPSHOT_XML_SECURE") or 0)
        flags = constant("VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE") or 0
        if snapshot.isCurrent():
            flags |= constant("VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT") or 0
        with set_aside(handle):
            handle.snapshotCreateXML(with_base(xml, rebased.target, layer_at(rebased.path, rebased.format)), flags)


def forget_snapshot(handle: Any, name: str) -> None:
    """Remove libvirt's record of a snapshot; its children become its parent's. Quiet when it is gone."""
    try:
        snapshot = handle.snapshotLookupByName(name)
    except libvirt.libvirtError as error:
        if code_of(error) == constant("VIR_ERR_NO_DOMAIN_SNAPSHOT"):
            return
        raise
    # What lies inside the images goes with the record; of an external one only the record is left by now.
    internal = read_snapshot(snapshot).mode == "internal"
    with explaining(
        f"Removing the record of snapshot {name!r} of domain {handle.name()!r}",
        state="Its layers are merged; run this again.",
    ):
        snapshot.delete(0 if internal else constant("VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY") or 0)
