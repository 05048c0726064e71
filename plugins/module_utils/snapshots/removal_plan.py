# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What removing a snapshot does to the layers that it keeps apart, decided from facts alone.

A snapshot's layer is the image that holds its content.  What stands on it is merged into it, so that the content of every
other snapshot, and of the present, stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import Refused
from ..hypervisor.domain_model import Layer
from ..safety.host_graph import Reader, canonical, unneeded
from .ground import Ground, refuse_unsettled
from .merge_plan import Merge, Work, follow_snapshots, plan_merge, refuse_protected, shared
from .merge_way import choose_way, left_behind
from .model import Snapshot, SnapshotDisk, by_name


@dataclass(frozen=True)
class RemovalPlan:
    """What ``state: absent`` does to one domain. ``kept`` are layers that stay, and for whom.

    ``methods`` and ``notes`` are as in :class:`~.commit_plan.CommitPlan`.
    """

    snapshot: Snapshot
    work: Work
    kept: tuple[dict[str, Any], ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class _Choice:
    """What is decided disk by disk."""

    merges: list[Merge] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)


def plan_removal(name: str, ground: Ground, *, allow_restart: bool = False, bandwidth: int = 0) -> RemovalPlan | None:
    """Decide; None where the domain has no such snapshot. Raises before anything is changed.

    ``bandwidth`` in bytes per second, 0 for no limit.
    """
    snapshot = by_name(ground.snapshots, name)
    if snapshot is None:
        return None
    refuse_unsettled(ground)
    refuse_protected(ground, [snapshot], "Removing the snapshot of")
    if snapshot.mode == "internal":
        _check_internal(ground, snapshot)
        return RemovalPlan(snapshot, Work(ended=(name,)))
    choice = _Choice()
    for disk in snapshot.captured:
        _decide(ground, snapshot, disk, choice)
    way = choose_way(ground, choice.merges, allow_restart=allow_restart)
    left = [path for merge in way.merges for path in left_behind(ground, merge)]
    files = [*choice.files, *(path for merge in way.merges for path in merge.gone if path not in left)]
    files += snapshot.side_files
    return RemovalPlan(
        snapshot=snapshot,
        work=Work(
            merges=way.merges,
            rebased=follow_snapshots(ground, way.merges, [name]),
            ended=(name,),
            files=tuple(files),
            bandwidth=bandwidth,
            restart=way.restart,
            checkpoints_ended=way.checkpoints_ended,
        ),
        kept=tuple(choice.kept),
        methods={merge.target: way.method(ground, merge) for merge in way.merges},
        notes=tuple(way.notes(ground)),
    )


def _decide(ground: Ground, snapshot: Snapshot, disk: SnapshotDisk, choice: _Choice) -> None:
    if disk.base is None:
        return
    uuid, name = ground.domain.uuid, ground.domain.name
    graph = ground.graph.without([Reader("snapshot", snapshot.name, uuid, name)])
    readers = graph.readers(disk.base)
    own = [reader for reader in readers if reader.uuid == uuid]
    strangers = [reader for reader in readers if reader.uuid != uuid]
    if strangers and own:
        raise shared(ground, disk.target, disk.base, strangers)
    children = graph.children(disk.base)
    if not readers and not children:
        # An image without a backing file is somebody's disk, not a layer that was put over one: it is never removed.
        choice.files += unneeded(graph, graph.chain(disk.base))
        return
    # A commit of this domain into it that runs already is taken up.
    named = [reader for reader in graph.named_by(disk.base) if not (reader.kind == "job" and reader.uuid == uuid)]
    if strangers or named or len(children) != 1:
        choice.kept.append({"disk": disk.target, "path": disk.base, "for": [reader.as_result() for reader in readers]})
        return
    base = Layer(disk.base, disk.base_format, "block" if disk.base.startswith("/dev/") else "file")
    top = Layer(children[0], "qcow2")
    target = next((one for one in ground.chains if children[0] in ground.in_use(one)), disk.target)
    choice.merges.append(plan_merge(ground, target, base, [top], [snapshot.name]))


def _check_internal(ground: Ground, snapshot: Snapshot) -> None:
    """libvirt looks for an internal snapshot in the active image only, and before 11.0 may take the wrong one."""
    for disk in snapshot.captured:
        present = ground.domain.disk(disk.target)
        if disk.base is None:
            continue
        if present is None or present.path is None or canonical(present.path) != canonical(disk.base):
            raise Refused(
                f"The internal snapshot {snapshot.name!r} of domain {ground.domain.name!r} lies in {disk.base},"
                f" and disk {disk.target!r} stands on another layer now",
                advice="Remove the external snapshots above it first",
            )
    above = descendants(ground.snapshots, snapshot.name)
    external = [one.name for one in above if one.mode == "external"]
    if external:
        raise Refused(
            f"External snapshots ({', '.join(external)}) of domain {ground.domain.name!r} descend from the internal"
            f" snapshot {snapshot.name!r}, and libvirt before 11.0 could remove their image with it",
            advice="Remove those first",
        )


def descendants(snapshots: Sequence[Snapshot], name: str) -> list[Snapshot]:
    """All snapshots after this one, parents before children."""
    found = {name}
    after = []
    for snapshot in snapshots:
        if snapshot.parent in found:
            found.add(snapshot.name)
            after.append(snapshot)
    return after
