# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The steps of a revert, and how an interrupted one is settled.

The way is one-directional from the moment the guest is stopped.  Before it nothing but files was made, and they are
removed; after it every step looks at what is true and can be run again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import block_jobs, qemu_img
from ..hypervisor.connection import constant, explaining, find_by_uuid, open_connection
from ..hypervisor.domain_model import qemu_owner, read_domain, read_state
from ..safety import processes, settlement
from ..safety.checkpoints_aside import set_aside
from ..safety.host_graph import read_graph
from ..safety.journal import Journal, Operation
from . import nvram, resumption
from .ground import Ground, refuse_saved
from .model import Snapshot, by_name, read_snapshots, write_labels
from .remains import Merged, layer_at, put_definition_on, remove_unneeded
from .revert_plan import RevertPlan

OPERATION = "revert"

#: What :func:`settle` says of a revert that is done.
FINISHED = "finished"

#: A tag of the snapshot that keeps the present, while the revert that it is taken for is not done.
PENDING = "vmkeeper.kept-before-reverting-to"

#: The way out for whoever wants to stay: see :func:`is_taken_back`.
_KEEPS_PRESENT = "Shut off and started by hand before that, it keeps its present: the revert is then taken back"


def run(handle: Any, ground: Ground, plan: RevertPlan) -> Merged:
    """Do all of it; what was thrown away is in the result's ``removed``."""
    journal = Journal.begin(OPERATION, [(ground.domain.uuid, ground.domain.name)], plan.to_json())
    try:
        journal.step("overlays")
        _make_overlays(handle, plan)
    except BaseException:
        with contextlib.suppress(VmkeeperError):  # then the next run takes it back
            _undo(handle, plan)
            journal.finish()
        raise
    return _go_on(handle, plan, journal)


def _make_overlays(handle: Any, plan: RevertPlan) -> None:
    owner = qemu_owner(handle.connect().getCapabilities())
    for overlay in plan.overlays:
        if os.path.lexists(overlay.path):
            continue  # by an interrupted run: it is whole or it is removed
        qemu_img.create_overlay(
            overlay.path, backing=overlay.base, backing_format=overlay.base_format, size=overlay.size, owner=owner
        )
        for name in overlay.bitmaps:
            # libvirt believes a chain of bitmaps only if every layer has it, recording.
            qemu_img.run(
                ["bitmap", "--add", "-f", "qcow2", overlay.path, name],
                doing=f"Adding the dirty bitmap {name} to {overlay.path}",
            )


def _go_on(handle: Any, plan: RevertPlan, journal: Journal, *, defined: bool = False) -> Merged:
    """From stopping the guest to the end. A domain that is ``defined`` on the overlays may have been used since then."""
    done = Merged()
    if plan.internal:
        journal.step("revert")
        _revert_internal(handle, plan)
    else:
        if not defined:
            journal.step("stop", run=handle.ID())
            _stop(handle)
            try:
                tops = _last_written(_old_tops(handle, plan))
                journal.step("define", tops=tops, off=read_state(handle).reason)
                put_definition_on(handle, {one.target: layer_at(one.path, "qcow2") for one in plan.overlays})
            except VmkeeperError as error:
                error.state = "The domain is shut off, and its definition still stands on its old disks."
                error.advice = f"Run this again, or recover_domain, which finishes the revert. {_KEEPS_PRESENT}"
                raise
        if plan.nvram is not None and not journal.operation.reached("current"):
            # Not before: a guest that somebody starts on its old disks after a crash has its old variables, too.
            journal.step("nvram")
            if not handle.isActive():
                nvram.bring_back(*plan.nvram, owner=qemu_owner(handle.connect().getCapabilities()))
        if not journal.operation.reached("checkpoints"):  # else another snapshot may be the current one by now
            journal.step("current")
            _make_current(handle, plan.snapshot)
        journal.step("checkpoints")
        _end_checkpoints(handle, plan)
        if not journal.operation.reached("start"):
            journal.step("start", overlays=_last_written(overlay.path for overlay in plan.overlays))
        try:
            _start(handle, plan)
        except VmkeeperError:
            # The domain stands on the snapshot already, and can be started by anybody; the old files stay.
            _finish(handle, plan, journal)
            raise
        journal.step("discard")
        remove_unneeded(handle, plan.discarded, done)
    _finish(handle, plan, journal)
    return done


def _finish(handle: Any, plan: RevertPlan, journal: Journal) -> None:
    if plan.kept_as and plan.alone:
        journal.step("unmark")
        unmark(handle, plan.kept_as)
    journal.finish()


def has_gone_back(snapshots: Sequence[Snapshot], kept_as: str) -> bool:
    """Whether the present no longer descends from the snapshot that kept it: then the revert was done, else it was not."""
    parents = {one.name: one.parent for one in snapshots}
    name = next((one.name for one in snapshots if one.current), None)
    for _generation in snapshots:
        if name == kept_as:
            return False
        name = parents.get(name) if name is not None else None
    return kept_as in parents


def _stop(handle: Any) -> None:
    if handle.isActive():
        with explaining(
            f"Stopping domain {handle.name()!r} to take it back",
            state="It was told to stop, and may still do so; nothing else of it was changed.",
            advice="See libvirt's log. The next task on its snapshots, or recover_domain, stops it and finishes the revert."
            f" {_KEEPS_PRESENT}",
        ):
            handle.destroy()


def _make_current(handle: Any, name: str) -> None:
    with explaining(
        f"Making {name!r} the current snapshot of domain {handle.name()!r}",
        state="The domain is shut off and stands on the snapshot; run this again.",
    ):
        snapshot = handle.snapshotLookupByName(name)
        if snapshot.isCurrent():
            return
        flags = (constant("VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE") or 0) | (
            constant("VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT") or 0
        )
        with set_aside(handle):
            handle.snapshotCreateXML(snapshot.getXMLDesc(constant("VIR_DOMAIN_SNAPSHOT_XML_SECURE") or 0), flags)


def _end_checkpoints(handle: Any, plan: RevertPlan) -> None:
    if not plan.checkpoints_ended:
        return
    with explaining(
        f"Ending the checkpoints of domain {handle.name()!r} that were made after the snapshot",
        state="The domain is shut off and stands on the snapshot; run this again.",
    ):
        for checkpoint in handle.listAllCheckpoints():
            if checkpoint.getName() in plan.checkpoints_ended:
                # Their bitmaps lie in layers that are left behind.
                checkpoint.delete(constant("VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY") or 0)


def _start(handle: Any, plan: RevertPlan) -> None:
    if plan.start == "off" or handle.isActive():
        return
    old = ", ".join(plan.discarded) or "no file of its own"
    state = (
        f"The domain is shut off, and its definition stands on snapshot {plan.snapshot!r};"
        f" what it was before is still in {old}."
    )
    if plan.memory_file is None:
        with explaining(f"Starting domain {handle.name()!r} on snapshot {plan.snapshot!r}", state=state):
            handle.create()
        return
    connection = handle.connect()
    with explaining(f"Resuming domain {handle.name()!r} from {plan.memory_file}", state=state):
        held = {one.target: layer_at(one.path, "qcow2") for one in plan.overlays}
        xml = resumption.fitted(
            resumption.read_xml(connection, plan.memory_file), held, read_domain(handle, inactive=True)
        )
        how = "VIR_DOMAIN_SAVE_PAUSED" if plan.start == "resume-paused" else "VIR_DOMAIN_SAVE_RUNNING"
        connection.restoreFlags(plan.memory_file, xml, constant(how) or 0)


def _revert_internal(handle: Any, plan: RevertPlan) -> None:
    flags = 0
    if plan.start in ("resume", "boot"):
        flags = constant("VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING") or 0
    elif plan.start == "resume-paused":
        flags = constant("VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED") or 0
    with explaining(
        f"Going back to the internal snapshot {plan.snapshot!r} of domain {handle.name()!r}",
        state="See domain_info for the state of the guest.",
    ):
        handle.revertToSnapshot(handle.snapshotLookupByName(plan.snapshot), flags)


def unmark(handle: Any, name: str) -> None:
    """Take the mark of an unfinished revert from the snapshot that keeps what was before it; quiet when it is gone."""
    found = by_name(read_snapshots(handle), name)
    if found is not None and found.labels is not None and PENDING in found.labels.tags:
        tags = {key: value for key, value in found.labels.tags.items() if key != PENDING}
        write_labels(handle, name, replace(found.labels, tags=tags), state="The revert is done.")


# --- settling --------------------------------------------------------------------------------------------------------


def _undo(handle: Any, plan: RevertPlan) -> None:
    """Remove the fresh overlays; one that somebody uses all the same stays."""
    remove_unneeded(handle, [overlay.path for overlay in plan.overlays], Merged())


def _stands_on_new(handle: Any, plan: RevertPlan) -> bool:
    """Whether the running guest, or its next start, has any overlay of this revert in a chain, at whatever depth.

    All were defined at once.  Since then a disk may have been detached, or another tool may have put a layer on top.
    """
    graph = read_graph(handle.connect())
    return any(
        reader.kind == "domain" and reader.uuid == handle.UUIDString()
        for overlay in plan.overlays
        for reader in graph.readers(overlay.path)
    )


def is_defined(operation: Operation, *, stands_on_new: bool) -> bool:
    """Whether the definition was put on the overlays: it stands on them, or the steps behind that were begun. Pure."""
    return stands_on_new or operation.reached("nvram") or operation.reached("current")


def is_taken_back(operation: Operation, *, defined: bool, active: bool, ran_since: bool, saved: bool) -> bool:
    """Whether an interrupted revert is undone and not finished: what the guest did since on its old disks counts. Pure.

    ``ran_since``: it has run after it was stopped for this; ``saved``: it has a saved state.
    """
    if not operation.reached("stop"):
        return True
    return not defined and (saved or ran_since or (active and operation.reached("define")))


def _last_written(paths: Iterable[str]) -> dict[str, int]:
    """When the files were last written, in ns since the epoch."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found[path] = os.stat(path).st_mtime_ns
    return found


def _written_since(before: Mapping[str, int]) -> bool:
    return any(before[path] != now for path, now in _last_written(before).items())


def _old_tops(handle: Any, plan: RevertPlan) -> list[str]:
    """What the definition stands on before it is put on the overlays."""
    present = read_domain(handle, inactive=True)
    disks = [present.disk(overlay.target) for overlay in plan.overlays]
    return [disk.path for disk in disks if disk is not None and disk.path is not None]


def _ran_since(handle: Any, operation: Operation) -> bool:
    """Whether the guest has run, on its old disks, after this operation had stopped it."""
    state = read_state(handle)
    stopping, defining = operation.last("stop"), operation.last("define")
    if defining is not None:
        # A device's node does not tell when it was written; how the guest ended does, until libvirtd restarts.
        return _written_since(defining["tops"]) or state.reason not in (defining["off"], "unknown")
    if stopping is None or not state.active:
        return False
    return operation.boot_id != processes.boot_id() or stopping["run"] != handle.ID()


def settle(uri: str, pending: Journal) -> dict[str, str]:
    """Finish what went past stopping the guest, undo what did not; returns ``{what, action}``."""
    operation = pending.operation
    plan = RevertPlan.from_json(operation.plan)
    handle = find_by_uuid(open_connection(uri), operation.domains[0]["uuid"])
    what = f"an interrupted revert to snapshot {plan.snapshot!r}"
    if handle is None:
        return settlement.given_up(pending, what)
    if plan.internal:
        # One call of libvirt's: it was made or it was not, and libvirt finishes it without us.
        block_jobs.wait_idle(handle)
        if plan.kept_as is None or not has_gone_back(read_snapshots(handle), plan.kept_as):
            pending.finish()
            return {"what": what, "action": "left as libvirt left it"}
        _finish(handle, plan, pending)
        return {"what": what, "action": FINISHED}
    domain = read_domain(handle)
    defined = is_defined(operation, stands_on_new=_stands_on_new(handle, plan))
    ran_since = _ran_since(handle, operation)
    if is_taken_back(
        operation, defined=defined, active=domain.state.active, ran_since=ran_since, saved=domain.managed_save
    ):
        _undo(handle, plan)
        pending.finish()
        return {"what": what, "action": "taken back"}
    refuse_saved(domain, state=f"There is {what} on it, whose disks it stands on already; everything was kept.")
    if not defined:
        _make_overlays(handle, plan)
    starting = operation.last("start")
    if plan.memory_file is not None and starting is not None and _written_since(starting["overlays"]):
        # It has run on them since: that memory does not fit them any more.
        plan = replace(plan, memory_file=None, start="boot")
    _go_on(handle, plan, pending, defined=defined)
    return {"what": what, "action": FINISHED}
