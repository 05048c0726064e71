# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make several layers one: the effects of a :class:`~.merge_plan.Work`, live or offline.

Every effect looks at what is true first, so the whole can be run again after an interruption at any point; that is all
that settling it does.  The content seen through the top of a run is the same at every instant.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .._errors import LibvirtFailed, Refused, VmkeeperError
from ..hypervisor import block_jobs, chain, definition, qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, constant, explaining, open_connection
from ..hypervisor.domain_model import Disk, Layer, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety import places
from ..safety.host_graph import canonical, openers, read_graph
from ..safety.journal import Journal
from .merge_plan import Merge, Rebased, Work
from .model import Labels, by_name, read_snapshot, read_snapshots, with_base, write_labels

#: QEMU closes an image a moment after libvirt says that it has let go of it.
_CLOSING_SECONDS = 10.0


@dataclass
class Merged:
    """What was done. ``kept``: files that stay because somebody needs them, with the reason."""

    committed_bytes: dict[str, int] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


#: Kinds of operations in the journal that are a :class:`Work` and nothing else.
COMMIT = "blockcommit"
REMOVAL = "snapshot removal"


def run(handle: Any, work: Work, journal: Journal, *, seconds: float | None = None) -> Merged:
    """:func:`merge_all` from the journal's first step to its end.

    A commit that fails leaves a chain that is whole, so the journal is closed and the task may be asked again, or not.
    What fails after a commit stays in the journal for the next run to finish.
    """
    try:
        done = merge_all(handle, work, journal, seconds=seconds)
    except block_jobs.TookTooLong:
        raise
    except VmkeeperError as error:
        if (
            isinstance(error, block_jobs.NotBegun)
            and [step["name"] for step in journal.operation.steps].count("commit") == 1
        ):
            for name in work.ended:
                unmark_ending(handle, name)  # they are as whole as they were
        if journal.operation.steps[-1]["name"] in _BEFORE_A_COMMIT_IS_DONE:
            _close(handle, work, journal)
        raise
    journal.finish()
    return done


#: Steps at which every chain is whole and nothing is known to be merged that is not noted yet.
_BEFORE_A_COMMIT_IS_DONE = ("begin", "mark", "commit")


def _close(handle: Any, work: Work, journal: Journal) -> None:
    """End an operation that goes no further: what was merged before is noted, the rest stays as it is."""
    steps = journal.operation.steps
    finished = {step["disk"] for step in steps if step["name"] == "verify"} - {
        step["disk"] for step in steps[-1:] if step["name"] == "commit"
    }
    merges = [merge for merge in work.merges if merge.target in finished]
    for rebased in work.rebased:
        if any(rebased.path == merge.base for merge in merges):
            _rebase_snapshot(handle, rebased)
    remove_unneeded(handle, [path for merge in merges for path in merge.merged if path in work.files], Merged())
    journal.finish()


def abandon(uri: str, pending: Journal) -> dict[str, str]:
    """Cancel an operation that was stopped: its running jobs end and the chains stay as they are now."""
    handle = open_connection(uri).lookupByUUIDString(pending.operation.domains[0]["uuid"])
    work = Work.from_json(pending.operation.plan["work"])
    if pending.operation.steps[-1]["name"] not in _BEFORE_A_COMMIT_IS_DONE:
        return settle(uri, pending)
    for merge in work.merges:
        block_jobs.cancel(handle, merge.target)
    _close(handle, work, pending)
    return {"what": f"a {pending.operation.kind} in progress", "action": "cancelled"}


def settle(uri: str, pending: Journal) -> dict[str, str]:
    """Finish an interrupted run; returns ``{what, action}``."""
    connection = open_connection(uri)
    handle = connection.lookupByUUIDString(pending.operation.domains[0]["uuid"])
    run(handle, Work.from_json(pending.operation.plan["work"]), pending)
    return {"what": f"an interrupted {pending.operation.kind}", "action": "finished"}


def merge_all(handle: Any, work: Work, journal: Journal, *, seconds: float | None = None) -> Merged:
    """Do the work and return what was done; ``seconds`` limits the wait for each live job (it goes on all the same)."""
    done = Merged()
    if work.ended:
        # From the first byte of a commit on nobody may go back to them, whatever becomes of this run.
        journal.step("mark", snapshots=list(work.ended))
        for name in work.ended:
            mark_ending(handle, name)
    for merge in work.merges:
        done.committed_bytes[merge.target] = done.committed_bytes.get(merge.target, 0) + _allocated(merge.merged)
        journal.step("commit", disk=merge.target, base=merge.base)
        _commit(handle, merge, work, seconds)
        journal.step("relink", disk=merge.target)
        _relink(handle, merge)
        journal.step("verify", disk=merge.target)
        _verify(handle, merge)
    journal.step("snapshots")
    for rebased in work.rebased:
        _rebase_snapshot(handle, rebased)
    for name in work.ended:
        forget_snapshot(handle, name)
    journal.step("remove")
    remove_unneeded(handle, work.files, done)
    return done


def _allocated(paths: Sequence[str]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += os.stat(path).st_blocks * 512
    return total


# --- the commit itself -----------------------------------------------------------------------------------------------


def _commit(handle: Any, merge: Merge, work: Work, seconds: float | None) -> None:
    domain = read_domain(handle)
    disk = domain.disk(merge.target)
    if domain.state.active and disk is not None:
        same = {canonical(layer.path): layer.path for layer in disk.chain if layer.path}
        top, base = same.get(canonical(merge.top)), same.get(canonical(merge.base))
        if top is not None and base is not None:
            if canonical(disk.path or "") == canonical(merge.top):
                block_jobs.commit_active(handle, merge.target, base, bandwidth=work.bandwidth, seconds=seconds)
            else:
                block_jobs.commit_intermediate(
                    handle, merge.target, base, top, bandwidth=work.bandwidth, seconds=seconds
                )
            return
        if base is not None:
            return  # the top has left the chain: QEMU has done it
    if not _still_refers(handle, disk, merge):
        return
    _commit_offline(merge, work)


def _still_refers(handle: Any, disk: Disk | None, merge: Merge) -> bool:
    """Whether anybody still reads the run through its top; when nobody does, it was committed before."""
    top = canonical(merge.top)
    if not os.path.exists(top):
        return False
    named = disk is not None and disk.path is not None and canonical(disk.path) == top
    linked = any(_backing_of(path) == top for path in merge.above)
    held = any(
        part.base is not None and canonical(part.base) == top
        for snapshot in read_snapshots(handle)
        for part in snapshot.captured
    )
    return named or linked or held


def _backing_of(path: str) -> str | None:
    try:
        layers = chain.follow(Layer(path, "qcow2"))
    except VmkeeperError:
        return None
    return canonical(layers[1].path) if len(layers) > 1 and layers[1].path else None


def _commit_offline(merge: Merge, work: Work) -> None:
    doing = f"Committing {merge.top} into {merge.base}"
    for path in (*merge.merged, merge.base):
        _wait_for_qemu_img(path)
    # qemu-img records the commit in enabled bitmaps of the base and loses those that only the overlay has: they are put
    # aside, and what the overlay's had recorded is added to them.
    kept = _merge_bitmaps(merge) if merge.base_format == "qcow2" else {}
    arguments = ["commit", "-q", "-f", "qcow2", "-d"]
    if work.bandwidth:
        arguments += ["-r", str(work.bandwidth)]
    qemu_img.run([*arguments, "-b", merge.base, merge.top], doing=doing)
    for name, sources in kept.items():
        for source in sources:
            qemu_img.run(
                ["bitmap", "--merge", name, "-b", source, "-F", "qcow2", "-f", "qcow2", merge.base, name],
                doing=f"Keeping the dirty bitmap {name} of {source}",
            )
        qemu_img.run(
            ["bitmap", "--enable", "-f", "qcow2", merge.base, name], doing=f"Enabling the dirty bitmap {name} again"
        )


def _wait_for_qemu_img(path: str) -> None:
    """A run that was killed may have left the qemu-img that it had started at work on the same image."""
    while any("qemu-img" in reader.name for reader in openers([path], besides="").get(canonical(path), ())):
        time.sleep(0.1)


def _merge_bitmaps(merge: Merge) -> dict[str, list[str]]:
    """Disable, or add disabled, in the base every recording bitmap of the run; returns name -> images that have it."""
    found: dict[str, list[str]] = {}
    for path in merge.merged:
        with contextlib.suppress(OSError, BadHeader):
            for bitmap in read_qcow2(path).bitmaps:
                if bitmap.enabled and not bitmap.in_use:
                    found.setdefault(bitmap.name, []).append(path)
    if not found:
        return {}
    have = {bitmap.name: bitmap for bitmap in read_qcow2(merge.base).bitmaps}
    for name in list(found):
        if name in have and have[name].in_use:
            del found[name]  # broken by an unclean stop: it proves nothing, and merging into it fails
            continue
        arguments = ["--disable"] if name in have else ["--add", "--disable"]
        qemu_img.run(
            ["bitmap", *arguments, "-f", "qcow2", merge.base, name],
            doing=f"Putting the dirty bitmap {name} of {merge.base} aside",
        )
    return found


# --- who stands on it ------------------------------------------------------------------------------------------------


def _relink(handle: Any, merge: Merge) -> None:
    """Everything that stood on the top stands on the base: other images, and the definition of the next start."""
    live = {
        canonical(layer.path)
        for disk in read_domain(handle).disks
        for layer in disk.chain
        if layer.path and handle.isActive()
    }
    for path in merge.above:
        if canonical(path) in live or not os.path.exists(path):
            continue  # QEMU writes the links of its own chain
        if _backing_of(path) == canonical(merge.top):
            qemu_img.run(
                ["rebase", "-q", "-u", "-f", "qcow2", "-F", merge.base_format, "-b", merge.base, path],
                doing=f"Putting {path} on {merge.base}",
            )
    if handle.isPersistent():
        _redefine(handle, merge)


def _redefine(handle: Any, merge: Merge) -> None:
    """Take the run out of the definition of the next start, which may name it as its image or in a recorded chain.

    A chain recorded there is believed by libvirt at the next start, whatever the headers say.
    """
    disk = read_domain(handle, inactive=True).disk(merge.target)
    gone = {canonical(path) for path in merge.merged}
    if (
        disk is None
        or disk.active is None
        or not any(layer.path and canonical(layer.path) in gone for layer in disk.chain)
    ):
        return
    on_run = canonical(disk.path or "") in gone
    layer = layer_at(merge.base, merge.base_format) if on_run else disk.active
    put_definition_on(handle, {merge.target: layer})


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


def _verify(handle: Any, merge: Merge) -> None:
    """Neither the running guest, nor its next start, nor any header may name what is about to go."""
    gone = {canonical(path) for path in merge.merged}
    models = [read_domain(handle)]
    if models[0].persistent:
        models.append(read_domain(handle, inactive=True))
    for model in models:
        disk = model.disk(merge.target)
        layers = [] if disk is None else [*disk.chain, *(chain.follow(disk.active) if disk.active else ())]
        left = [layer.path for layer in layers if layer.path and canonical(layer.path) in gone]
        if left:
            raise LibvirtFailed(
                f"Disk {merge.target!r} of domain {model.name!r} still stands on {left[0]} after the commit",
                state="No file was removed; the guest's data is whole.",
                advice="Run this again",
            )


# --- snapshots -------------------------------------------------------------------------------------------------------


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


def _rebase_snapshot(handle: Any, rebased: Rebased) -> None:
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


# --- files -----------------------------------------------------------------------------------------------------------


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
