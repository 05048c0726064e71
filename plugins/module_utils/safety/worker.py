# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A long operation that goes on after its task has answered (``wait: false``), and what it says of itself.

Each worker has a directory under ``/var/lib``: ``ticket.json`` is what it was asked and never changes, ``state.json`` what has
become of it, replaced whole.  A worker that dies leaves the journal of its operation, like any other run; the next task, or
``recover_domain``, settles that.

An operation offers itself by a module with ``work(uri, request) -> dict``: ``request`` is what the ticket holds, and the
result is what its task would have answered.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import secrets
import shutil
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import VmkeeperError
from . import detached, places
from .processes import ProcessIdentity, myself

#: A fresh interpreter and a first write: 0.2 s on an idle host.
_STARTING_SECONDS = 30.0
_POLL_SECONDS = 0.1

PENDING, RUNNING, FINISHED, FAILED, INTERRUPTED = "pending", "running", "finished", "failed", "interrupted"
OVER = (FINISHED, FAILED, INTERRUPTED)


@dataclass(frozen=True)
class Job:
    """A worker as it is now. ``result`` is set when it has finished, ``error`` (a failure's result) when it failed."""

    id: str
    operation: str
    domains: tuple[tuple[str, str], ...]
    state: str
    started: str
    ended: str | None = None
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    process: ProcessIdentity | None = None

    @property
    def over(self) -> bool:
        """It will change no more."""
        return self.state in OVER

    def as_result(self) -> dict[str, Any]:
        """The ``job`` of a module's result."""
        return {
            "id": self.id,
            "operation": self.operation,
            "domains": [name for _uuid, name in self.domains],
            "state": self.state,
            "started": self.started,
            "ended": self.ended,
            "result": self.result,
            "error": self.error,
        }


def start(operation: str, uri: str, domains: Sequence[tuple[str, str]], entry: str, request: Mapping[str, Any]) -> Job:
    """Start a worker for ``domains`` (pairs of UUID and name) and return it once it is at work.

    ``entry`` is a module of ``module_utils``, such as ``snapshots.committing``; ``request`` must be JSON.  What an earlier
    worker of these domains has left, and is over, goes.
    """
    for old in (job for uuid, _name in domains for job in jobs_of(uuid)):
        if old.over:
            shutil.rmtree(os.path.join(places.WORKERS, old.id), ignore_errors=True)
    identifier = secrets.token_hex(6)
    directory = detached.worker_directory(identifier)
    ticket = os.path.join(directory, "ticket.json")
    places.write_json(
        ticket,
        {
            "operation": operation,
            "uri": uri,
            "domains": [list(domain) for domain in domains],
            "entry": entry,
            "request": dict(request),
            "started": _now(),
        },
    )
    try:
        detached.launch(
            detached.module_name("safety.worker"),
            ticket,
            payload=detached.keep_payload(os.path.join(directory, "payload.zip")),
            unit=f"vmkeeper-worker-{identifier}",
            description=f"{operation} of {', '.join(name for _uuid, name in domains)}",
        )
        give_up = time.monotonic() + _STARTING_SECONDS
        while (job := read(identifier)) is None or job.state == PENDING:
            if time.monotonic() > give_up:
                raise VmkeeperError(
                    f"The worker for {operation} did not come up within {_STARTING_SECONDS:.0f} s",
                    advice="See the system log for vmkeeper-worker",
                )
            time.sleep(_POLL_SECONDS)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return job


def main(ticket: str) -> None:
    """The worker's own process."""
    directory = os.path.dirname(ticket)
    asked = places.read_json(ticket)
    me = myself()
    state: dict[str, Any] = {"state": RUNNING, "process": [me.pid, me.started]}
    _write(directory, state)
    try:
        module = importlib.import_module(detached.module_name(asked["entry"]))
        state.update(state=FINISHED, result=module.work(asked["uri"], asked["request"]))
    except VmkeeperError as error:
        state.update(state=FAILED, error={**error.as_result(), "msg": str(error)})
    except BaseException as error:
        state.update(
            state=FAILED,
            error={"kind": "unexpected", "msg": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()},
        )
        raise
    finally:
        _write(directory, {**state, "ended": _now()})


def _write(directory: str, state: Mapping[str, Any]) -> None:
    with contextlib.suppress(FileNotFoundError):  # it was told to go away
        places.write_json(os.path.join(directory, "state.json"), dict(state))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read(identifier: str) -> Job | None:
    """A worker by its id; None when there is none."""
    directory = os.path.join(places.WORKERS, identifier)
    try:
        asked = places.read_json(os.path.join(directory, "ticket.json"))
        state = places.read_json(os.path.join(directory, "state.json")) or {"state": PENDING}
    except (OSError, ValueError):
        return None
    if not isinstance(asked, dict):
        return None
    process = ProcessIdentity(*state["process"]) if state.get("process") else None
    what = state["state"]
    if what == RUNNING and process is not None and not process.alive:
        what = INTERRUPTED
    return Job(
        id=identifier,
        operation=asked["operation"],
        domains=tuple((uuid, name) for uuid, name in asked["domains"]),
        state=what,
        started=asked["started"],
        ended=state.get("ended"),
        result=state.get("result"),
        error=state.get("error"),
        process=process,
    )


def jobs_of(uuid: str) -> list[Job]:
    """The workers of a domain, the newest first."""
    try:
        names = os.listdir(places.WORKERS)
    except OSError:
        return []
    found = [job for job in map(read, names) if job is not None and any(uuid == one for one, _name in job.domains)]
    return sorted(found, key=lambda job: job.started, reverse=True)


def wait(identifier: str, *, seconds: float | None = None) -> Job | None:
    """Wait until a worker is over and return it as it is then, or as it is after ``seconds``."""
    give_up = None if seconds is None else time.monotonic() + seconds
    while True:
        job = read(identifier)
        if job is None or job.over or (give_up is not None and time.monotonic() > give_up):
            return job
        time.sleep(_POLL_SECONDS)


def stop(identifier: str, *, seconds: float = 30.0) -> bool:
    """End a worker's process and wait for it; False when it was over. What it had begun is left to its journal."""
    job = read(identifier)
    if job is None or job.over or job.process is None:
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            if job.process.alive:
                _signal(job.process.pid, number)
        give_up = time.monotonic() + seconds
        while job.process.alive and time.monotonic() < give_up:
            time.sleep(_POLL_SECONDS)
    return True


def _signal(pid: int, number: int) -> None:
    """To the worker and what it runs (qemu-img), where it leads a process group of its own."""
    if os.getpgid(pid) == pid:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)
