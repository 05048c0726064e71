# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What going back to a snapshot does, decided from facts alone.

libvirt before 9.9 cannot revert to an external snapshot, so this is done by our own hand and the same way everywhere: a
fresh overlay above the layer that holds the snapshot's content, which is never written, so that one can go back to it
again.  The disks follow the snapshot; the rest of the definition stays today's, unless memory is resumed: then the
running guest is the one of that moment, and its next start is today's again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .._errors import Busy, NotFound, Refused, Unsupported
from ..safety.host_graph import Reader, canonical, unneeded
from ..safety.names import file_stem
from .ground import Ground, refuse_unsettled
from .model import Snapshot, SnapshotDisk, by_name
from .plan import overlay_directory, reserve, unused_path


@dataclass(frozen=True)
class Request:
    """The task's options, checked."""

    name: str
    keep_present_as: str | None = None
    allow_restart: bool = True


@dataclass(frozen=True)
class FreshOverlay:
    """The overlay to make for one disk; ``size`` in bytes, ``bitmaps`` are those that go on recording in it."""

    target: str
    path: str
    base: str
    base_format: str
    size: int
    bitmaps: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FreshOverlay:
        """As the journal keeps it."""
        return cls(**{**value, "bitmaps": tuple(value["bitmaps"])})


@dataclass(frozen=True)
class RevertPlan:
    """Everything that will be done to one domain.

    ``start``: ``resume`` (from memory), ``resume-paused``, ``boot`` or ``off``.  ``discarded``: files of the present that
    nobody needs any more; ``left``: images of the present that are not ours to delete.  ``nvram``: the snapshot's copy of the UEFI
    variables, and the domain's file that becomes it.  ``alone``: no other domain goes back in the same task, so the mark of the kept
    present goes with this one's journal.
    """

    snapshot: str
    internal: bool
    overlays: tuple[FreshOverlay, ...]
    memory_file: str | None
    start: str
    running: bool
    checkpoints_ended: tuple[str, ...]
    discarded: tuple[str, ...]
    left: tuple[str, ...]
    kept_as: str | None = None
    alone: bool = True
    nvram: tuple[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RevertPlan:
        """From the journal."""
        return cls(
            **{
                **value,
                "overlays": tuple(FreshOverlay.from_json(one) for one in value["overlays"]),
                "checkpoints_ended": tuple(value["checkpoints_ended"]),
                "discarded": tuple(value["discarded"]),
                "left": tuple(value["left"]),
                "nvram": tuple(value["nvram"]) if value.get("nvram") else None,
            }
        )

    def needs(self) -> list[tuple[str, int]]:
        """``(directory, bytes)`` that must be free."""
        return [(os.path.dirname(overlay.path), reserve(overlay.size)) for overlay in self.overlays]


def plan_revert(request: Request, ground: Ground, exists: Callable[[str], bool] = os.path.lexists) -> RevertPlan:
    """Decide, or raise why not, before anything is changed."""
    domain = ground.domain
    snapshot = _find(request, ground)
    refuse_unsettled(ground)
    if not domain.persistent:
        raise Refused(
            f"Domain {domain.name!r} is transient: it would be gone once it is stopped",
            advice="Define it first",
        )
    for disk in domain.disks:
        if disk.job is not None:
            raise Busy(
                f"Disk {disk.target!r} of domain {domain.name!r} has a running block job ({disk.job.job})",
                advice="Wait for it or cancel it (domain_job), then run this again",
            )
    if snapshot.mode == "internal":
        return _plan_internal(request, ground, snapshot)
    _check_external(ground, snapshot)
    start = _choose_start(request, ground, snapshot)
    kept, ended = _checkpoints(ground, snapshot)
    overlays = tuple(_overlay(ground, snapshot, disk, kept, exists) for disk in snapshot.captured)
    discarded, left = _discarded(ground, overlays)
    return RevertPlan(
        snapshot=snapshot.name,
        internal=False,
        overlays=overlays,
        memory_file=snapshot.memory_file,
        start=start,
        running=domain.state.active,
        checkpoints_ended=ended,
        discarded=discarded,
        left=left,
        kept_as=request.keep_present_as,
        nvram=_nvram(ground, snapshot),
    )


def _nvram(ground: Ground, snapshot: Snapshot) -> tuple[str, str] | None:
    """The variables that come back; None where the snapshot holds none, or the domain has no place for them any more."""
    present = ground.domain.nvram
    if snapshot.nvram is None or present is None or present.format != "raw":
        return None
    return snapshot.nvram, present.path


def _find(request: Request, ground: Ground) -> Snapshot:
    name = ground.domain.name
    snapshot = by_name(ground.snapshots, request.name)
    if snapshot is None:
        existing = [one.name for one in ground.snapshots]
        raise NotFound(
            f"Domain {name!r} has no snapshot {request.name!r}",
            advice="Its snapshots are: " + (", ".join(existing) if existing else "none"),
            existing=existing,
        )
    if snapshot.labels is not None and snapshot.labels.ending:
        raise Refused(
            f"Snapshot {request.name!r} of domain {name!r} is being removed: its layers may be merged in part",
            advice="Finish that with state: absent",
        )
    if not snapshot.captured:
        raise Refused(f"Snapshot {request.name!r} of domain {name!r} holds no disk", advice="Choose another one")
    return snapshot


def _check_external(ground: Ground, snapshot: Snapshot) -> None:
    name = ground.domain.name
    for disk in snapshot.captured:
        if disk.mode != "external" or disk.base is None:
            raise Unsupported(
                f"Disk {disk.target!r} of snapshot {snapshot.name!r} of domain {name!r} is kept as {disk.mode!r} and not as a layer",
                advice="Go back to it with the tool that made it",
            )
        if ground.domain.disk(disk.target) is None:
            raise Refused(
                f"Snapshot {snapshot.name!r} holds disk {disk.target!r}, which domain {name!r} does not have any more",
                advice="Attach a disk with that target first; its content will be the snapshot's",
            )
        for layer in ground.graph.chain(disk.base):
            if not os.path.exists(layer):
                raise Refused(
                    f"Snapshot {snapshot.name!r} of domain {name!r} cannot be gone back to: {layer} is missing",
                    advice="Restore it from a backup first",
                )
    if snapshot.memory_file and not os.path.exists(snapshot.memory_file):
        raise Refused(
            f"The memory of snapshot {snapshot.name!r} of domain {name!r} is missing: {snapshot.memory_file}",
            advice="Restore it from a backup first",
        )
    if snapshot.nvram and not os.path.exists(snapshot.nvram):
        raise Refused(
            f"The UEFI variables of snapshot {snapshot.name!r} of domain {name!r} are missing: {snapshot.nvram}",
            advice="Restore them from a backup first, or put a copy of the domain's present ones there",
        )


def _choose_start(request: Request, ground: Ground, snapshot: Snapshot) -> str:
    if snapshot.memory_mode != "no":
        return "resume-paused" if snapshot.state == "paused" else "resume"
    if not ground.domain.state.active:
        return "off"
    if not request.allow_restart:
        raise Refused(
            f"Domain {ground.domain.name!r} is {ground.domain.state.name}, and snapshot {snapshot.name!r} holds no memory:"
            " going back to it means to stop the guest at once and boot it again",
            advice="Allow it (allow_restart: true), or shut the guest down first",
        )
    return "boot"


def _checkpoints(ground: Ground, snapshot: Snapshot) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which checkpoints go on, and which end: a checkpoint goes on if every layer that one goes back to has its bitmap."""
    held = [set(ground.image(disk.base).bitmaps) for disk in snapshot.captured if disk.base is not None]
    kept = tuple(name for name in ground.domain.checkpoints if all(name in bitmaps for bitmaps in held))
    return kept, tuple(name for name in ground.domain.checkpoints if name not in kept)


def _overlay(
    ground: Ground, snapshot: Snapshot, disk: SnapshotDisk, kept: Sequence[str], exists: Callable[[str], bool]
) -> FreshOverlay:
    base = str(disk.base)
    size = ground.image(base).size
    if size is None:
        raise Refused(f"The size of {base} cannot be read", advice="Check it with qemu-img check before anything else")
    if disk.overlay and os.path.isdir(os.path.dirname(disk.overlay)):
        directory = os.path.dirname(disk.overlay)
    else:
        directory = overlay_directory(base)
    stem = file_stem(ground.domain.name, disk.target, snapshot.name)
    return FreshOverlay(
        target=disk.target,
        path=unused_path(directory, stem, ".qcow2", exists),
        base=base,
        base_format=disk.base_format or "raw",
        size=size,
        bitmaps=tuple(kept),
    )


def _discarded(ground: Ground, overlays: Sequence[FreshOverlay]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of the present that nobody needs once the domain stands on ``overlays``, and those that are not ours."""
    domain = ground.domain
    me = Reader("domain", domain.name, domain.uuid)
    named = dict(ground.graph.named)
    below = dict(ground.graph.below)
    candidates: list[str] = []
    tops: list[str] = []
    for overlay in overlays:
        chain = ground.in_use(overlay.target)
        for path in chain:
            if me in named.get(path, ()):
                named[path] = tuple(reader for reader in named[path] if reader != me)
        candidates += [path for path in chain if path not in candidates]
        tops += chain[:1]
        named[overlay.path] = (me,)
        below[overlay.path] = canonical(overlay.base)
    after = replace(ground.graph, named=named, below=below)
    discarded = unneeded(after, candidates)
    left = tuple(path for path in tops if path not in discarded and not after.readers(path))
    return discarded, left


# --- internal --------------------------------------------------------------------------------------------------------


def _plan_internal(request: Request, ground: Ground, snapshot: Snapshot) -> RevertPlan:
    """libvirt goes back to an internal snapshot itself; what it does not see coming is refused here."""
    domain = ground.domain
    for disk in snapshot.captured:
        present = domain.disk(disk.target)
        if (
            present is None
            or present.path is None
            or disk.base is None
            or canonical(present.path) != canonical(disk.base)
        ):
            raise Refused(
                f"The internal snapshot {snapshot.name!r} of domain {domain.name!r} lies in {disk.base},"
                f" and disk {disk.target!r} stands on another layer now",
                advice="Merge the layers above it first (blockcommit), or remove the external snapshots",
            )
        others = [
            str(reader)
            for reader in ground.graph.readers(disk.base)
            if not (reader.uuid == domain.uuid and (reader.kind == "domain" or _is_internal(ground, reader)))
        ]
        if others:
            raise Refused(
                f"Going back to the internal snapshot {snapshot.name!r} rewrites {disk.base}, which {', '.join(others)} reads",
                advice="Remove those first",
            )
        if domain.checkpoints or ground.image(disk.base).bitmaps:
            raise Refused(
                f"Disk {disk.target!r} of domain {domain.name!r} has dirty bitmaps (checkpoints of incremental backups),"
                " and going back to an internal snapshot under them kills QEMU",
                advice="Remove its checkpoints first; the next backup is then a full one",
                checkpoints=list(domain.checkpoints),
            )
    with_memory = snapshot.memory_mode == "internal"
    if domain.state.active and not with_memory and not request.allow_restart:
        raise Refused(
            f"Domain {domain.name!r} is {domain.state.name}, and snapshot {snapshot.name!r} holds no memory:"
            " going back to it means to stop the guest at once and boot it again",
            advice="Allow it (allow_restart: true), or shut the guest down first",
        )
    if with_memory:
        start = "resume-paused" if snapshot.state == "paused" else "resume"
    else:
        start = "boot" if domain.state.active else "off"
    return RevertPlan(
        snapshot=snapshot.name,
        internal=True,
        overlays=(),
        memory_file=None,
        start=start,
        running=domain.state.active,
        checkpoints_ended=(),
        discarded=(),
        left=(),
        kept_as=request.keep_present_as,
    )


def _is_internal(ground: Ground, reader: Reader) -> bool:
    found = by_name(ground.snapshots, reader.name) if reader.kind == "snapshot" else None
    return found is not None and found.mode == "internal"
