# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Operations that go on after their task: the whole run is a worker's, and the task waits for it, or does not.

The same task again, while its worker runs, is about that worker.  Not so with a passphrase, which is kept nowhere to be
compared: such a task waits for the domain like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..hypervisor.image_node import Passphrase
from . import domain_jobs, journal, worker

#: What a task answers: ``changed``, ``warnings`` and results of its own, or ``changed`` and ``job`` where that goes on.
Answer = dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """How a task waits: not at all, until it is done, or for so many seconds."""

    wait: bool = True
    seconds: float | None = None


#: Whether a worker was handed a passphrase; which one is kept nowhere.
_WITH_PASSPHRASE = "with_passphrase"


@dataclass(frozen=True)
class Operation:
    """What a worker can be asked: ``entry`` is its module (see :func:`.worker.start`), ``asked`` is JSON without secrets."""

    name: str
    entry: str
    asked: Mapping[str, Any]
    passphrase: Passphrase | None = None


def run(
    operation: Operation,
    uri: str,
    domains: Callable[[], Sequence[tuple[str, str]]],
    here: Callable[[bool], Answer],
    waiting: Waiting,
) -> Answer:
    """What the task answers.

    ``here(check)`` does it in this process; ``domains`` are the UUIDs and names of those that it is about, which the worker
    finds in its request, too.  Raises :class:`TookTooLong` when it is not done after ``waiting.seconds``; the worker goes on.
    """
    job = None if operation.passphrase is not None else twin(operation)
    if job is None and waiting.wait and waiting.seconds is None:
        return here(False)
    if job is None:
        changing = list(domains())
        # What can be refused is refused now. What an interrupted run has left must first be settled, which is the worker's.
        if all(journal.peek(uuid) is None for uuid, _name in changing):
            foreseen = here(True)
            if not foreseen["changed"]:
                return foreseen
        secret = operation.passphrase
        job = worker.start(
            operation.name,
            uri,
            changing,
            operation.entry,
            {**operation.asked, "domains": changing, _WITH_PASSPHRASE: secret is not None},
            confidential={"passphrase": secret.value.decode()} if secret is not None else None,
        )
    if not waiting.wait:
        return {"changed": True, "job": {**job.as_result(), "state": worker.PENDING}, "warnings": []}
    return dict(domain_jobs.wait_for(job, seconds=waiting.seconds).result or {})


def twin(operation: Operation, *, over: bool = False) -> worker.Job | None:
    """The worker that does this very thing now, or, with ``over``, the newest that has done it."""
    stored = json.loads(json.dumps(operation.asked))
    for job in worker.all_jobs():
        same = job.operation == operation.name and all(job.request.get(key) == value for key, value in stored.items())
        # What is encrypted is not what was asked for in the clear.
        same = same and bool(job.request.get(_WITH_PASSPHRASE)) == (operation.passphrase is not None)
        if same and (job.state == worker.FINISHED if over else not job.over):
            return job
    return None


def passphrase_in(request: Mapping[str, Any]) -> Passphrase | None:
    """The passphrase that a worker was handed with its request."""
    return Passphrase(request["passphrase"].encode()) if "passphrase" in request else None
