# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups and restores that go on after their task: the whole run is a worker's, and the task waits for it, or does not.

The same task again, while its worker runs, is about that worker.  Not so with a passphrase, which is kept nowhere to be
compared: such a task waits for the domain like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..hypervisor.connection import open_connection
from ..hypervisor.image_node import Passphrase
from ..safety import domain_jobs, journal, worker
from . import plan, restoring, settle, taking

_ENTRY = "backup.workers"

#: How a task waits; no part of what a worker is asked.
_WAITING = ("wait", "wait_seconds")

Answer = dict[str, Any]


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
    return _run(settle.BACKUP, uri, lambda: domains, asked, request.passphrase, take, wait, seconds)


def _take(connection: Any, uri: str, handles: Sequence[Any], path: str, request: plan.Request, check: bool) -> Answer:
    made = taking.take(connection, uri, handles, path, request, check=check)
    return {
        "changed": any(one.changed for one in made),
        "restore_points": [one.point for one in made],
        "warnings": [warning for one in made for warning in one.warnings],
    }


def restore(connection: Any, uri: str, request: restoring.Request, *, check: bool) -> Answer:
    """What a restore task answers: ``{changed, domain, restored, id, warnings}``, or with a ``job`` where that goes on.

    Raises :class:`TookTooLong` when it is not done after the request's ``wait_seconds``; the worker goes on.
    """

    def carry_out(check: bool) -> Answer:
        return _restore(connection, uri, request, check)

    if check or request.instant:
        return carry_out(check)
    asked = {"request": _without_secrets(asdict(request))}
    return _run(
        settle.RESTORE,
        uri,
        lambda: [restoring.subject(connection, uri, request)],
        asked,
        request.passphrase,
        carry_out,
        request.wait,
        request.wait_seconds,
    )


def _restore(connection: Any, uri: str, request: restoring.Request, check: bool) -> Answer:
    done = restoring.restore(connection, uri, request, check=check)
    answer = {"domain": done.domain, "restored": done.restored, "id": done.point}
    return {"changed": True, **answer, **({"job": done.job} if done.job else {}), "warnings": done.warnings}


def _run(
    operation: str,
    uri: str,
    domains: Callable[[], Sequence[tuple[str, str]]],
    asked: Mapping[str, Any],
    passphrase: Passphrase | None,
    here: Callable[[bool], Answer],
    wait: bool,
    seconds: float | None,
) -> Answer:
    """``here(check)`` does it in this process."""
    job = None if passphrase is not None else _twin(operation, asked)
    if job is None and wait and seconds is None:
        return here(False)
    if job is None:
        changing = domains()
        # What can be refused is refused now. What an interrupted run has left must first be settled, which is the worker's.
        if all(journal.peek(uuid) is None for uuid, _name in changing):
            foreseen = here(True)
            if not foreseen["changed"]:
                return foreseen
        confidential = {"passphrase": passphrase.value.decode()} if passphrase is not None else None
        job = worker.start(operation, uri, changing, _ENTRY, asked, confidential=confidential)
    if not wait:
        return {"changed": True, "job": {**job.as_result(), "state": worker.PENDING}, "warnings": []}
    return dict(domain_jobs.wait_for(job, seconds=seconds).result or {})


def _without_secrets(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key != "passphrase" and key not in _WAITING}


def _twin(operation: str, asked: Mapping[str, Any]) -> worker.Job | None:
    """The worker that does this very thing now."""
    stored = json.loads(json.dumps(asked))
    return next(
        (job for job in worker.all_jobs() if not job.over and job.operation == operation and job.request == stored),
        None,
    )


def work(uri: str, request: Mapping[str, Any]) -> Answer:
    """What the worker does."""
    connection = open_connection(uri)
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in request["request"].items()
    }
    options["passphrase"] = Passphrase(request["passphrase"].encode()) if "passphrase" in request else None
    if "domains" not in request:
        return _restore(connection, uri, restoring.Request(**options), False)
    handles = [connection.lookupByUUIDString(uuid) for uuid, _name in request["domains"]]
    return _take(connection, uri, handles, request["repository"], plan.Request(**options), False)
