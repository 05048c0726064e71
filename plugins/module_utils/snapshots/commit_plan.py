# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which layers ``blockcommit`` merges, decided from facts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .._errors import InvalidInput, NotFound, Refused
from ..hypervisor.domain_model import Layer
from ..safety.host_graph import Reader, canonical
from .ground import Ground, refuse_unsettled
from .merge_plan import Work, follow_snapshots, losing, plan_merge, refuse_protected, shared
from .merge_way import choose_way, left_behind


@dataclass(frozen=True)
class Request:
    """The task's options, checked. ``keep`` counts the layers of a chain that may remain, its lowest included."""

    disks: tuple[str, ...] | None = None
    top: str | None = None
    base: str | None = None
    keep: int | None = None
    remove: bool = True
    bandwidth: int = 0
    allow_restart: bool = False


@dataclass(frozen=True)
class CommitPlan:
    """What will be done to one domain. ``chains`` are ``(target, paths before)``; ``notes`` go to the user.

    ``methods``: target -> ``live``, ``pull`` or ``offline``, of the disks whose layers are merged.
    """

    work: Work
    chains: tuple[tuple[str, tuple[Layer, ...]], ...]
    methods: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def after(self, target: str) -> tuple[str, ...]:
        """The layers of a disk when all is done, from the active one down."""
        layers = next(layers for name, layers in self.chains if name == target)
        gone = {path for merge in self.work.merges if merge.target == target for path in merge.gone}
        return tuple(str(layer.path) for layer in layers if layer.path not in gone)


def plan_commit(request: Request, ground: Ground) -> CommitPlan:
    """Decide for every disk that was asked for; raises before anything is changed."""
    refuse_unsettled(ground)
    _check_request(request)
    targets = _targets(request, ground)
    runs: list[tuple[str, tuple[Layer, ...]]] = []
    notes: list[str] = []
    for target in targets:
        run = _choose_run(request, ground, target, notes)
        if len(run) > 1:
            runs.append((target, run))
    emptied = {canonical(str(layer.path)) for _target, run in runs for layer in run[1:]}
    ended = losing(ground, emptied)
    refuse_protected(ground, ended, "Shortening the chains of")
    names = [snapshot.name for snapshot in ended]
    merges = [plan_merge(ground, target, run[-1], run[:-1], names) for target, run in runs]
    way = choose_way(ground, merges, allow_restart=request.allow_restart)
    left = [path for merge in way.merges for path in left_behind(ground, merge)]
    files = [path for merge in way.merges for path in merge.gone if path not in left] if request.remove else []
    files += [path for snapshot in ended for path in snapshot.side_files]
    return CommitPlan(
        work=Work(
            merges=way.merges,
            rebased=follow_snapshots(ground, way.merges, names),
            ended=tuple(names),
            files=tuple(files),
            bandwidth=request.bandwidth,
            restart=way.restart,
            checkpoints_ended=way.checkpoints_ended,
        ),
        chains=tuple((target, ground.chains[target]) for target in targets),
        methods={merge.target: way.method(ground, merge) for merge in way.merges},
        notes=(*notes, *way.notes(ground)),
    )


def _check_request(request: Request) -> None:
    if (request.top or request.base) and (request.disks is None or len(request.disks) != 1):
        raise InvalidInput("top and base are layers of one disk", advice="Name that disk, and no other, in disks")
    if request.keep is not None and (request.top or request.base):
        raise InvalidInput("keep and top or base exclude each other", advice="Use one or the other")
    if request.keep is not None and request.keep < 1:
        raise InvalidInput("keep is the number of layers that may remain, so at least 1", advice="Use 1 or more")


def _targets(request: Request, ground: Ground) -> tuple[str, ...]:
    usable = [
        disk.target
        for disk in ground.domain.disks
        if disk.target in ground.chains and not disk.readonly and disk.device not in ("cdrom", "floppy")
    ]
    for target in request.disks or ():
        if target in ground.broken:
            raise Refused(
                f"The chain of disk {target!r} of domain {ground.domain.name!r} is broken: {ground.broken[target]}",
                advice="Restore the image from a backup before anything else",
            )
        if target not in usable:
            raise NotFound(
                f"Domain {ground.domain.name!r} has no disk {target!r} with a chain",
                advice="Its disks are: " + (", ".join(usable) if usable else "none"),
                existing=usable,
            )
    if request.disks is None and ground.broken:
        target, problem = next(iter(ground.broken.items()))
        raise Refused(
            f"The chain of disk {target!r} of domain {ground.domain.name!r} is broken: {problem}",
            advice="Restore the image from a backup, or name the other disks in disks",
        )
    return tuple(request.disks) if request.disks is not None else tuple(usable)


def _find(layers: Sequence[Layer], path: str, target: str, ground: Ground) -> int:
    for number, layer in enumerate(layers):
        if layer.path is not None and canonical(layer.path) == canonical(path):
            return number
    raise NotFound(
        f"{path} is not a layer of disk {target!r} of domain {ground.domain.name!r}",
        advice="Its layers are, from the active one down: " + ", ".join(str(layer.path) for layer in layers),
        existing=[layer.path for layer in layers],
    )


def _choose_run(request: Request, ground: Ground, target: str, notes: list[str]) -> tuple[Layer, ...]:
    """The layers that become one, from the top down, the last one being what they are committed into."""
    layers = ground.chains[target]
    if request.top or request.base:
        top = _find(layers, request.top, target, ground) if request.top else 0
        base = _find(layers, request.base, target, ground) if request.base else len(layers) - 1
        if top > base:
            raise InvalidInput(
                f"top {request.top} lies below base {request.base}", advice="top is the layer nearer to the guest"
            )
        return layers[top : base + 1]
    keep = request.keep or 1
    if len(layers) <= keep:
        return ()
    base = len(layers) - 1
    while base > 0 and _strangers(ground, layers[base]):
        base -= 1
    if base < len(layers) - 1:
        lowest = layers[base + 1]
        readers = _strangers(ground, lowest)
        if _holds_own_snapshot(ground, lowest):
            raise shared(ground, target, str(lowest.path), readers)
        notes.append(
            f"{ground.domain.name}, disk {target}: {lowest.path} stays, since "
            + ", ".join(dict.fromkeys(str(reader) for reader in readers))
            + " reads it, too"
        )
    spare = min(len(layers) - keep, base)
    return layers[base - spare : base + 1]


def _strangers(ground: Ground, layer: Layer) -> list[Reader]:
    if layer.path is None:
        return [Reader("file", f"{layer.kind} image that is not local")]
    return [
        *ground.graph.strangers(layer.path, ground.domain.uuid),
        *ground.opened.get(canonical(layer.path), ()),
    ]


def _holds_own_snapshot(ground: Ground, layer: Layer) -> bool:
    """Whether the layer is one that a merge was expected of: the content of a snapshot of this very domain."""
    return layer.path is not None and any(
        reader.kind == "snapshot" and reader.uuid == ground.domain.uuid for reader in ground.graph.named_by(layer.path)
    )
