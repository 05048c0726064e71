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
from ..hypervisor import apparmor, block_jobs, chain, checkpoints, definition, power, qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, constant, explaining, open_connection
from ..hypervisor.domain_model import Disk, Layer, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety import places, processes
from ..safety.checkpoints_aside import set_aside
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
    What fails after a commit stays in the journal for the next run to finish.  A guest that was shut down for it is started
    again in any case.
    """
    try:
        done = merge_all(handle, work, journal, seconds=seconds)
    except block_jobs.TookTooLong:
        raise
    except VmkeeperError as error:
        before = journal.operation.steps[-1]["name"] in _BEFORE_A_COMMIT_IS_DONE
        if before:
            _settle_disks(handle, work, journal, refused=isinstance(error, block_jobs.NotBegun))
        _start_again(handle, journal)
        if before:
            journal.finish()
        raise
    journal.finish()
    return done


#: Steps at which every chain is whole and nothing is known to be merged that is not noted yet.
_BEFORE_A_COMMIT_IS_DONE = ("begin", "mark", "shutdown", "shut-off", "commits", "commit")


def _written(work: Work, journal: Journal, *, refused: bool) -> bool:
    """Whether the content of any layer but the tops may have changed; ``refused``: the last commit did not begin."""
    begun = [step["disk"] for step in journal.operation.steps if step["name"] == "commit"]
    pulled = {merge.target for merge in work.merges if merge.pull}
    together = journal.operation.reached("commits")
    return together or any(target not in pulled for target in (begun[:-1] if refused else begun))


def _settle_disks(handle: Any, work: Work, journal: Journal, *, refused: bool = False, cancelled: bool = False) -> None:
    """For an operation that goes no further: what was merged is noted, what is being merged stops, the rest stays as it is.

    ``cancelled``: whoever asks wants every job of these disks to end.  Else one that is not ours may be what was in the way.
    """
    steps = journal.operation.steps
    together = journal.operation.reached("commits")
    finished = {step["disk"] for step in steps if step["name"] == "verify"} - {
        step["disk"] for step in steps[-1:] if step["name"] == "commit"
    }
    merges = []
    for merge in work.merges:
        if merge.target not in finished:
            if cancelled or (together and _commits_below(handle, merge)):
                block_jobs.cancel(handle, merge.target)
            if not (together and _has_left_the_guest(handle, merge)):
                continue
            # One of several that were begun together, and it was the quickest.
            _relink(handle, merge)
            _verify(handle, merge)
        merges.append(merge)
    for rebased in work.rebased:
        if any(rebased.path == merge.base for merge in merges):
            _rebase_snapshot(handle, rebased)
    if any(merge.pull for merge in merges):
        _end_checkpoints(handle, work)
    if not merges and not _written(work, journal, refused=refused):
        for name in work.ended:
            unmark_ending(handle, name)  # they are as whole as they were
    remove_unneeded(handle, [path for merge in merges for path in merge.gone if path in work.files], Merged())


def _commits_below(handle: Any, merge: Merge) -> bool:
    job = block_jobs.job_of(handle, merge.target)
    return job is not None and job["type"] == "commit"


def _has_left_the_guest(handle: Any, merge: Merge) -> bool:
    """Whether the running guest stands on what the run became, and no longer on what goes."""
    disk = read_domain(handle).disk(merge.target)
    if disk is None or not handle.isActive():
        return False
    used = {canonical(layer.path) for layer in disk.chain if layer.path}
    return canonical(str(merge.remains.path)) in used and not used & {canonical(path) for path in merge.gone}


def abandon(uri: str, pending: Journal) -> dict[str, str]:
    """Cancel an operation that was stopped: its running jobs end and the chains stay as they are now."""
    handle = open_connection(uri).lookupByUUIDString(pending.operation.domains[0]["uuid"])
    work = Work.from_json(pending.operation.plan["work"])
    if pending.operation.steps[-1]["name"] not in _BEFORE_A_COMMIT_IS_DONE:
        return settle(uri, pending)
    _settle_disks(handle, work, pending, cancelled=True)
    _start_again(handle, pending)
    pending.finish()
    return {"what": f"a {pending.operation.kind} in progress", "action": "cancelled"}


def settle(uri: str, pending: Journal) -> dict[str, str]:
    """Finish an interrupted run; returns ``{what, action}``."""
    connection = open_connection(uri)
    handle = connection.lookupByUUIDString(pending.operation.domains[0]["uuid"])
    work = Work.from_json(pending.operation.plan["work"])
    what = f"an interrupted {pending.operation.kind}"
    if work.restart and handle.isActive() and not pending.operation.reached("commit"):
        # Nothing was merged, and the guest runs: it is not shut down by a task that was not allowed to.
        _settle_disks(handle, work, pending)
        pending.finish()
        return {"what": what, "action": "taken back"}
    run(handle, work, pending)
    return {"what": what, "action": "finished"}


def merge_all(handle: Any, work: Work, journal: Journal, *, seconds: float | None = None) -> Merged:
    """Do the work and return what was done; ``seconds`` limits the wait for each live job (it goes on all the same)."""
    done = Merged()
    if work.ended:
        # From the first byte of a commit on nobody may go back to them, whatever becomes of this run.
        journal.step("mark", snapshots=list(work.ended))
        for name in work.ended:
            mark_ending(handle, name)
    if work.restart:
        _shut_down(handle, journal)
    _begin_together(handle, work, journal)
    for merge in work.merges:
        moved = _allocated((*merge.merged[1:], merge.base) if merge.pull else merge.merged)
        done.committed_bytes[merge.target] = done.committed_bytes.get(merge.target, 0) + moved
        journal.step("commit", disk=merge.target, base=merge.base)
        _commit(handle, merge, work, seconds)
        journal.step("relink", disk=merge.target)
        _relink(handle, merge)
        journal.step("verify", disk=merge.target)
        _verify(handle, merge)
    if work.checkpoints_ended:
        journal.step("checkpoints")
        _end_checkpoints(handle, work)
    _start_again(handle, journal)
    journal.step("snapshots")
    for rebased in work.rebased:
        _rebase_snapshot(handle, rebased)
    for name in work.ended:
        forget_snapshot(handle, name)
    journal.step("remove")
    remove_unneeded(handle, work.files, done)
    return done


def _end_checkpoints(handle: Any, work: Work) -> None:
    """libvirt 9.0 may lose changes by a pull across layers, silently, and the next increment would lack them.

    Only now, and not before the pull: until the layers leave the chain their bitmaps are right, and QEMU may not be allowed to
    remove them from there.
    """
    if handle.isActive():
        checkpoints.end(
            handle, work.checkpoints_ended, state="The layers are merged; run this again before the next backup."
        )


# --- a guest that is shut down for it --------------------------------------------------------------------------------


def _shut_down(handle: Any, journal: Journal) -> None:
    if journal.operation.reached("shut-off") or not handle.isActive():
        return  # somebody who started it since then wants it to run: what is denied then says so
    journal.step("shutdown")
    if power.shut_down([handle]):
        raise VmkeeperError(
            f"Domain {handle.name()!r} did not shut down within {power.SHUTDOWN_SECONDS:.0f} s",
            state="No layer was merged. A guest that is late may still go down.",
            advice="See that the guest reacts to the ACPI power button or has its agent running",
        )
    journal.step("shut-off")


def _start_again(handle: Any, journal: Journal) -> None:
    """Start what this operation itself has shut down, in this boot; what is off otherwise is off for other reasons."""
    operation = journal.operation
    if not operation.reached("shutdown") or operation.boot_id != processes.boot_id():
        return
    state = read_domain(handle).state
    if state.active or state.reason not in ("shutdown", "unknown"):
        return
    journal.step("start")
    with explaining(
        f"Starting domain {handle.name()!r} again",
        state="It is shut off, and its layers are whole.",
        advice="Start it, then see libvirt's log",
    ):
        handle.create()


# --- several disks ---------------------------------------------------------------------------------------------------


def _begin_together(handle: Any, work: Work, journal: Journal) -> None:
    """Begin all commits below active layers before one of them ends.

    When one ends, libvirt before 12.1 writes the AppArmor profile of the guest anew, which denies those that have not begun
    (docs/apparmor.md).  What cannot be begun here says so when its turn comes.
    """
    if not handle.isActive():
        return
    below = []
    for merge in work.merges:
        found = None if merge.pull else _live_run(handle, merge)
        if found is not None and not found.active:
            below.append((merge, found))
    if len(below) < 2:
        return
    journal.step("commits", disks=[merge.target for merge, _found in below])
    # Held, the first cannot end while the others are begun.
    bandwidth = block_jobs.HELD if apparmor.rules_file(handle) else work.bandwidth
    begun = []
    try:
        for merge, found in below:
            block_jobs.begin_intermediate(handle, merge.target, found.base, found.top, bandwidth=bandwidth)
            begun.append(merge.target)
    except block_jobs.NotBegun:
        pass
    finally:
        for target in begun:
            block_jobs.release(handle, target, work.bandwidth)


def _allocated(paths: Sequence[str]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += os.stat(path).st_blocks * 512
    return total


# --- the commit itself -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LiveRun:
    """A run in the chain of a running guest, by the names that libvirt has for its layers."""

    top: str
    base: str
    active: bool


def _live_run(handle: Any, merge: Merge) -> _LiveRun | None:
    """The run as the running guest has it; None where it does not run on it, or not on all of it any more."""
    disk = read_domain(handle).disk(merge.target)
    if disk is None or not handle.isActive():
        return None
    same = {canonical(layer.path): layer.path for layer in disk.chain if layer.path}
    top, base = same.get(canonical(merge.top)), same.get(canonical(merge.base))
    if top is None or base is None:
        return None
    return _LiveRun(top, base, canonical(disk.path or "") == canonical(merge.top))


def _commit(handle: Any, merge: Merge, work: Work, seconds: float | None) -> None:
    if merge.pull:
        _pull(handle, merge, work, seconds)
        return
    found = _live_run(handle, merge)
    if found is not None and found.active:
        block_jobs.commit_active(handle, merge.target, found.base, bandwidth=work.bandwidth, seconds=seconds)
        return
    if found is not None:
        block_jobs.commit_intermediate(
            handle, merge.target, found.base, found.top, bandwidth=work.bandwidth, seconds=seconds
        )
        return
    disk = read_domain(handle).disk(merge.target)
    live = [] if disk is None or not handle.isActive() else [layer.path for layer in disk.chain if layer.path]
    if canonical(merge.base) in map(canonical, live):
        return  # the top has left the chain: QEMU has done it
    if not _still_refers(handle, disk, merge):
        return
    _commit_offline(merge, work)


def _pull(handle: Any, merge: Merge, work: Work, seconds: float | None) -> None:
    """Copy what the run holds into its top, which then stands on what its base stood on."""
    if handle.isActive():
        below = None
        if merge.below is not None:
            disk = read_domain(handle).disk(merge.target)
            paths = [layer.path for layer in disk.chain if layer.path] if disk is not None else []
            below = next((path for path in paths if canonical(path) == canonical(merge.below)), merge.below)
        block_jobs.pull(handle, merge.target, merge.base, below, bandwidth=work.bandwidth, seconds=seconds)
        return
    # The guest ended meanwhile. The same offline: content seen through the top is equal at every instant.
    if _backing_of(merge.top) == (canonical(merge.below) if merge.below else None):
        return
    _wait_for_qemu_img(merge.top)
    onto = ["-b", merge.below, "-F", merge.below_format or "raw"] if merge.below else ["-b", ""]
    qemu_img.run(["rebase", "-q", "-f", "qcow2", *onto, merge.top], doing=f"Copying {merge.base} into {merge.top}")


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
    for path in () if merge.pull else merge.above:
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
    gone = {canonical(path) for path in merge.gone}
    if (
        disk is None
        or disk.active is None
        or not any(layer.path and canonical(layer.path) in gone for layer in disk.chain)
    ):
        return
    on_run = canonical(disk.path or "") in gone
    layer = merge.remains if on_run else disk.active
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
    gone = {canonical(path) for path in merge.gone}
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
