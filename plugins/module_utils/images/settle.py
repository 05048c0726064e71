# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo exports, imports, pushes and pulls that were interrupted.

What is whole is kept: the same task then finds it done.  Anything else is removed, down to the last file, and nothing is
removed that the run did not make.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import find_by_uuid, open_connection
from ..safety import journal as journals
from ..safety import places, release, sentry
from ..safety import ticket as tickets
from ..safety.journal import Journal, Operation
from . import bundle, live_copy, machine
from .manifest import FILE_NAME

EXPORT = "export_image"
IMPORT = "import_image"
PULL = "pull_image"
PUSH = "push_image"

#: VIR_DOMAIN_UNDEFINE_KEEP_NVRAM: the file is removed by name and inode with the others.
_KEEP_NVRAM = 1 << 3


def settle_export(uri: str, pending: Journal) -> dict[str, str]:
    """An export is whole once its bundle has its name; before that nothing of it stays."""
    plan, uuid = pending.operation.plan, pending.operation.domains[0]["uuid"]
    sealed = pending.operation.last("seal")
    whole = sealed is not None and _manifest_is(plan["path"], sealed["manifest"])
    release.release_orphans(uuid)
    handle = find_by_uuid(open_connection(uri), uuid)
    if handle is not None:
        live_copy.stop(handle, plan["directories"])
    for directory in plan["directories"]:
        bundle.remove(directory)
    sentry.dismiss_posted(pending)
    armed = pending.operation.last("armed")
    pending.finish()
    if armed:
        tickets.forget(armed["ticket"])
    what = f"an interrupted export to {plan['path']}"
    return (
        {"what": what, "action": "finished", "finished": plan["path"]}
        if whole
        else {"what": what, "action": "taken back"}
    )


def undo(settler: Callable[[str, Journal], Any], uri: str, pending: Journal, error: BaseException) -> None:
    """Back to how it was before ``error``; what cannot be undone now stays in the journal for the next run."""
    try:
        settler(uri, pending)
    except (VmkeeperError, OSError, libvirt.libvirtError) as trouble:
        if isinstance(error, VmkeeperError):
            error.now(f"Undoing it failed ({trouble}); the next run goes on with that.")


def settle_import(uri: str, pending: Journal) -> dict[str, str]:
    """An import is whole once its domain is defined, and can start; before that no file of it stays."""
    plan = pending.operation.plan
    handle = find_by_uuid(open_connection(uri), plan["uuid"])
    placed, defining = pending.operation.last("place"), pending.operation.last("define")
    if handle is not None and defining is not None and machine.nvram_misfit(handle, defining.get("nvram")):
        handle.undefineFlags(_KEEP_NVRAM)
        handle = None
    if placed is not None and handle is None:
        _remove_placed(placed["files"])
    bundle.remove(plan["staging"])
    pending.finish()
    what = f"an interrupted import of {plan['domain']!r}"
    return {"what": what, "action": "finished: it is defined" if handle is not None else "taken back"}


def settle_pull(_uri: str, pending: Journal) -> dict[str, str]:
    """A pull is whole once its bundle has its name. What was fetched before that is kept for the same task.

    While it is kept the journal is, too, so that ``recover_domain`` knows of it (see :func:`abandon_pull`).
    """
    plan = pending.operation.plan
    whole = _end_pull(plan)
    if os.path.lexists(plan["blobs"]):
        return {"what": _pull(plan), "action": "taken back; what was fetched is kept"}
    pending.finish()
    return {"what": _pull(plan), "action": "finished" if whole else "taken back"}


def abandon_pull(_uri: str, pending: Journal) -> dict[str, str]:
    """The same, and nothing is kept for a task that may never be run again."""
    plan = pending.operation.plan
    whole = _end_pull(plan)
    bundle.remove(plan["blobs"])
    pending.finish()
    return {"what": _pull(plan), "action": "finished" if whole else "taken back"}


def _end_pull(plan: Mapping[str, Any]) -> bool:
    bundle.remove(plan["staging"])
    whole = os.path.lexists(plan["path"])
    if whole:
        bundle.remove(plan["blobs"])
    return whole


def _pull(plan: Mapping[str, Any]) -> str:
    return f"an interrupted pull to {plan['path']}"


def fetched_before(key: str) -> str | None:
    """The directory of what an interrupted pull has fetched, by its key. Call it under its lock."""
    pending = journals.unfinished(key)
    return pending.operation.plan["blobs"] if pending is not None and pending.operation.kind == PULL else None


def settle_push(_uri: str, pending: Journal) -> dict[str, str]:
    """A push leaves nothing but its copy of the layers; the registry shows an image only when it is whole."""
    plan = pending.operation.plan
    bundle.remove(plan["staging"])
    pending.finish()
    return {"what": f"an interrupted push to {plan['reference']}", "action": "taken back"}


def _manifest_is(path: str, sha256: str) -> bool:
    try:
        with open(os.path.join(path, FILE_NAME), "rb") as stream:
            return bundle.sha256_of_bytes(stream.read()) == sha256
    except OSError:
        return False


def placed_by(key: str) -> set[str]:
    """The disks that an interrupted import has put in their places, by its key, and that settling it removes."""
    pending = journals.peek(key)
    placed = pending.last("place") if pending is not None else None
    return {file["path"] for file in placed["files"] if _is_placed(file)} if placed is not None else set()


def _is_placed(file: Mapping[str, Any]) -> bool:
    """Whether a file is still the very one that the run had put there."""
    try:
        status = os.lstat(file["path"])
    except FileNotFoundError:
        return False
    return bool([status.st_dev, status.st_ino] == file["inode"])


def _remove_placed(files: list[Mapping[str, Any]]) -> None:
    for file in files:
        if _is_placed(file):
            places.unlink_quietly(file["path"])


def left_by(operation: Operation) -> list[str]:
    """What an interrupted operation has left lying around. Changes nothing."""
    plan = operation.plan
    paths = [*plan.get("directories", ()), *(plan[name] for name in ("staging", "blobs") if name in plan)]
    placed = operation.last("place")
    if placed is not None:
        paths += [file["path"] for file in placed["files"] if _is_placed(file)]
    return sorted(path for path in paths if os.path.lexists(path))


#: For :func:`..safety.settlement.settle_before_change`.
SETTLERS = {EXPORT: settle_export, IMPORT: settle_import, PULL: settle_pull, PUSH: settle_push}

#: For ``recover_domain``: after it nothing lies around any more.
RECOVERERS = {**SETTLERS, PULL: abandon_pull}

#: For ``recover_domain``, to say what lies around.
TELLERS = dict.fromkeys(SETTLERS, left_by)
