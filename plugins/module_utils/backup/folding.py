# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Take points out of their chains. What is left to do is read from the tree, so every step can be repeated.

A point that goes ceases to exist with the rename of its manifest, before the first byte changes. Then, disk by disk, the
images that stay are merged with what they stand on (``folding_plan``): seen through the top they hold the same at every
instant. Readers that come in between find each image as it lies (``repository``).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .._errors import Refused
from ..hypervisor import image_node, qemu_img
from ..hypervisor.image_header import read_qcow2
from ..hypervisor.image_node import Image, Keys, Passphrase
from ..safety import host_graph, places, processes, space
from ..safety.journal import Journal
from . import digests, manifest, stored, verifying
from .folding_plan import COPY, FOLD, POUR, REPLACING, Merge, RemovalPlan, plan_removal
from .manifest import Point, StoredDisk
from .repository import GOING, GONE, MANIFEST, History, Repository, put_away, sweep


def finish(
    repository: Repository,
    domain_uuid: str,
    identifiers: Iterable[str],
    journal: Journal,
    passphrase: Passphrase | None = None,
) -> None:
    """Remove points, and whatever an earlier run left half removed. Call it with the lock of the points held alone.

    ``passphrase`` opens encrypted images that must be merged; raises :class:`InvalidInput` without it.
    """
    directory = repository.domain_directory(domain_uuid)
    again = bool(repository.history(domain_uuid).going)
    journal.step("hide")
    for identifier in sorted(identifiers):
        _hide(os.path.join(directory, identifier))
    history = repository.history(domain_uuid)
    plan = plan_removal(history.points, history.going)
    require_whole(repository, history, plan)
    require_opening(repository, history, plan, passphrase)
    for merge in plan.merges:
        journal.step("merge", point=merge.point, target=merge.target, how=merge.how)
        _Merging(repository, domain_uuid, history, merge, passphrase).run(again=again)
        if merge.how in REPLACING:
            journal.step("replace", point=merge.point, target=merge.target)
            _replace(directory, merge)
    history = repository.history(domain_uuid)
    for point in history.points:
        if point.id in history.lagging:
            journal.step("describe", point=point.id)
            _describe(repository, history, point, passphrase)
    for point in sorted(history.going, key=lambda one: -one.sequence):
        journal.step("discard", point=point.id)
        put_away(repository, domain_uuid, point.id)
    sweep(repository, domain_uuid)


def _hide(directory: str) -> None:
    shown = os.path.join(directory, MANIFEST)
    if os.path.lexists(shown):
        os.rename(shown, os.path.join(directory, GOING))
        places.fsync_directory(directory)


class _Merging:
    """One image that stays takes over what it needs of those that go."""

    def __init__(
        self,
        repository: Repository,
        domain_uuid: str,
        history: History,
        merge: Merge,
        passphrase: Passphrase | None,
    ) -> None:
        self._repository = repository
        self._directory = repository.domain_directory(domain_uuid)
        self._history = history
        self._merge = merge
        self._passphrase = passphrase
        self._disk = self._stored(merge.point)
        self._top = self._image(merge.point)
        self._doing = f"Merging disk {merge.target!r} of point {merge.point} with the points below it"

    def _stored(self, identifier: str) -> StoredDisk:
        point = self._history.holder(identifier)
        disk = point.disk(self._merge.target) if point is not None else None
        if disk is None:
            raise Refused(f"Point {identifier} does not hold disk {self._merge.target!r}")
        return disk

    def _image(self, identifier: str) -> Image:
        encrypted = self._stored(identifier).encryption is not None
        path = os.path.join(self._directory, identifier, self._disk.file)
        return Image(path, "qcow2", self._passphrase if encrypted else None)

    def run(self, *, again: bool) -> None:
        """``again``: an earlier run may have been killed while it wrote, which leaks clusters and loses nothing."""
        self._merge_sums()
        merge, disk = self._merge, self._disk
        written = self._image(merge.ground) if merge.how in REPLACING else self._top
        processes.wait_released([written.path, self._top.path])
        if merge.how == POUR:
            self._pour(written)
        elif merge.how == FOLD:
            # -d: the top keeps its content until the other file takes its place.
            self._run("commit", "-d", "-f", "qcow2", "-b", str(disk.link(merge.ground)), self._top.path)
        else:
            # Safe rebase (no -u): it compares old and new ground and takes over what differs, then changes the link.
            onto = [] if merge.how == COPY else ["-F", "qcow2"]
            self._run("rebase", "-f", "qcow2", *onto, "-b", disk.link(merge.onto) or "", self._top.path)
        if again:
            with Keys() as keys:
                name = image_node.as_name(image_node.node([written], keys))
                self._run("check", "-r", "leaks", name, keys=keys)
        places.fsync_file(written.path)

    def _run(self, *arguments: str, keys: Keys | None = None, pass_fds: Sequence[int] = ()) -> None:
        words = [arguments[0], "-q", *arguments[1:]]
        qemu_img.run(words, doing=self._doing, keys=keys, pass_fds=pass_fds, with_caller=True)

    def _pour(self, ground: Image) -> None:
        """From the bottom up, each layer into the lowest: what is written there lies below the layer that says the same."""
        size = self._disk.virtual_size
        self._grow(ground, size)
        for identifier in (*reversed(self._merge.through[:-1]), self._merge.point):
            compression = self._stored(identifier).compression
            layer = self._image(identifier)
            own_size = read_qcow2(layer.path).virtual_size
            held = qemu_img.held_ranges(layer) if compression is not None else []
            if qemu_img.writes_last_cluster(own_size, compression) and not (
                own_size == size and any(start + length == size for start, length in held)
            ):
                # Compressed, that cluster would be zeros over what lies below, or could not be written in the middle of the ground.
                compression = None
            if compression is not None:
                qemu_img.discard(ground.path, held, doing=self._doing)
            qemu_img.copy_layer(
                layer,
                ground,
                size,
                backing=str(self._disk.link(self._merge.ground)),
                compression=compression,
                over=True,
                doing=self._doing,
            )

    def _grow(self, image: Image, size: int) -> None:
        before = read_qcow2(image.path).virtual_size
        if before >= size:
            return
        blank = image_node.blank_descriptor(before)
        try:
            with Keys() as keys:
                node = image_node.node([image], keys, below=image_node.blank_node(blank))
                self._run("resize", "--image-opts", image_node.as_options(node), str(size), keys=keys, pass_fds=[blank])
        finally:
            os.close(blank)

    def _merge_sums(self) -> None:
        """The digests of a run of layers laid over each other are right before, while and after they are merged."""
        merge, disk = self._merge, self._disk
        below: digests.Sums | None = None
        for identifier in reversed((merge.point, *merge.through)):
            own = digests.read_sums(os.path.join(self._directory, identifier, disk.sums))
            below = own if below is None else own.over(below)
        if below is None:
            return
        path = os.path.join(self._directory, merge.point, disk.sums)
        part = os.path.join(self._directory, merge.point, f".{disk.sums}.new")
        places.unlink_quietly(part)
        digests.write_sums(part, below)
        os.replace(part, path)
        places.fsync_directory(os.path.dirname(path))


def _replace(directory: str, merge: Merge) -> None:
    """The file that was the oldest image becomes this one's: what stands on it never sees another name or content."""
    name = f"{merge.target}.qcow2"
    os.rename(os.path.join(directory, merge.ground, name), os.path.join(directory, merge.point, name))
    places.fsync_directory(os.path.join(directory, merge.point))
    places.fsync_directory(os.path.join(directory, merge.ground))


def _describe(repository: Repository, history: History, point: Point, passphrase: Passphrase | None) -> None:
    """The manifest says what lies there now. A proof of the images as they were is none of what they are."""
    where = repository.point_directory(point.domain_uuid, point.id)
    if places.unlink_quietly(os.path.join(where, "verify.json")):
        places.fsync_directory(where)
    disks = []
    for disk in point.disks:
        if disk.metadata is None:
            lineage = history.lineage(point, disk.target)
            disk = _measured(disk, stored.images_of(repository, lineage, disk.target, passphrase))
        disks.append(disk)
    places.write_json(os.path.join(where, MANIFEST), manifest.to_json(point.with_disks(disks)))


def _measured(disk: StoredDisk, layers: Sequence[Image]) -> StoredDisk:
    own = [extent for extent in digests.extents_of(layers) if extent.depth == 0]
    return replace(
        disk,
        stored_bytes=space.allocated(layers[0].path),
        changed_bytes=sum(extent.length for extent in own if extent.data or disk.parent is not None),
    )


# --- before anything is changed --------------------------------------------------------------------------------------


def require_whole(repository: Repository, history: History, plan: RemovalPlan) -> None:
    """Refuse where an image that would be merged is missing, damaged, or stands on something else than it should.

    The headers are read by our own parser before any tool follows what they say.
    """
    for merge in plan.merges:
        for identifier in (merge.point, *merge.through, *([merge.onto] if merge.onto else ())):
            point = history.holder(identifier)
            findings = verifying.check_link(repository, point, merge.target) if point is not None else []
            if findings:
                raise Refused(
                    f"Point {merge.point} cannot be merged with what it stands on: {findings[0].problem}",
                    advice=f"Look at it; where point {merge.point} is lost anyway, remove it first",
                    point=merge.point,
                )


def require_opening(repository: Repository, history: History, plan: RemovalPlan, passphrase: Passphrase | None) -> None:
    """Raise :class:`InvalidInput` unless the passphrase opens every encrypted image that must be merged."""
    for merge in plan.merges:
        point = history.holder(merge.point)
        disk = point.disk(merge.target) if point is not None else None
        if point is not None and disk is not None and disk.encryption is not None:
            stored.require_opening(
                repository,
                point,
                [merge.target],
                passphrase,
                advice="Give the passphrase that it was backed up with, so that it can be merged with what it stands on",
            )


def require_room(repository: Repository, plan: RemovalPlan) -> None:
    """Refuse where what is merged would not fit beside the old files."""
    if plan.needed:
        space.require([(repository.path, plan.needed)], "Merging points that stay with those that go")


def require_unread(connection: Any, repository: Repository, domain_uuid: str, leaving: Collection[str]) -> None:
    """Refuse, naming who, where anybody but the points themselves reads an image that will be changed or go.

    A domain that was restored instantly runs on the repository's images long after the module has ended, and holds no
    lock of ours. ``leaving``: ids, also of directories that cannot be read as points.
    """
    directory = repository.domain_directory(domain_uuid)
    history = repository.history(domain_uuid)
    own = {
        host_graph.canonical(os.path.join(directory, point.id, disk.file))
        for point in (*history.points, *history.going)
        for disk in point.disks
    }
    images = [
        os.path.join(directory, identifier, name)
        for identifier in sorted({*leaving, *(point.id for point in history.going)})
        for name in _images(os.path.join(directory, identifier))
    ]
    going = {host_graph.canonical(image) for image in images}
    graph = host_graph.read_graph(connection, _directories(directory))
    touched: dict[str, None] = {}
    for image in images:
        for layer in graph.above(image):
            touched[layer] = None
            readers = graph.named_by(layer)
            if not readers and layer not in own | going and graph.below[layer] not in own - going:
                # What stands on an image that stays keeps its content; this one would lose it.
                readers = (host_graph.Reader("file", layer),)
            if readers:
                raise _in_use(image, readers[0])
    # Also by the domain's own QEMU: one that was restored instantly may have the original's UUID.
    for path, by in host_graph.openers(touched, besides="").items():
        raise _in_use(path, by[0])


def _in_use(path: str, reader: host_graph.Reader) -> Refused:
    return Refused(
        f"{path} is read by {reader}, so no point that it is part of can be removed or merged now",
        advice="Wait until it is done with it (a domain restored instantly: until its disks are local), then run this again",
        reader=reader.as_result(),
        path=path,
    )


def _images(directory: str) -> Sequence[str]:
    try:
        return sorted(name for name in os.listdir(directory) if name.endswith(".qcow2"))
    except FileNotFoundError:
        return ()


def _directories(directory: str) -> list[str]:
    return [
        entry.path
        for entry in os.scandir(directory)
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(GONE)
    ]
