# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which layers may become one, and what else has to follow. Pure: from facts to a plan that a journal can hold.

Committing a run of layers into the one below it changes the content of every layer of the run but its top.  So it is
allowed only where nobody reads those layers but through the top, and every snapshot that they held ends.

The same run can be merged upwards (:attr:`Merge.pull`) where its base must not be written: then its content is copied into
the active layer, and the base goes with the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .._errors import Busy, Refused, Unsupported
from ..hypervisor.domain_model import Layer
from ..safety.host_graph import Reader, canonical
from .ground import Ground
from .model import Snapshot


@dataclass(frozen=True)
class Merge:
    """One run of layers of one disk. ``merged`` stand on ``base``, from the top down; ``above`` stands on the top.

    With ``pull`` the run becomes its top, which then stands on ``below`` (what the base stood on, None if on nothing);
    else it becomes its base.  ``why`` is the reason for the way that was chosen, where there was a choice.
    """

    target: str
    base: str
    base_format: str
    merged: tuple[str, ...]
    above: tuple[str, ...] = ()
    pull: bool = False
    below: str | None = None
    below_format: str | None = None
    why: str = ""

    @property
    def top(self) -> str:
        """The uppermost layer of the run: its content is what remains."""
        return self.merged[0]

    @property
    def gone(self) -> tuple[str, ...]:
        """The files that leave the chain, from the top down."""
        return (*self.merged[1:], self.base) if self.pull else self.merged

    @property
    def remains(self) -> Layer:
        """The image that the run becomes."""
        path, image_format = (self.top, "qcow2") if self.pull else (self.base, self.base_format)
        return Layer(path, image_format, "block" if path.startswith("/dev/") else "file")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Merge:
        """As the journal keeps it."""
        return cls(**{**value, "merged": tuple(value["merged"]), "above": tuple(value["above"])})


@dataclass(frozen=True)
class Rebased:
    """A snapshot whose content moves from a layer that goes into the one that it was merged into."""

    snapshot: str
    target: str
    path: str
    format: str


@dataclass(frozen=True)
class Work:
    """All that an operation does to one domain's layers. ``ended`` are snapshots; ``files`` go if nobody needs them.

    ``restart``: the guest is shut down, its layers are merged offline, and it is started again.  ``checkpoints_ended``
    would lose changes by a pull.
    """

    merges: tuple[Merge, ...] = ()
    rebased: tuple[Rebased, ...] = ()
    ended: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    bandwidth: int = 0
    restart: bool = False
    checkpoints_ended: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Work:
        """From the journal."""
        return cls(
            merges=tuple(Merge.from_json(one) for one in value["merges"]),
            rebased=tuple(Rebased(**one) for one in value["rebased"]),
            ended=tuple(value["ended"]),
            files=tuple(value["files"]),
            bandwidth=value["bandwidth"],
            restart=value.get("restart", False),
            checkpoints_ended=tuple(value.get("checkpoints_ended", ())),
        )


def plan_merge(ground: Ground, target: str, base: Layer, merged: Sequence[Layer], ending: Collection[str]) -> Merge:
    """Commit ``merged`` (from the top down, the last one stands on ``base``) into ``base``, or raise why not.

    ``ending`` are the snapshots of this domain that may lose their content by it.
    """
    name = ground.domain.name
    paths = [layer.path for layer in (*merged, base)]
    if any(path is None for path in paths):
        raise Unsupported(
            f"Disk {target!r} of domain {name!r} has a layer that is not a local file or block device",
            advice="Only local layers are merged",
        )
    run = [str(path) for path in paths]
    _check_whole(ground, target, run)
    _check_sole_reader(ground, target, run, ending)
    _check_closed(ground, target, run)
    _check_content(ground, target, run)
    return Merge(
        target=target,
        base=run[-1],
        base_format=base.format or "raw",
        merged=tuple(run[:-1]),
        above=ground.graph.children(run[0]),
    )


def _check_whole(ground: Ground, target: str, run: Sequence[str]) -> None:
    missing = [path for path in run if not ground.image(path).exists]
    if missing:
        raise Refused(
            f"The chain of disk {target!r} of domain {ground.domain.name!r} is broken: {missing[0]} is missing or unreadable",
            advice="Restore it from a backup before anything else",
        )


def _check_sole_reader(ground: Ground, target: str, run: Sequence[str], ending: Collection[str]) -> None:
    uuid, graph = ground.domain.uuid, ground.graph
    ending = {*ending, *(snapshot.name for snapshot in ground.snapshots if snapshot.mode == "internal")}
    strangers = graph.strangers(run[-1], uuid)
    if strangers:
        raise shared(ground, target, run[-1], strangers)
    for upper, layer in zip(run, run[1:]):
        branches = [child for child in graph.children(layer) if child != canonical(upper)]
        readers = [reader for child in branches for reader in graph.readers(child)]
        readers += [
            reader
            for reader in graph.named_by(layer)
            if not (
                reader.uuid == uuid and (reader.kind == "job" or (reader.kind == "snapshot" and reader.name in ending))
            )
        ]
        if branches and not readers:
            readers = [Reader("file", child) for child in branches]
        if readers:
            raise Refused(
                f"{layer} (disk {target!r} of domain {ground.domain.name!r}) must not be written: {_list(readers)} reads it",
                advice="Remove the snapshots that stand on it first, or choose a base above it",
                needed_by=[reader.as_result() for reader in readers],
            )


def shared(ground: Ground, target: str, path: str, strangers: Sequence[Reader]) -> Refused:
    """The refusal to write an image that is not this domain's alone."""
    return Refused(
        f"{path} (disk {target!r} of domain {ground.domain.name!r}) must not be written: {_list(strangers)} reads it, too",
        advice="Give one of the two an image of its own, or choose a base above it",
        needed_by=[reader.as_result() for reader in strangers],
    )


def _list(readers: Sequence[Reader]) -> str:
    names = list(dict.fromkeys(str(reader) for reader in readers))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_closed(ground: Ground, target: str, run: Sequence[str]) -> None:
    for path in run:
        foreign = ground.opened.get(canonical(path), ())
        if foreign:
            raise Busy(
                f"{path} (disk {target!r} of domain {ground.domain.name!r}) is open in {_list(foreign)}",
                advice="Let it finish or stop it, then run this again",
                holder=[reader.as_result() for reader in foreign],
            )


def _check_content(ground: Ground, target: str, run: Sequence[str]) -> None:
    """What a commit would lose or bring back from the dead."""
    sizes = [ground.image(path).size or 0 for path in run]
    for upper, lower, above, below in zip(run, run[1:], sizes, sizes[1:]):
        if above < below:
            raise Refused(
                f"{upper} is smaller ({above} bytes) than {lower} below it ({below} bytes):"
                f" merging them would give disk {target!r} its old size and old data back",
                advice="Grow the disk to at least its old size first",
            )
    for path in run[:-1]:
        if ground.image(path).internal_snapshots:
            raise Refused(
                f"{path} holds internal snapshots, which would be lost with it",
                advice="Remove them first with state: absent",
            )
    disk = ground.domain.disk(target)
    if disk is not None and disk.encrypted and not ground.domain.state.active:
        raise Unsupported(
            f"Disk {target!r} of domain {ground.domain.name!r} is encrypted and can be merged only while it runs",
            advice="Start the domain, then run this again",
        )


def follow_snapshots(ground: Ground, merges: Sequence[Merge], ended: Collection[str]) -> tuple[Rebased, ...]:
    """The snapshots whose content is the top of a merged run: they stay, and are found in its base from now on."""
    tops = {canonical(merge.top): merge for merge in merges}
    found = []
    for snapshot in ground.snapshots:
        for disk in snapshot.captured:
            merge = tops.get(canonical(disk.base)) if disk.base else None
            if merge is not None and not merge.pull and snapshot.name not in ended:
                found.append(Rebased(snapshot.name, disk.target, merge.base, merge.base_format))
    return tuple(found)


def losing(ground: Ground, run: Collection[str]) -> list[Snapshot]:
    """The snapshots whose content lies in one of these layers (canonical paths), parents first.

    An internal snapshot has clusters of its own, which a commit into its image leaves alone.
    """
    return [
        snapshot
        for snapshot in ground.snapshots
        if any(
            disk.base is not None and disk.mode != "internal" and canonical(disk.base) in run
            for disk in snapshot.captured
        )
    ]


def refuse_protected(ground: Ground, snapshots: Sequence[Snapshot], doing: str) -> None:
    """Raise if one of them is protected."""
    protected = [one.name for one in snapshots if one.labels is not None and one.labels.protected]
    if protected:
        raise Refused(
            f"{doing} domain {ground.domain.name!r} would end {', '.join(repr(name) for name in protected)},"
            f" which {'is' if len(protected) == 1 else 'are'} protected",
            advice="Take the protection away first (state: present with protected: false)",
            protected=protected,
        )
