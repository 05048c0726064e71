# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo exports, imports, pushes and pulls that were interrupted.

What is whole is kept: the same task then finds it done.  Anything else is removed, down to the last file, and nothing is
removed that the run did not make.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, open_connection
from ..safety import journal as journals
from ..safety import places, release
from ..safety import ticket as tickets
from ..safety.journal import Journal
from . import bundle, live_copy
from .manifest import FILE_NAME

EXPORT = "export_image"
IMPORT = "import_image"
PULL = "pull_image"
PUSH = "push_image"


def settle_export(uri: str, pending: Journal) -> dict[str, str]:
    """An export is whole once its bundle has its name; before that nothing of it stays."""
    plan, uuid = pending.operation.plan, pending.operation.domains[0]["uuid"]
    sealed = pending.operation.last("seal")
    whole = sealed is not None and _manifest_is(plan["path"], sealed["manifest"])
    release.release_orphans(uuid)
    handle = _lookup(open_connection(uri), uuid)
    if handle is not None:
        live_copy.stop(handle, plan["directories"])
    for directory in plan["directories"]:
        bundle.remove(directory)
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


def settle_import(uri: str, pending: Journal) -> dict[str, str]:
    """An import is whole once its domain is defined; before that no file of it stays."""
    plan = pending.operation.plan
    defined = _lookup(open_connection(uri), plan["uuid"]) is not None
    placed = pending.operation.last("place")
    if placed is not None and not defined:
        _remove_placed(placed["files"])
    bundle.remove(plan["staging"])
    pending.finish()
    what = f"an interrupted import of {plan['domain']!r}"
    return {"what": what, "action": "finished" if defined else "taken back"}


def settle_pull(_uri: str, pending: Journal) -> dict[str, str]:
    """A pull is whole once its bundle has its name; the blobs that were fetched are kept for the same task."""
    plan = pending.operation.plan
    bundle.remove(plan["staging"])
    whole = os.path.lexists(plan["path"])
    if whole:
        bundle.remove(plan["blobs"])
    pending.finish()
    return {
        "what": f"an interrupted pull to {plan['path']}",
        "action": "finished" if whole else "taken back; what was fetched is kept",
    }


def settle_push(_uri: str, pending: Journal) -> dict[str, str]:
    """A push leaves nothing but its copy of the layers; the registry shows an image only when it is whole."""
    plan = pending.operation.plan
    bundle.remove(plan["staging"])
    pending.finish()
    return {"what": f"an interrupted push to {plan['reference']}", "action": "taken back"}


def settle_path(uri: str, key: str, *, check: bool) -> dict[str, str] | None:
    """Settle what is journalled under a path or a domain's name (see :func:`.bundle.lock_key`), under its lock."""
    if check:
        return None
    pending = journals.unfinished(key)
    return SETTLERS[pending.operation.kind](uri, pending) if pending is not None else None


def _lookup(connection: Any, uuid: str) -> Any:
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _manifest_is(path: str, sha256: str) -> bool:
    try:
        with open(os.path.join(path, FILE_NAME), "rb") as stream:
            return bundle.sha256_of_bytes(stream.read()) == sha256
    except OSError:
        return False


def _remove_placed(files: list[Mapping[str, Any]]) -> None:
    """Remove files by name only where they are the very files that the run had made."""
    for file in files:
        try:
            status = os.lstat(file["path"])
        except FileNotFoundError:
            continue
        if [status.st_dev, status.st_ino] == file["inode"]:
            places.unlink_quietly(file["path"])


#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS = {EXPORT: settle_export, IMPORT: settle_import, PULL: settle_pull, PUSH: settle_push}
