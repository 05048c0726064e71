# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finish or undo a backup, a removal or a restore that was interrupted.

A point whose manifest is written is whole and is published; everything before that is undone, so that the same task
makes a good one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .._errors import LibvirtFailed, Refused
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, constant, open_connection
from ..safety import places, processes, settlement
from ..safety import ticket as tickets
from ..safety.journal import Journal
from . import checkpoints, job, sentry
from .repository import Repository, discard

BACKUP = "backup"

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
    """The repository that an operation wrote to."""
    path = plan["repository"]
    if not os.path.isdir(path):
        raise Refused(
            f"The repository {path}, where an interrupted operation has left files, is not there",
            advice="Mount it, then run this again",
        )
    return Repository(path, plan["repository_uuid"])


def finish(uri: str, pending: Journal) -> None:
    """Publish the points of all domains, then drop the checkpoints that they supersede."""
    plan = pending.operation.plan
    repository = repository_of(plan)
    connection = open_connection(uri)
    for uuid, part in plan["domains"].items():
        publish(repository, uuid, part["id"])
    pending.step("retire")
    for uuid, part in plan["domains"].items():
        handle = find(connection, uuid)
        if handle is not None:
            checkpoints.remove(handle, [name for name in part["retire"] if name != part["checkpoint"]])
    _dismiss_sentry(pending)
    pending.finish()


def publish(repository: Repository, uuid: str, identifier: str) -> None:
    """The one rename that makes a point exist. Done before: nothing to do."""
    made = repository.new_directory(uuid, identifier)
    if os.path.isdir(made):
        os.rename(made, repository.point_directory(uuid, identifier))
        places.fsync_directory(repository.domain_directory(uuid))


def undo(uri: str, pending: Journal) -> None:
    """End the jobs, drop the new checkpoints, remove what was written; the older points go on as they were."""
    plan = pending.operation.plan
    pending.step("undo")
    repository = repository_of(plan)
    connection = open_connection(uri)
    for uuid, part in plan["domains"].items():
        directory = repository.new_directory(uuid, part["id"])
        handle = find(connection, uuid)
        if handle is not None:
            job.abort(handle, directory)
            if part["checkpoint"]:
                checkpoints.remove(handle, [part["checkpoint"]])
        _discard(directory)
    _dismiss_sentry(pending)
    pending.finish()


def _discard(directory: str) -> None:
    if not os.path.isdir(directory):
        return
    for name in os.listdir(directory):
        holders = processes.holders_of(os.path.join(directory, name))
        if holders:
            raise Refused(
                f"{directory}/{name} is still in use by process {holders[0]}",
                state="It was kept.",
                advice="Wait for it, or end it if it is left over, then run this again",
            )
    discard(directory)


def _dismiss_sentry(pending: Journal) -> None:
    posted = pending.operation.last("watch")
    if posted and posted.get("sentry"):
        sentry.dismiss(posted["sentry"])


def find(connection: Any, uuid: str) -> Any | None:
    """The domain, or None when it has been undefined since."""
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if code_of(error) == constant("VIR_ERR_NO_DOMAIN"):
            return None
        raise LibvirtFailed(f"Looking up domain {uuid}: {error}", state=_STATE) from error


#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS: dict[str, settlement.Settler] = {BACKUP: settle_backup}
