# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A long operation that goes on after its task has answered (``wait: false``), and what it says of itself.

Each worker has a directory under ``/var/lib``: ``ticket.json`` is what it was asked, by whom and since which boot, and never
changes; ``state.json`` what has become of it, replaced whole.  A worker that dies leaves the journal of its operation, like
any other run; the next task, or ``recover_domain``, settles that.  Until the worker has written its state, its task answers
for it: of a worker that has none, and whose task is dead, there will be nothing.

An operation offers itself by a module with ``work(uri, request) -> dict``: ``request`` is what the ticket holds, with what
was confidential and is in no file, and the result is what its task would have answered.
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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor.connection import open_connection
from . import detached, places
from .handover import Offer, receive
from .processes import ProcessIdentity, boot_id, myself

#: A fresh interpreter and a first write: 0.2 s on an idle host.
_STARTING_SECONDS = 30.0
_POLL_SECONDS = 0.1

#: For how long the outcome of a worker is kept whose domains are gone.
KEPT_SECONDS = 7 * 86400.0

PENDING, RUNNING, FINISHED, FAILED = "pending", "running", "finished", "failed"
INTERRUPTED, CANCELLED = "interrupted", "cancelled"
OVER = (FINISHED, FAILED, INTERRUPTED, CANCELLED)


@dataclass(frozen=True)
class Job:
    """A worker as it is now. ``result`` is set when it has finished, ``error`` (a failure's result) when it failed.

    ``request`` is what it was asked, without what was confidential.
    """

    id: str
    operation: str
    domains: tuple[tuple[str, str], ...]
    state: str
    started: str
    ended: str | None = None
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    process: ProcessIdentity | None = None
    request: Mapping[str, Any] = field(default_factory=dict)

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


def start(
    operation: str,
    uri: str,
    domains: Sequence[tuple[str, str]],
    entry: str,
    request: Mapping[str, Any],
    *,
    confidential: Mapping[str, str] | None = None,
) -> Job:
    """Start a worker for ``domains`` (pairs of UUID and name) and return it once it is at work.

    ``entry`` is a module of ``module_utils``, such as ``snapshots.committing``; ``request`` must be JSON.  What is
    ``confidential`` gets to the worker, as part of its request, without ever being in a file.  What an earlier worker of these
    domains has left, and is over, goes; so does, after a while, what those of domains have left that are gone.
    """
    for old in (job for uuid, _name in domains for job in jobs_of(uuid)):
        if old.over:
            _forget(old.id)
    connection = open_connection(uri)
    forget_gone({domain.UUIDString() for domain in connection.listAllDomains()})
    connection.close()
    identifier = secrets.token_hex(6)
    directory = detached.worker_directory(identifier)
    ticket = os.path.join(directory, "ticket.json")
    launcher = myself()
    offered = os.path.join(directory, "handover") if confidential else None
    places.write_json(
        ticket,
        {
            "operation": operation,
            "uri": uri,
            "domains": [list(domain) for domain in domains],
            "entry": entry,
            "request": dict(request),
            "handover": offered,
            "started": _now(),
            "launcher": [launcher.pid, launcher.started],
            "boot": boot_id(),
        },
    )
    with contextlib.ExitStack() as stack:
        offer = stack.enter_context(Offer(offered, confidential)) if offered and confidential else None
        return _launch(operation, domains, identifier, ticket, offer)


def _launch(
    operation: str, domains: Sequence[tuple[str, str]], identifier: str, ticket: str, offer: Offer | None
) -> Job:
    directory = os.path.dirname(ticket)
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
            if offer is not None:
                offer.serve()
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
    if asked is None or os.path.exists(os.path.join(directory, "state.json")):
        return  # given up while it was on its way
    me = myself()
    state: dict[str, Any] = {"state": RUNNING, "process": [me.pid, me.started]}
    try:
        # Before it says that it runs: until then its task offers it.
        confidential = receive(asked["handover"]) if asked.get("handover") else {}
        try:
            places.write_json(os.path.join(directory, "state.json"), state)
        except FileNotFoundError:
            return  # its task has given it up, and may have been run again
        module = importlib.import_module(detached.module_name(asked["entry"]))
        state.update(state=FINISHED, result=module.work(asked["uri"], {**asked["request"], **confidential}))
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
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")


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
    if (what == RUNNING and process is not None and not process.alive) or (
        what == PENDING and will_never_run(asked, now=time.time(), boot=boot_id())
    ):
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
        request=asked["request"],
    )


def will_never_run(asked: Mapping[str, Any], *, now: float, boot: str) -> bool:
    """Whether a worker that has not come up yet never will: its ticket is ``asked``, ``now`` in seconds since the epoch.

    Its task has it removed when it does not come up in time.  So one that is still there is of another boot, or its task is
    dead; then it may be on its way for so long all the same.  A ticket need not name its task: earlier ones did not.
    """
    if asked.get("boot") and boot and asked["boot"] != boot:
        return True
    if asked.get("launcher") and ProcessIdentity(*asked["launcher"]).alive:
        return False
    # On either side: a clock that was set back makes nothing wait for it to catch up.
    return abs(now - datetime.datetime.fromisoformat(asked["started"]).timestamp()) > _STARTING_SECONDS


def all_jobs() -> list[Job]:
    """The workers of this host, the newest first."""
    try:
        names = os.listdir(places.WORKERS)
    except OSError:
        return []
    found = [job for job in map(read, names) if job is not None]
    return sorted(found, key=lambda job: job.started, reverse=True)


def jobs_of(uuid: str) -> list[Job]:
    """The workers of a domain, the newest first."""
    return [job for job in all_jobs() if any(uuid == one for one, _name in job.domains)]


def forget_gone(existing: Collection[str], *, older_than: float = KEPT_SECONDS) -> list[str]:
    """Remove what workers have left that are over since ``older_than`` seconds and none of whose domains exists.

    ``existing`` are the UUIDs of the host's domains.  Returns the ids of the workers.
    """
    gone = []
    for job in all_jobs():
        if job.over and not any(uuid in existing for uuid, _name in job.domains):
            with contextlib.suppress(OSError):
                if time.time() - _last_change(job.id) > older_than:
                    _forget(job.id)
                    gone.append(job.id)
    return gone


def _last_change(identifier: str) -> float:
    """When a worker was last heard of, in seconds since the epoch: one that never came up, when it was asked."""
    directory = os.path.join(places.WORKERS, identifier)
    try:
        return os.stat(os.path.join(directory, "state.json")).st_mtime
    except FileNotFoundError:
        return os.stat(os.path.join(directory, "ticket.json")).st_mtime


def _forget(identifier: str) -> None:
    shutil.rmtree(os.path.join(places.WORKERS, identifier), ignore_errors=True)


def wait(identifier: str, *, seconds: float | None = None) -> Job | None:
    """Wait until a worker is over and return it as it is then, or as it is after ``seconds``."""
    give_up = None if seconds is None else time.monotonic() + seconds
    while True:
        job = read(identifier)
        if job is None or job.over or (give_up is not None and time.monotonic() > give_up):
            return job
        time.sleep(_POLL_SECONDS)


def stop(identifier: str, *, seconds: float = 30.0) -> bool:
    """End a worker's process and wait for it; False when it was over. What it had begun is left to its journal.

    One that is on its way is waited for: before it has come up there is nothing that could be ended.
    """
    give_up = time.monotonic() + 2 * _STARTING_SECONDS
    while (job := read(identifier)) is not None and job.state == PENDING and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS)
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


def mark_cancelled(identifier: str) -> None:
    """Say of a worker that was stopped, and what it had begun left in order, that somebody wanted that."""
    job = read(identifier)
    if job is not None and job.state == INTERRUPTED:
        _write(os.path.join(places.WORKERS, identifier), {"state": CANCELLED, "ended": _now()})


def limit(identifier: str, bandwidth: int) -> None:
    """Tell a worker the limit, in bytes per second, of the block jobs that it will begin; 0 for none."""
    with contextlib.suppress(FileNotFoundError):
        places.write_json(_limit_file(identifier), bandwidth)


def limit_for(uuid: str, begun_with: int) -> int:
    """The limit of a block job that the domain's worker begins now: the newest that it was told, else ``begun_with``."""
    for job in jobs_of(uuid):
        if not job.over:
            told = places.read_json(_limit_file(job.id))
            return begun_with if told is None else int(told)
    return begun_with


def _limit_file(identifier: str) -> str:
    return os.path.join(places.WORKERS, identifier, "bandwidth.json")


def _signal(pid: int, number: int) -> None:
    """To the worker and what it runs (qemu-img), where it leads a process group of its own."""
    if os.getpgid(pid) == pid:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)
