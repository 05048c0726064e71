# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How runs of layers become one where the guest's security profile forbids to write them: pulled, offline, or not at all.

Where nothing is forbidden they are committed, live or, of a stopped domain, offline.  libvirt before 12.1 denies a running
guest every layer that it was started on, and denies all lower layers again when a commit below the active layer or a pull
ends (docs/apparmor.md).  Hence the order: active commits, commits below, pulls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .._errors import Busy, Refused
from ..hypervisor import checkpoints
from ..hypervisor.domain_model import Layer
from ..safety.host_graph import canonical
from ..safety.names import file_stem
from ..safety.space import human
from .ground import Ground
from .merge_plan import Merge
from .plan import LEAST_RESERVE, refuse_other_disks

LIVE, PULL, OFFLINE = "live", "pull", "offline"

#: Types of block jobs, as :func:`..hypervisor.block_jobs.job_of` tells them.
_COMMITS = ("commit", "active-commit")


@dataclass(frozen=True)
class Way:
    """How these runs are merged. ``checkpoints_ended`` and ``restart`` as in :class:`~.merge_plan.Work`."""

    merges: tuple[Merge, ...]
    restart: bool = False
    checkpoints_ended: tuple[str, ...] = ()

    def method(self, ground: Ground, merge: Merge) -> str:
        """``live``, ``pull`` or ``offline``."""
        if merge.pull:
            return PULL
        return LIVE if not self.restart and _live_layers(ground, merge) is not None else OFFLINE

    def notes(self, ground: Ground) -> list[str]:
        """What the user must know of it."""
        name = ground.domain.name
        found = [
            f"{name}, disk {merge.target}: {path} is no longer used and was left, since it is the disk's own image;"
            f" its content is in {merge.top} now"
            for merge in self.merges
            for path in left_behind(ground, merge)
        ]
        if self.checkpoints_ended:
            found.append(
                f"{name}: a pull across layers ends the checkpoints {', '.join(self.checkpoints_ended)};"
                " the next incremental backup is a full one"
            )
        return found


def choose_way(ground: Ground, merges: Sequence[Merge], *, allow_restart: bool) -> Way:
    """Decide, or raise before anything is changed. Pure."""
    way = _choose(ground, merges, allow_restart=allow_restart)
    for merge in way.merges:
        _check_job(ground, merge, way)
    return way


def _choose(ground: Ground, merges: Sequence[Merge], *, allow_restart: bool) -> Way:
    denied = {merge.target: path for merge in merges if (path := _denied(ground, merge)) is not None}
    if not denied:
        return Way(tuple(sorted(merges, key=lambda merge: _order(ground, merge))))
    obstacle = _obstacle_to_pull(ground, [merge for merge in merges if merge.target in denied])
    if obstacle is None:
        chosen = [_pulled(ground, merge) if merge.target in denied else merge for merge in merges]
        return Way(
            tuple(sorted(chosen, key=lambda merge: _order(ground, merge))),
            checkpoints_ended=ground.domain.checkpoints,
        )
    target, path = next(iter(denied.items()))
    reason = f"AppArmor lets the running guest only read {path}, and {obstacle}"
    if allow_restart and ground.domain.persistent:
        if ground.next_start is not None:
            live = [merge.target for merge in merges if _live_layers(ground, merge) is not None]
            refuse_other_disks(ground.domain, ground.next_start, live)
        why = f"{reason}; the guest was shut down for it and started again"
        return Way(tuple(replace(merge, why=why) for merge in merges), restart=True)
    raise Refused(
        f"The layers of disk {target!r} of domain {ground.domain.name!r} cannot be merged while it runs: {reason}",
        advice="Shut the domain down and run this again"
        + (", or let the task do so (allow_restart: true)" if ground.domain.persistent else ""),
        denied=sorted(denied.values()),
    )


def left_behind(ground: Ground, merge: Merge) -> tuple[str, ...]:
    """Of the files that leave the chain, those that are not ours to delete: a disk's own image, after a pull.

    What was put over another image is a layer; an image that stands on nothing is one only if it has the name of an overlay
    of ours, which an earlier pull has made stand on nothing.
    """
    if not merge.pull or merge.below is not None:
        return ()
    stem = file_stem(ground.domain.name, merge.target) + "."
    name = merge.base.rpartition("/")[2]
    return () if name.startswith(stem) and name[len(stem) :].endswith(".qcow2") else (merge.base,)


def _live_layers(ground: Ground, merge: Merge) -> tuple[Layer, ...] | None:
    """The live chain that the run is part of; None where the guest does not run on it."""
    if not ground.domain.state.active:
        return None
    layers = ground.chains.get(merge.target, ())
    used = {canonical(layer.path) for layer in layers if layer.path}
    return layers if {canonical(merge.top), canonical(merge.base)} <= used else None


def _is_active(ground: Ground, merge: Merge) -> bool:
    return ground.in_use(merge.target)[:1] == (canonical(merge.top),)


def _order(ground: Ground, merge: Merge) -> int:
    if merge.pull:
        return 2
    return 0 if _is_active(ground, merge) or _live_layers(ground, merge) is None else 1


def _denied(ground: Ground, merge: Merge) -> str | None:
    """The layer that QEMU would have to write and may not."""
    if _live_layers(ground, merge) is None or ground.jobs.get(merge.target) in _COMMITS:
        return None  # a job that runs has its files open already
    written = [merge.base]
    if not _is_active(ground, merge):
        # The layer above gets another backing file; the active one may always be written.
        used = ground.in_use(merge.target)
        written += [path for path in merge.above if path in used[1:]]
    return next((path for path in written if canonical(path) in ground.denied), None)


def _check_job(ground: Ground, merge: Merge, way: Way) -> None:
    """Refuse a disk that a job runs on already, unless it is the very one that this merge would begin: that is taken up."""
    running = ground.jobs.get(merge.target)
    if running is None:
        return
    expected = None
    if way.method(ground, merge) == PULL:
        expected = "pull"
    elif way.method(ground, merge) == LIVE:
        expected = "active-commit" if _is_active(ground, merge) else "commit"
    disk = ground.domain.disk(merge.target)
    mirror = disk.job if disk is not None else None
    into = canonical(mirror.destination) if mirror is not None and mirror.destination else None
    if running != expected or (running == "active-commit" and into != canonical(merge.base)):
        raise Busy(
            f"Disk {merge.target!r} of domain {ground.domain.name!r} has another block job running ({running})",
            advice="Wait for it (domain_job shows it), then run this again",
        )


def _obstacle_to_pull(ground: Ground, merges: Sequence[Merge]) -> str | None:
    """Why these runs cannot all be pulled into the active layer; None when they can."""
    domain = ground.domain
    needs: dict[int, int] = {}
    for merge in merges:
        if not _is_active(ground, merge):
            return (
                f"a pull reaches the active layer only, not {merge.top}, which"
                f" {_holders(ground, merge.top) or 'the task wants to keep apart'}"
            )
        if _under(ground, merge) and _under(ground, merge)[0].path is None:
            return f"what {merge.base} stands on is not a local image"
        image = ground.image(merge.top)
        needs[image.device] = needs.get(image.device, LEAST_RESERVE) + sum(
            ground.image(path).allocated for path in (*merge.merged[1:], merge.base)
        )
        if image.free < needs[image.device]:
            return f"a pull into {merge.top} may need {human(needs[image.device])}, where {human(image.free)} are free"
    foreign = [name for name in domain.checkpoints if not name.startswith(checkpoints.OURS)]
    if foreign:
        return f"a pull would make increments since checkpoint {', '.join(foreign)} lose data"
    return None


def _holders(ground: Ground, path: str) -> str:
    names = [repr(reader.name) for reader in ground.graph.named_by(path) if reader.kind == "snapshot"]
    return f"snapshot {', '.join(names)} holds" if names else ""


def _under(ground: Ground, merge: Merge) -> tuple[Layer, ...]:
    """The layers below the run."""
    layers = ground.chains[merge.target]
    paths = [canonical(layer.path) if layer.path else None for layer in layers]
    return layers[paths.index(canonical(merge.base)) + 1 :]


def _pulled(ground: Ground, merge: Merge) -> Merge:
    under = _under(ground, merge)
    return replace(
        merge,
        pull=True,
        below=under[0].path if under else None,
        below_format=under[0].format if under else None,
        why=f"AppArmor lets the running guest only read {_denied(ground, merge)}, so its content was pulled into {merge.top}",
    )
