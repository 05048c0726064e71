# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restore a point: copy and check every disk beside its place, then put all in place and define, or nothing.

Or at once, on the repository's own files: :mod:`.instant_restore`.
"""

from __future__ import annotations

import contextlib
import os
import uuid as uuids
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .._errors import Conflict, InvalidInput, Refused, VmkeeperError
from ..hypervisor import image_node, libvirt_secret, qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import find_by_uuid, find_domain
from ..hypervisor.image_node import Image, Keys, Passphrase
from ..safety import domain_jobs, names, places, settlement, space, worker
from ..safety import journal as journals
from ..safety.journal import Journal, Operation
from . import digests, instant_restore, listing, settle, settlers, stored, verifying
from .repository import Repository, open_repository
from .restore_plan import Piece, Plan, Planner, Request, check_request, refuse_shared, secrets_of


@dataclass
class Restored:
    """The result."""

    domain: dict[str, Any]
    restored: list[dict[str, Any]]
    point: str
    warnings: list[str]
    job: dict[str, Any] | None = None


def restore(connection: Any, uri: str, request: Request, *, check: bool = False) -> Restored:
    """Restore what the request names. Nothing is changed with ``check``."""
    check_request(request)
    return _restoring(connection, uri, request).run(check=check)


def subject(connection: Any, uri: str, request: Request) -> tuple[str, str]:
    """UUID and name of the domain that a restore makes or changes."""
    name, uuid = _restoring(connection, uri, request).who()
    return uuid, name


def _restoring(connection: Any, uri: str, request: Request) -> _Restoring:
    repository = open_repository(request.repository)
    found = listing.find_point(
        repository,
        identifier=request.id,
        source=request.source_domain,
        before=listing.time_option(request.before, "before"),
    )
    return _Restoring(connection, uri, repository, found, request)


def _explained(error: Conflict, left: Sequence[str]) -> Conflict:
    """The same conflict, where what is in the way was left by an earlier instant restore that has just been given up."""
    if error.facts.get("path") not in left:
        return error
    return Conflict(
        f"The domain of an earlier instant restore was undefined before it was pulled local, and what its guest has written is in"
        f" {', '.join(left)}, which is not overwritten",
        state="That restore is given up; its files are left alone.",
        advice="Keep, move or remove them, or give another directory, then run this again",
        path=error.facts["path"],
        left=list(left),
    )


class _Restoring:
    def __init__(
        self, connection: Any, uri: str, repository: Repository, found: listing.Found, request: Request
    ) -> None:
        self._connection = connection
        self._uri = uri
        self._repository = repository
        self._request = request
        self._kept: list[str] = []
        self._take(found)

    def _take(self, found: listing.Found) -> None:
        self._found = found
        self._point = found.point
        self._planner = Planner(self._connection, self._repository, found, self._request)

    def run(self, *, check: bool) -> Restored:
        """Plan, and unless ``check`` do it."""
        name, uuid = self.who()
        if not self._request.instant:
            return self._answer(self._prepare(name, uuid, check))
        busy = None if check else self._worker_of(uuid)
        plan = self._plan_of(uuid, journals.peek(uuid)) if busy is not None else self._prepare(name, uuid, check)
        answer = self._answer(plan)
        if not check:
            answer.job = self._pull(plan, busy)
        return answer

    def _prepare(self, name: str, uuid: str, check: bool) -> Plan:
        """Everything but the pull of an instant restore."""
        with contextlib.ExitStack() as stack:
            if not check:
                stack.enter_context(settlement.hold([(uuid, name)], f"restoring {self._point.id}"))
            if self._request.instant and not check:
                pending = instant_restore.unfinished(self._connection, uuid, self._planner.identity())
                if pending is not None:
                    instant_restore.stand_again(self._uri, pending, self._request.passphrase)
                    return self._plan_of(uuid, pending.operation)
            before = journals.peek(uuid)
            finished = self._settle(uuid, check)
            if finished is not None:
                return finished  # the same restore, interrupted when its files were complete
            left = [] if check else instant_restore.left_behind(self._connection, before)
            stack.enter_context(
                self._repository.locked(self._point.domain_uuid, f"restoring {self._point.id}", shared=True)
                if not check
                else contextlib.nullcontext()
            )
            self._take(listing.find_again(self._repository, self._found))
            listing.require_restorable(self._repository, self._found)
            try:
                plan = self._planner.plan(name, uuid)
            except Conflict as error:
                raise _explained(error, left) from error
            self._require_opening(plan)
            self._require_space(plan)
            if not check and plan.loan is not None:
                self._stand_up(plan)
            elif not check:
                self._carry_out(plan)
        return plan

    # --- who it becomes ----------------------------------------------------------------------------

    def who(self) -> tuple[str, str]:
        """Name and UUID of the domain that is changed or made."""
        request, point = self._request, self._point
        if request.attach_to:
            handle = find_domain(self._connection, request.attach_to)
            return handle.name(), handle.UUIDString()
        if request.in_place:
            handle = self._planner.original()
            if request.domain not in (None, handle.name()):
                raise InvalidInput("in_place restores a domain under its own name", advice="Leave out domain")
            if request.confirm != handle.name():
                raise InvalidInput(
                    f"in_place replaces the disks of domain {handle.name()!r}, and confirm does not name it",
                    advice=f"Give confirm: {handle.name()}",
                )
            return handle.name(), handle.UUIDString()
        name = names.check_name(request.domain or point.domain, "domain")
        if name == point.domain and (not self._exists(point.domain_uuid) or self._begun(point.domain_uuid)):
            return name, point.domain_uuid
        # The same restore again is the same domain again, so that it finds what an interrupted one left.
        return name, str(uuids.uuid5(uuids.UUID(self._repository.uuid), f"{point.id}/{name}"))

    def _begun(self, uuid: str) -> bool:
        """Whether that domain is there because this very restore was interrupted."""
        operation = journals.peek(uuid)
        return operation is not None and self._is_this(operation)

    def _is_this(self, operation: Operation) -> bool:
        """Whether an operation is this very restore."""
        ours = operation.kind in (settle.RESTORE, instant_restore.KIND)
        return ours and bool(operation.plan["request"] == self._planner.identity())

    def _exists(self, uuid: str) -> bool:
        return find_by_uuid(self._connection, uuid) is not None

    def _settle(self, uuid: str, check: bool) -> Plan | None:
        """Settle what was interrupted; returns its plan when that finished this very restore.

        With ``check`` its plan, too, when it will be undone and done again: what lies there then is not in the way.
        """
        interrupted = journals.peek(uuid)
        name = interrupted.plan.get("name", self._point.domain) if interrupted is not None else self._point.domain
        settlement.settle_named(self._uri, [(uuid, name)], settlers.SETTLERS, check=check)
        if interrupted is None or not self._is_this(interrupted):
            return None
        if check:
            given_up = bool(instant_restore.left_behind(self._connection, interrupted))
            return None if given_up else self._plan_of(uuid, interrupted)
        forward = interrupted.kind == settle.RESTORE and settle.goes_forward(interrupted)
        return self._plan_of(uuid, interrupted) if forward else None

    def _plan_of(self, uuid: str, operation: Operation | None) -> Plan:
        """What an earlier run of this restore meant to do."""
        if operation is None:
            return Plan(self._request.domain or self._point.domain, uuid, (), None, None)  # it is over by now
        pieces = [Piece(**piece) for piece in operation.plan["pieces"]]
        return Plan(
            operation.plan["name"],
            uuid,
            tuple(piece for piece in pieces if piece.target != "nvram"),
            next((piece for piece in pieces if piece.target == "nvram"), None),
            operation.plan["xml"],
            tuple(operation.plan["notes"]),
            operation.plan.get("attach", {}),
        )

    def _require_opening(self, plan: Plan) -> None:
        stored.require_opening(
            self._repository,
            self._point,
            [piece.target for piece in plan.pieces],
            self._request.passphrase,
            advice="Give the one that it was backed up with",
        )

    def _require_space(self, plan: Plan) -> None:
        needs = []
        for piece in plan.pieces:
            sums = self._sums(piece.target)
            needs.append((os.path.dirname(piece.path), min(sums.size, (len(sums.chunks) + 8) * digests.CHUNK)))
        space.require(needs, f"Restoring point {self._point.id}")

    def _sums(self, target: str) -> digests.Sums:
        lineage = self._found.history.lineage(self._point, target)
        return verifying.chain_sums(self._repository, lineage, target)

    # --- effects -----------------------------------------------------------------------------------

    def _intention(self, plan: Plan) -> dict[str, Any]:
        """What every restore's journal says, whatever its mode."""
        return {
            "point": self._point.id,
            "request": self._planner.identity(),
            "notes": list(plan.notes),
            "pieces": [asdict(piece) for piece in (*plan.pieces, *([plan.nvram] if plan.nvram else ()))],
            "xml": plan.xml,
            "uuid": plan.uuid,
            "name": plan.name,
        }

    def _carry_out(self, plan: Plan) -> None:
        journal = Journal.begin(
            settle.RESTORE,
            [(plan.uuid, plan.name)],
            {
                **self._intention(plan),
                "in_place": self._request.in_place,
                "attach": dict(plan.attach),
                "running": self._request.running,
            },
        )
        try:
            self._define_secrets(journal, plan)
            for piece in plan.pieces:
                journal.step("copy", target=piece.target)
                self._copy(plan, piece)
            if plan.nvram is not None:
                journal.step("copy", target="nvram")
                self._copy_nvram(plan.nvram)
            settle.require_stopped(
                self._connection,
                journal.operation.plan,
                state="It runs on its own disks as they were, and nothing of the restore is left.",
                advice="Shut it down, then run this again",
            )
            if self._request.in_place:
                # Again: somebody may have cloned a disk while the point was copied.
                refuse_shared(self._connection, plan.uuid, plan.pieces)
        except BaseException as error:
            try:
                settle.undo_restore(self._uri, journal)
            except (VmkeeperError, libvirt.libvirtError, OSError) as trouble:
                if isinstance(error, VmkeeperError):
                    error.now(f"Undoing it failed ({trouble}); the next run goes on with that.")
            raise
        # Every file is complete and checked; an interruption from here on is finished, not undone.
        journal.step("place")
        self._kept = settle.finish_restore(self._uri, journal)

    def _stand_up(self, plan: Plan) -> None:
        journal = instant_restore.begin(
            plan.uuid,
            plan.name,
            {
                **self._intention(plan),
                "loan": asdict(plan.loan) if plan.loan else None,
                "bandwidth": self._request.bandwidth,
            },
        )
        try:
            self._define_secrets(journal, plan)
            if plan.nvram is not None:
                journal.step("copy", target="nvram")
                self._copy_nvram(plan.nvram)
        except BaseException:
            instant_restore.undo(self._uri, journal)
            raise
        instant_restore.stand_up(self._uri, journal, self._request.passphrase)

    def _worker_of(self, uuid: str) -> worker.Job | None:
        """A worker that pulls the guest of this very restore local now."""
        if not self._begun(uuid):
            return None
        handle = find_by_uuid(self._connection, uuid)
        job = domain_jobs.newest(uuid) if handle is not None and handle.isActive() else None
        return None if job is None or job.over or job.operation != instant_restore.KIND else job

    def _pull(self, plan: Plan, busy: worker.Job | None) -> dict[str, Any] | None:
        """Let it be pulled local; with ``wait`` None when that is done, else the worker's job."""
        if not self._request.wait:
            job = busy or instant_restore.start_worker(self._uri, plan.uuid, plan.name)
            return {**job.as_result(), "state": "pending"}
        if busy is not None:
            domain_jobs.wait_for(busy, seconds=self._request.wait_seconds)
            return None
        instant_restore.pull(
            self._uri, plan.uuid, plan.name, seconds=self._request.wait_seconds, passphrase=self._request.passphrase
        )
        return None

    def _define_secrets(self, journal: Journal, plan: Plan) -> None:
        found = secrets_of(plan.pieces)
        if not found or self._request.passphrase is None:
            return
        journal.step("secrets")
        for target, uuid in found.items():
            what = f"vmkeeper.libvirt: disk {target} of {plan.name}"
            libvirt_secret.define(self._connection, uuid, self._request.passphrase, what, ephemeral=False)

    def _key(self, plan: Plan, piece: Piece) -> Passphrase | None:
        """What the restored image is encrypted with."""
        if piece.secret is not None:
            return self._request.passphrase
        return plan.keys.get(piece.target)

    def _copy(self, plan: Plan, piece: Piece) -> None:
        lineage = self._found.history.lineage(self._point, piece.target)
        for holder in lineage:
            findings = verifying.check_link(self._repository, holder, piece.target)
            if findings:
                raise Refused(f"Point {self._point.id} cannot be restored: {findings[0].problem}")
        layers = stored.images_of(self._repository, lineage, piece.target, self._request.passphrase)
        restored = Image(piece.part, piece.format, self._key(plan, piece))
        doing = f"Restoring disk {piece.target!r} to {piece.part}"
        sums = self._sums(piece.target)
        if restored.passphrase is not None:
            qemu_img.create_layer(restored, sums.size)
            qemu_img.copy_chain(layers, restored, doing=doing, bandwidth=self._request.bandwidth)
        else:
            os.close(os.open(piece.part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            with Keys() as keys:
                source = image_node.as_name(image_node.node(layers, keys))
                limit = qemu_img.limiting(self._request.bandwidth)
                qemu_img.run(
                    ["convert", "-q", "-O", piece.format, "-W", "-m", "16", *limit, source, piece.part],
                    doing=doing,
                    keys=keys,
                    with_caller=True,
                )
        wrong = verifying.check_restored(restored, sums)
        if wrong:
            raise Refused(
                f"Disk {piece.target!r} of point {self._point.id} is damaged in the repository: {len(wrong)} MiB or more differ"
                f" from what was backed up, first at offset {wrong[0]} MiB",
                state="Nothing was put in place.",
                advice="backup_verify names what is damaged; restore another point, or copy this one by hand with qemu-img convert",
            )
        places.fsync_file(piece.part)

    def _copy_nvram(self, piece: Piece) -> None:
        source = os.path.join(self._repository.point_directory(self._point.domain_uuid, self._point.id), "nvram.fd")
        if digests.file_digest(source) != self._point.files.get("nvram.fd"):
            raise Refused(f"{source} is not what was written", advice="Restore another point")
        with open(source, "rb") as stream:
            places.write_new(piece.part, stream.read())

    def _answer(self, plan: Plan) -> Restored:
        return Restored(
            domain={
                "name": plan.name,
                "uuid": plan.uuid,
                "in_place": self._request.in_place,
                "attached": dict(plan.attach),
                "mapped": list(plan.notes),
            },
            restored=[
                {
                    "target": piece.target,
                    "path": piece.path,
                    "format": piece.format,
                    "attached_as": plan.attach.get(piece.target),
                    "secret": piece.secret,
                }
                for piece in plan.pieces
            ]
            + (
                [
                    {
                        "target": "nvram",
                        "path": plan.nvram.path,
                        "format": plan.nvram.format,
                        "attached_as": None,
                        "secret": None,
                    }
                ]
                if plan.nvram
                else []
            ),
            point=self._point.id,
            warnings=[f"{plan.name}: {note}" for note in (*plan.notes, *self._kept)],
        )
