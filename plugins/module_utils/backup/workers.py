# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups and restores as their tasks ask for them: done here, or by a worker that goes on after the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..hypervisor.connection import open_connection
from ..safety import long_operation
from ..safety.long_operation import Answer, Operation, Waiting
from . import plan, restore_plan, restoring, settle, taking

_ENTRY = "backup.workers"

#: How a task waits; no part of what a worker is asked.
_WAITING = ("wait", "wait_seconds")


def backup(
    connection: Any,
    uri: str,
    handles: Sequence[Any],
    path: str,
    request: plan.Request,
    *,
    check: bool,
    wait: bool,
    seconds: float | None,
) -> Answer:
    """What a backup task answers: ``{changed, restore_points, warnings}``, or ``{changed, job}`` when it does not wait.

    Raises :class:`TookTooLong` when the points are not there after ``seconds``; the worker goes on.
    """

    def take(check: bool) -> Answer:
        return _take(connection, uri, handles, path, request, check)

    if check:
        return take(check=True)
    domains = [(handle.UUIDString(), handle.name()) for handle in handles]
    asked = {"domains": domains, "repository": path, "request": _without_secrets(asdict(request))}
    operation = Operation(settle.BACKUP, _ENTRY, asked, request.passphrase)
    return long_operation.run(operation, uri, lambda: domains, take, Waiting(wait, seconds))


def _take(connection: Any, uri: str, handles: Sequence[Any], path: str, request: plan.Request, check: bool) -> Answer:
    made = taking.take(connection, uri, handles, path, request, check=check)
    return {
        "changed": any(one.changed for one in made),
        "restore_points": [one.point for one in made],
        "warnings": [warning for one in made for warning in one.warnings],
    }


def restore(connection: Any, uri: str, request: restore_plan.Request, *, check: bool) -> Answer:
    """What a restore task answers: ``{changed, domain, restored, id, warnings}``, or with a ``job`` where that goes on.

    Raises :class:`TookTooLong` when it is not done after the request's ``wait_seconds``; the worker goes on.
    """

    def carry_out(check: bool) -> Answer:
        return _restore(connection, uri, request, check)

    if check or request.instant:
        return carry_out(check)
    operation = Operation(settle.RESTORE, _ENTRY, {"request": _without_secrets(asdict(request))}, request.passphrase)
    waiting = Waiting(request.wait, request.wait_seconds)
    return long_operation.run(operation, uri, lambda: [restoring.subject(connection, uri, request)], carry_out, waiting)


def _restore(connection: Any, uri: str, request: restore_plan.Request, check: bool) -> Answer:
    done = restoring.restore(connection, uri, request, check=check)
    answer = {"domain": done.domain, "restored": done.restored, "id": done.point}
    return {"changed": True, **answer, **({"job": done.job} if done.job else {}), "warnings": done.warnings}


def _without_secrets(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key != "passphrase" and key not in _WAITING}


def work(uri: str, request: Mapping[str, Any]) -> Answer:
    """What the worker does."""
    connection = open_connection(uri)
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in request["request"].items()
    }
    options["passphrase"] = long_operation.passphrase_in(request)
    if "repository" not in request:
        return _restore(connection, uri, restore_plan.Request(**options), False)
    handles = [connection.lookupByUUIDString(uuid) for uuid, _name in request["domains"]]
    return _take(connection, uri, handles, request["repository"], plan.Request(**options), False)
