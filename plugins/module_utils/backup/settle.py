# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo a backup, a removal or a restore that was interrupted.

A point whose manifest is written is whole and is published; everything before that is undone, so that the same task
makes a good one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

from .._errors import LibvirtFailed, Refused, VmkeeperError
from ..hypervisor import backup_job, block_jobs, definition, libvirt_secret
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import constant, explaining, find_by_uuid, of_every_domain, open_connection
from ..hypervisor.domain_model import read_domain
from ..hypervisor.image_node import Passphrase
from ..safety import places, processes, sentry, settlement
from ..safety import ticket as tickets
from ..safety.host_graph import read_graph
from ..safety.journal import Journal, Operation
from . import checkpoints, folding
from .repository import Repository, discard, is_there
from .restore_plan import users_besides

BACKUP = "backup"
RESTORE = "restore"
REMOVAL = "removal"

_AS_BEFORE = "Everything is as it was before."
#: How long a guest may take to let go of a disk, and how often it is looked whether it has.
_DETACH_SECONDS = 30.0
_POLL_SECONDS = 0.2

_STATE = "The guest runs as before; nothing of the interrupted point is kept."


def settle_backup(uri: str, pending: Journal) -> dict[str, str]:
    """Finish or undo one interrupted backup; returns ``{what, action}``."""
    operation = pending.operation
    plan = operation.plan
    finished = operation.reached("publish")
    if finished:
        finish(uri, pending)
    else:
        undo(uri, pending)
    armed = operation.last("armed")
    if armed:
        tickets.forget(armed["ticket"])
    return {
        "what": f"an interrupted backup into {plan['repository']}",
        "action": "finished" if finished else "undone",
    }


def repository_of(plan: Mapping[str, Any]) -> Repository:
    """The repository that an operation wrote to. Raises :class:`Refused` where it is not mounted, or another one is."""
    path, uuid = plan["repository"], plan["repository_uuid"]
    if not is_there(path, uuid):
        raise Refused(
            f"The repository {path} (UUID {uuid}), where an interrupted operation has left files, is not there",
            state="What that operation left is as it was, and is finished or undone once the repository is there.",
            advice="Mount it, then run this again",
        )
    return Repository(path, uuid)


def finish(uri: str, pending: Journal) -> None:
    """Publish the points of all domains, then drop the checkpoints that they supersede."""
    plan = pending.operation.plan
    repository = repository_of(plan)
    connection = open_connection(uri)
    if not pending.operation.reached("retire"):
        for uuid, part in plan["domains"].items():
            publish(repository, uuid, part["id"], journal=f"{places.JOURNAL}/{min(plan['domains'])}.json")
    pending.step("retire")
    for uuid, part in plan["domains"].items():
        handle = find_by_uuid(connection, uuid)
        if handle is not None:
            checkpoints.remove(handle, [name for name in part["retire"] if name != part["checkpoint"]])
    _clear_scratch(connection, plan)
    sentry.dismiss_posted(pending)
    pending.finish()


def publish(repository: Repository, uuid: str, identifier: str, *, journal: str) -> None:
    """The one rename that makes a point exist. Done before: nothing to do.

    Raises :class:`Refused` where it is neither made nor published: the checkpoints that it supersedes must not go.  ``journal``
    is the file to move away where that is meant.
    """
    made, published = repository.new_directory(uuid, identifier), repository.point_directory(uuid, identifier)
    if os.path.isdir(made):
        os.rename(made, published)
        places.fsync_directory(repository.domain_directory(uuid))
    elif not os.path.isdir(published):
        raise Refused(
            f"Point {identifier}, which an interrupted backup had completed, is not in {repository.path}: neither {published}"
            f" nor {made} is there",
            state="The older points and their checkpoints are as they were.",
            advice="See whether all of the repository is mounted, then run this again; if the point was removed by hand, move"
            f" {journal} away",
        )


def undo(uri: str, pending: Journal) -> None:
    """End the jobs, drop the new checkpoints, remove what was written; the older points go on as they were."""
    plan = pending.operation.plan
    pending.step("undo")
    connection = open_connection(uri)
    unmounted = Repository(plan["repository"], plan["repository_uuid"])
    for uuid, part in plan["domains"].items():
        handle = find_by_uuid(connection, uuid)
        if handle is not None:
            backup_job.abort(handle, part["scratch"] or unmounted.new_directory(uuid, part["id"]))
            block_jobs.resume_starved(handle)
            if part["checkpoint"]:
                checkpoints.remove(handle, [part["checkpoint"]])
    _clear_scratch(connection, plan)
    # Last: a repository that is not there must not keep a job running, or what it wrote on this host.
    repository = repository_of(plan)
    for uuid, part in plan["domains"].items():
        _discard(repository.new_directory(uuid, part["id"]))
    sentry.dismiss_posted(pending)
    pending.finish()


def _clear_scratch(connection: Any, plan: Mapping[str, Any]) -> None:
    """Remove what QEMU wrote on its way to the repository, and the key of it that only libvirtd's memory held."""
    for part in plan["domains"].values():
        if part["scratch"]:
            _discard(part["scratch"])
    if plan["secret"]:
        with explaining("Removing the key of a scratch image", state=_STATE):
            libvirt_secret.forget(connection, plan["secret"])


def _discard(directory: str) -> None:
    if not os.path.isdir(directory):
        return
    files = [os.path.join(directory, name) for name in os.listdir(directory)]
    processes.wait_released(files)  # QEMU may be about to: its job was called over a moment ago
    for file in files:
        holders = processes.holders_of(file)
        if holders:
            raise Refused(
                f"{file} is still in use by process {holders[0]}",
                state="It was kept.",
                advice="Wait for it, or end it if it is left over, then run this again",
            )
    discard(directory)


def settle_removal(uri: str, pending: Journal) -> dict[str, str]:
    """Go on with one interrupted removal of points; returns ``{what, action}``.

    Where that cannot be done now it is put off, and its journal stays: every point that remains is whole and can be
    restored and built upon meanwhile, so that nothing else has to wait for it.
    """
    plan = pending.operation.plan
    uuid = pending.operation.domains[0]["uuid"]
    what = f"an interrupted removal of points from {plan['repository']}"
    try:
        repository = repository_of(plan)
        connection = open_connection(uri)
        with repository.locked(uuid, "finishing a removal of points"):
            folding.require_unread(connection, repository, uuid, plan["points"])
            carry_out_removal(find_by_uuid(connection, uuid), repository, uuid, pending)
    except (VmkeeperError, OSError) as error:
        return {"what": what, "action": f"put off: {error}"}
    return {"what": what, "action": "finished"}


def carry_out_removal(
    handle: Any | None, repository: Repository, uuid: str, journal: Journal, passphrase: Passphrase | None = None
) -> None:
    """What the journal intends, from wherever it was interrupted. No passphrase is kept in it."""
    journal.step("checkpoint")
    if handle is not None:
        # First, so that no increment can begin at a point that is gone.
        checkpoints.remove(handle, journal.operation.plan["checkpoints"])
    folding.finish(repository, uuid, journal.operation.plan["points"], journal, passphrase)
    journal.finish()


def settle_restore(uri: str, pending: Journal) -> dict[str, str]:
    """Finish or undo one interrupted restore; returns ``{what, action}``."""
    operation = pending.operation
    what, action = f"an interrupted restore of {operation.plan['point']}", "undone"
    if goes_forward(operation):
        action = ": ".join(["finished", *finish_restore(uri, pending)])
    elif operation.reached("take-back"):
        kept = take_back(uri, pending)
        if kept:
            action = f"undone: {kept}"
    else:
        undo_restore(uri, pending)
    return {"what": what, "action": action}


def goes_forward(operation: Operation) -> bool:
    """Whether settling an interrupted restore finishes it: its files are complete, and nobody has begun to take them back."""
    return operation.reached("place") and not operation.reached("take-back")


def undo_restore(uri: str, pending: Journal) -> None:
    """Remove what was being copied; nothing else was touched yet."""
    pending.step("undo")
    for piece in pending.operation.plan["pieces"]:
        places.unlink_quietly(piece["part"])
    forget_secrets(uri, pending.operation.plan["pieces"])
    pending.finish()


def forget_secrets(uri: str, pieces: Iterable[Mapping[str, Any]]) -> None:
    """The libvirt secrets of images that are not restored after all.

    One that a domain uses stays: the same point, restored to the same place before, has given it the same secret.
    """
    made = {piece["secret"] for piece in pieces if piece["secret"]}
    if made:
        connection = open_connection(uri)
        with explaining("Removing the libvirt secret of a restored disk", state=_STATE):
            for uuid in sorted(made - _secrets_in_use(connection)):
                libvirt_secret.forget(connection, uuid)


def _secrets_in_use(connection: Any) -> set[str]:
    def secrets(handle: Any) -> set[str]:
        return {
            disk.encryption.uuid
            for inactive in (False, True)
            for disk in read_domain(handle, inactive=inactive and bool(handle.isPersistent())).disks
            if disk.encryption is not None and disk.encryption.uuid
        }

    return set().union(*of_every_domain(connection, secrets))


def finish_restore(uri: str, pending: Journal) -> list[str]:
    """Put complete files in place, define or attach, start; every step looks first at what is done.

    Returns sentences about the images from before that are kept.

    When libvirt or the filesystem refuses, everything goes back to how it was: a restore that can never be finished must
    not be in the way of every later task.
    """
    plan = pending.operation.plan
    connection = open_connection(uri)
    require_stopped(
        connection,
        plan,
        state="What it writes now is not kept by the restore; its images from before are kept aside until that is done.",
        advice="Shut it down, then run this again, which finishes the restore",
    )
    try:
        _drop_chains(connection, pending)
        for piece in plan["pieces"]:
            place(piece)
        pending.step("define")
        handle = _define_restored(connection, plan)
        if plan["attach"] and handle is not None:
            pending.step("attach")
            _attach(handle, plan)
    except VmkeeperError as error:
        if connection.isAlive():
            _give_up(uri, pending, error)
        raise
    pending.step("clean")
    if plan["in_place"] and handle is not None:
        # Their bitmaps went with the old images.
        checkpoints.remove(handle, checkpoints.names_of_ours(handle))
    kept = _clear_asides(connection, plan)
    if plan["running"] and handle is not None:
        pending.step("start")
        _start_restored(handle, plan["name"], pending)
    pending.finish()
    return kept


def _clear_asides(connection: Any, plan: Mapping[str, Any]) -> list[str]:
    """Delete the images from before. One that somebody has opened, or stood upon, meanwhile is kept, and said."""
    pieces = [piece for piece in plan["pieces"] if piece["aside"] and os.path.lexists(piece["aside"])]
    if not pieces:
        return []
    graph = read_graph(connection, {os.path.dirname(os.path.realpath(piece["path"])) for piece in pieces})
    kept = []
    for piece in pieces:
        path, aside = piece["path"], piece["aside"]
        users = [*users_besides(graph, aside, plan["uuid"]), *users_besides(graph, path, plan["uuid"])]
        users += [f"process {pid}" for pid in processes.holders_of(aside)]
        if users:
            kept.append(f"{aside}, which was {path} before, is kept: it is needed by {', '.join(users)}")
        elif places.unlink_quietly(aside):
            places.fsync_directory(os.path.dirname(aside))
    return kept


def _give_up(uri: str, pending: Journal, error: VmkeeperError) -> None:
    pending.step("take-back")
    try:
        kept = take_back(uri, pending)
        if kept:
            error.now(kept)
    except (VmkeeperError, libvirt.libvirtError, OSError) as trouble:
        error.now(f"Taking it back failed ({trouble}); the next run, or recover_domain, goes on with that.")


def require_stopped(connection: Any, plan: Mapping[str, Any], *, state: str, advice: str) -> None:
    """Nothing is put in place under a guest that somebody has started meanwhile."""
    if not plan["in_place"] or not any(os.path.lexists(piece["part"]) for piece in plan["pieces"]):
        return
    handle = find_by_uuid(connection, plan["uuid"])
    if handle is not None and handle.isActive():
        raise Refused(
            f"Domain {plan['name']!r} was started while point {plan['point']} was restored in its place",
            state=state,
            advice=advice,
        )


def _start_restored(handle: Any, name: str, pending: Journal) -> None:
    if handle.isActive():
        return
    try:
        with explaining(
            f"Starting the restored domain {name!r}",
            state="It is restored and shut off.",
            advice="See libvirt's log of the domain",
        ):
            handle.create()
    except LibvirtFailed:
        if handle.connect().isAlive():
            pending.finish()  # it is restored; that it does not start is no reason to do it again
        raise


def _drop_chains(connection: Any, pending: Journal) -> None:
    """The definition names no layers below images that are replaced by ones that stand on nothing.

    Before they are: libvirt finds those of the images from before by itself, should the guest be started on these again.
    """
    plan = pending.operation.plan
    handle = find_by_uuid(connection, plan["uuid"]) if plan["in_place"] else None
    if handle is None:
        return
    xml = definition.persistent_xml(handle)
    bare = definition.without_chains(xml, [piece["target"] for piece in plan["pieces"]])
    if bare != xml:
        pending.step("drop-chains", before=xml)
        definition.define(
            connection,
            bare,
            doing=f"Taking the layers below the replaced disks out of the definition of domain {plan['name']!r}",
            state=_AS_BEFORE,
        )


def _define_restored(connection: Any, plan: Mapping[str, Any]) -> Any | None:
    handle = find_by_uuid(connection, plan["uuid"])
    if plan["xml"] is None or (handle is not None and not plan["in_place"]):
        return handle
    definition.define(
        connection,
        plan["xml"],
        doing=f"Defining domain {plan['name']!r}",
        state=_AS_BEFORE,
    )
    return find_by_uuid(connection, plan["uuid"])


def take_back(uri: str, pending: Journal) -> str | None:
    """Everything to how it was before the first file was put in place. Interrupted, it is called again.

    Returns a sentence about what cannot be taken back now: a running guest need not let go of a disk.
    """
    plan = pending.operation.plan
    connection = open_connection(uri)
    handle = find_by_uuid(connection, plan["uuid"])
    asides = [piece["aside"] for piece in plan["pieces"] if piece["aside"] and os.path.lexists(piece["aside"])]
    if asides and handle is not None and handle.isActive():
        raise Refused(
            f"Domain {plan['name']!r} was started while its disks were put back to what they were before point {plan['point']}",
            state=f"What it writes now is not kept. Its disks from before are kept in {', '.join(asides)}.",
            advice="Shut it down, then run this again, which puts them back",
        )
    used: set[str | None] = set()
    if handle is not None:
        if plan["attach"]:
            _detach(handle, {piece["path"] for piece in plan["pieces"]})
        used = _paths(handle, inactive=False) | _paths(handle, inactive=True)
    kept = []
    for piece in plan["pieces"]:
        if piece["aside"]:
            if os.path.lexists(piece["aside"]):
                os.replace(piece["aside"], piece["path"])
            places.unlink_quietly(piece["part"])
        elif piece["path"] not in used:
            places.undo_rename_new(piece["part"], piece["path"])
        else:
            kept.append(piece["path"])
    dropped = pending.operation.last("drop-chains")
    if dropped and handle is not None:
        definition.define(
            connection,
            dropped["before"],
            doing=f"Defining domain {plan['name']!r} as it was before",
            state="Its disks are as they were before the restore.",
        )
    forget_secrets(uri, plan["pieces"])
    pending.finish()
    if not kept:
        return None
    return f"Domain {plan['name']!r} does not let go of {', '.join(kept)}, which stays attached; all else is as it was before"


def _paths(handle: Any, *, inactive: bool) -> set[str | None]:
    return {disk.path for disk in read_domain(handle, inactive=inactive).disks}


def _detach(handle: Any, paths: Collection[str]) -> None:
    """Detach the disks on ``paths``. A guest that does not let go of one within a while keeps it."""
    persistent, active = bool(handle.isPersistent()), bool(handle.isActive())
    for inactive, flag in ((True, "VIR_DOMAIN_AFFECT_CONFIG"), (False, "VIR_DOMAIN_AFFECT_LIVE")):
        if not (persistent if inactive else active):
            continue
        for element in definition.disks_on(handle, paths, inactive=inactive):
            # What cannot be detached is kept with its file, and said.
            with contextlib.suppress(libvirt.libvirtError):
                handle.detachDeviceFlags(element, constant(flag) or 0)
    give_up = time.monotonic() + _DETACH_SECONDS
    while active and _paths(handle, inactive=False) & set(paths) and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS)


def place(piece: Mapping[str, Any]) -> None:
    """Put one complete file of a restore where it belongs. Done before: nothing to do.

    Raises :class:`Refused` where somebody else has made that file meanwhile, else :class:`VmkeeperError`.
    """
    path, part, aside = piece["path"], piece["part"], piece["aside"]
    if not os.path.lexists(part):
        return  # in place already
    try:
        if aside:
            if os.path.lexists(path) and not os.path.lexists(aside):
                status = os.stat(path)
                os.chown(part, status.st_uid, status.st_gid)
                os.chmod(part, status.st_mode & 0o7777)
                os.rename(path, aside)
            os.rename(part, path)
        else:
            places.rename_new(part, path)
        places.fsync_directory(os.path.dirname(path))
    except FileExistsError as error:
        raise Refused(
            f"{path} was made by somebody else while the restore copied, and is not overwritten",
            state=_AS_BEFORE,
            advice="Move it away, or give another directory or name, then run this again",
            path=path,
        ) from error
    except OSError as error:
        raise VmkeeperError(
            f"Putting {path} in place failed: {error}",
            state=_AS_BEFORE,
            advice="See to its filesystem, then run this again",
            path=path,
        ) from error


def _attach(handle: Any, plan: Mapping[str, Any]) -> None:
    domain = read_domain(handle, inactive=bool(handle.isPersistent()))
    present = {disk.path for disk in domain.disks}
    live = read_domain(handle)
    present_live = {disk.path for disk in live.disks}
    for piece in plan["pieces"]:
        target = plan["attach"][piece["target"]]
        flags = 0
        if handle.isPersistent() and piece["path"] not in present:
            flags |= constant("VIR_DOMAIN_AFFECT_CONFIG") or 0
        if live.state.active and piece["path"] not in present_live:
            flags |= constant("VIR_DOMAIN_AFFECT_LIVE") or 0
        if not flags:
            continue
        element = ElementTree.Element("disk", type="file", device="disk")
        ElementTree.SubElement(element, "driver", name="qemu", type=piece["format"])
        source = ElementTree.SubElement(element, "source", file=piece["path"])
        if piece["secret"]:
            definition.encrypt(source, piece["secret"])
        ElementTree.SubElement(element, "target", dev=target, bus="scsi" if target.startswith("sd") else "virtio")
        with explaining(
            f"Attaching {piece['path']} to domain {plan['name']!r}",
            state="Nothing was attached, and the restored files were removed.",
        ):
            handle.attachDeviceFlags(ElementTree.tostring(element, encoding="unicode"), flags)


#: Part of :data:`.settlers.SETTLERS`.
SETTLERS: dict[str, settlement.Settler] = {
    BACKUP: settle_backup,
    RESTORE: settle_restore,
    REMOVAL: settle_removal,
}
