# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The journal of steps: what an operation is about to do, on disk before it does it.

One operation, one file, named after the first domain of its group; the other domains have a symbolic link to it.  The
file exists exactly while the operation is unfinished.  What really happened is always read from libvirt and the
filesystem; the journal says what was intended, so that the next run can finish or undo it.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .._errors import NoSpace, Unfinished, VmkeeperError
from . import places, processes, ticket

FORMAT = 1


@dataclass
class Operation:
    """What is written. ``plan`` is the trade's own; ``steps`` are ``{name, at, ...}`` in order."""

    kind: str
    domains: list[dict[str, str]]
    plan: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    started: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )
    pid: int = field(default_factory=os.getpid)
    boot_id: str = field(default_factory=processes.boot_id)
    steps: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    def reached(self, name: str) -> bool:
        """Whether the step was begun."""
        return any(step["name"] == name for step in self.steps)

    def names(self, uuid: str) -> bool:
        """Whether it is about that domain."""
        return any(domain["uuid"] == uuid for domain in self.domains)

    def last(self, name: str) -> dict[str, Any] | None:
        """The newest record of the step, if it was begun."""
        return next((step for step in reversed(self.steps) if step["name"] == name), None)


class Journal:
    """The journal of one operation in progress."""

    def __init__(self, operation: Operation, *, directory: str = places.JOURNAL) -> None:
        self.operation = operation
        self._directory = places.private_directory(directory)
        uuids = sorted(domain["uuid"] for domain in operation.domains)
        self._path = os.path.join(directory, f"{uuids[0]}.json")
        self._links = [os.path.join(directory, f"{uuid}.json") for uuid in uuids[1:]]

    @classmethod
    def begin(
        cls,
        kind: str,
        domains: Sequence[tuple[str, str]],
        plan: dict[str, Any],
        *,
        directory: str = places.JOURNAL,
    ) -> Journal:
        """Record the intention durably. ``domains`` are pairs of UUID and name."""
        journal = cls(
            Operation(kind, [{"uuid": uuid, "name": name} for uuid, name in domains], plan),
            directory=directory,
        )
        # The links first: one that names nothing yet is not taken for an operation, and none may be missing later.
        for link in journal._links:
            places.unlink_quietly(link)
            os.symlink(os.path.basename(journal._path), link)
        journal.step("begin")
        return journal

    def step(self, name: str, **data: Any) -> None:
        """Record durably that a step is about to begin; raises :class:`VmkeeperError` where that is impossible: then it must not."""
        self.operation.steps.append({"name": name, "at": round(datetime.datetime.now().timestamp(), 3), **data})
        try:
            places.write_json(self._path, asdict(self.operation))
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else VmkeeperError
            raise kind(
                f"The journal {self._path} cannot be written: {error.strerror}",
                state="What was begun is finished or taken back by the next run.",
                advice="See to the filesystem of that file, then run this again",
                path=self._path,
            ) from error

    def note(self, name: str) -> None:
        """Record a step that nobody has to know of afterwards, and that must not fail for a full disk: starting a guest."""
        with contextlib.suppress(VmkeeperError):
            self.step(name)

    def moment(self, name: str) -> None:
        """Mark a point inside a frozen window, where nothing may be written."""

    def finish(self) -> None:
        """The operation is over, or wholly undone."""
        # The operation itself first: a link that is left over names nothing, and is not taken for one.
        places.unlink_quietly(self._path)
        places.sweep_unfinished(self._path)
        places.fsync_directory(self._directory)
        for link in self._links:
            places.unlink_quietly(link)
        armed = self.operation.last("armed")
        if armed is not None:
            ticket.forget(armed["ticket"])


def unfinished(uuid: str, *, directory: str = places.JOURNAL) -> Journal | None:
    """The interrupted operation of a domain, if there is one. Call it only under the domain's lock."""
    try:
        content = places.read_json(os.path.join(directory, f"{uuid}.json"))
    except ValueError as error:
        raise Unfinished(
            f"The journal {directory}/{uuid}.json cannot be read: {error}",
            advice="Look at the domain with domain_info, then move the file away",
        ) from error
    if content is None:
        # A link whose operation is over.
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(directory, f"{uuid}.json"))
        return None
    if content.get("format") != FORMAT:
        raise Unfinished(
            f"The journal {directory}/{uuid}.json was written by a newer version",
            advice="Run recover_domain of that version",
        )
    operation = Operation(**content)
    if not operation.names(uuid):
        # A link that a run killed between two unlinks has left: what it leads to by now is about others.
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(directory, f"{uuid}.json"))
        return None
    return Journal(operation, directory=directory)


def all_unfinished(*, directory: str = places.JOURNAL) -> set[str]:
    """The UUIDs under which something unfinished is journalled; needs no lock."""
    try:
        names = os.listdir(directory)
    except OSError:
        return set()
    return {name[: -len(".json")] for name in names if name.endswith(".json") and not name.startswith(".")}


def peek(uuid: str, *, directory: str = places.JOURNAL) -> Operation | None:
    """What :func:`unfinished` would find, for information only: needs no lock and changes nothing."""
    try:
        content = places.read_json(os.path.join(directory, f"{uuid}.json"))
        operation = Operation(**content) if isinstance(content, dict) else None
        return operation if operation is not None and operation.names(uuid) else None
    except (OSError, ValueError, TypeError):
        return None
