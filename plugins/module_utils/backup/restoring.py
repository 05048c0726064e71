# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restore a point: copy and check every disk beside its place, then put all in place and define, or nothing.

Or at once, on the repository's own files: :mod:`.instant_restore`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from xml.etree import ElementTree

from .._errors import Conflict, InvalidInput, NotFound, Refused, Unsupported, VmkeeperError
from ..hypervisor import chain, definition, image_node, libvirt_secret, pools, qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import explaining, find_domain
from ..hypervisor.domain_model import Disk, Domain, Layer, qemu_owner, read_domain
from ..hypervisor.image_node import Image, Keys, Passphrase
from ..safety import domain_jobs, locks, names, places, settlement, space, views, worker
from ..safety import journal as journals
from ..safety.journal import Journal, Operation
from . import digests, instant_restore, lending, listing, settle, settlers, stored, verifying
from .host import read_host, stored_definition
from .mapping import Target, fit
from .repository import Repository, open_repository

NVRAM_DIRECTORY = "/var/lib/libvirt/qemu/nvram"
DEFAULT_DIRECTORY = "/var/lib/libvirt/images"


@dataclass(frozen=True)
class Request:
    """The task's options, checked."""

    repository: str
    id: str | None = None
    source_domain: str | None = None
    before: str | None = None
    domain: str | None = None
    disks: tuple[str, ...] | None = None
    directory: str | None = None
    pool: str | None = None
    network: str = "keep"
    in_place: bool = False
    confirm: str | None = None
    attach_to: str | None = None
    running: bool = False
    instant: bool = False
    bandwidth: int = 0
    wait: bool = True
    wait_seconds: float | None = None
    passphrase: Passphrase | None = None


@dataclass(frozen=True)
class Piece:
    """One file to restore: ``part`` is written first; ``aside`` keeps what was at ``path`` (in place only).

    ``secret`` is the UUID of the libvirt secret that is defined to open it, when it is encrypted.
    """

    target: str
    path: str
    format: str
    part: str
    aside: str | None = None
    secret: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that will be done."""

    name: str
    uuid: str
    pieces: tuple[Piece, ...]
    nvram: Piece | None
    xml: str | None
    notes: tuple[str, ...] = ()
    attach: Mapping[str, str] = field(default_factory=dict)
    loan: lending.Loan | None = None


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
    _check_request(request)
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


def _check_request(request: Request) -> None:
    if request.id is None and request.source_domain is None:
        raise InvalidInput("Neither id nor source_domain is given", advice="Give one of them")
    if request.in_place and request.attach_to:
        raise InvalidInput("in_place and attach_to exclude each other", advice="Give one of them")
    if request.attach_to and not request.disks:
        raise InvalidInput("attach_to needs disks", advice="Name the disks to restore and attach")
    if request.disks and not (request.in_place or request.attach_to):
        raise InvalidInput(
            "Single disks need a domain to go to",
            advice="Use in_place to put them back, or attach_to with a domain's name",
        )
    if request.in_place and (request.directory or request.pool):
        raise InvalidInput("in_place takes no directory or pool", advice="The disks go back to where they are")
    if request.directory and request.pool:
        raise InvalidInput("directory and pool exclude each other", advice="Give one of them")
    if request.instant and (request.in_place or request.attach_to):
        raise InvalidInput(
            "mode: instant makes a new domain, it replaces or attaches no disks",
            advice="Leave out in_place and attach_to, or use mode: copy",
        )
    if request.instant and not request.running:
        raise InvalidInput(
            "mode: instant starts the domain, it cannot only define it", advice="Leave out state, or use mode: copy"
        )


class _Restoring:
    def __init__(
        self, connection: Any, uri: str, repository: Repository, found: listing.Found, request: Request
    ) -> None:
        self._connection = connection
        self._uri = uri
        self._repository = repository
        self._found = found
        self._point = found.point
        self._request = request
        self._present: dict[str, Passphrase] = {}  # of the disks that are replaced and keep their libvirt secret

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
                stack.enter_context(locks.hold([(uuid, name)], f"restoring {self._point.id}"))
            if self._request.instant and not check:
                pending = instant_restore.unfinished(uuid, self._identity())
                if pending is not None:
                    instant_restore.stand_again(self._uri, pending)
                    return self._plan_of(uuid, pending.operation)
            finished = self._settle(uuid, check)
            if finished is not None:
                return finished  # the same restore, interrupted when its files were complete
            stack.enter_context(
                self._repository.locked(self._point.domain_uuid, f"restoring {self._point.id}", shared=True)
                if not check
                else contextlib.nullcontext()
            )
            listing.require_restorable(self._repository, self._found)
            plan = self._plan(name, uuid)
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
            handle = self._original()
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
        return (
            operation is not None
            and operation.kind in (settle.RESTORE, instant_restore.KIND)
            and operation.plan["request"] == self._identity()
        )

    def _original(self) -> Any:
        handle = settle.find(self._connection, self._point.domain_uuid)
        if handle is None:
            raise NotFound(
                f"The domain {self._point.domain!r} ({self._point.domain_uuid}) is not defined here",
                advice="Leave out in_place to define it anew",
            )
        return handle

    def _exists(self, uuid: str) -> bool:
        return settle.find(self._connection, uuid) is not None

    def _settle(self, uuid: str, check: bool) -> Plan | None:
        """Settle what was interrupted; returns its plan when that finished this very restore."""
        interrupted = journals.peek(uuid)
        handle = settle.find(self._connection, uuid)
        if handle is not None:
            settlement.settle_before_change(self._uri, [handle], settlers.SETTLERS, check=check)
        elif not check:
            pending = journals.unfinished(uuid)
            if pending is not None:
                settlers.SETTLERS[pending.operation.kind](self._uri, pending)
        if check or interrupted is None or interrupted.kind != settle.RESTORE or not interrupted.reached("place"):
            return None
        if interrupted.plan["request"] != self._identity():
            return None
        return self._plan_of(uuid, interrupted)

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

    def _identity(self) -> dict[str, Any]:
        """What makes two restores the same."""
        request = self._request
        return {
            "point": self._point.id,
            "disks": list(request.disks) if request.disks is not None else None,
            "in_place": request.in_place,
            "attach_to": request.attach_to,
            "directory": request.directory,
            "pool": request.pool,
            "network": request.network,
            "instant": request.instant,
        }

    # --- plan --------------------------------------------------------------------------------------

    def _targets(self) -> list[str]:
        held = [disk.target for disk in self._point.disks]
        for target in self._request.disks or ():
            if target not in held:
                raise NotFound(
                    f"Point {self._point.id} does not hold disk {target!r}",
                    advice="Its disks are: " + ", ".join(held),
                    existing=held,
                )
        return [target for target in held if self._request.disks is None or target in self._request.disks]

    def _plan(self, name: str, uuid: str) -> Plan:
        if self._request.attach_to:
            return self._plan_attach(name, uuid)
        if self._request.in_place:
            return self._plan_in_place(name, uuid)
        for domain in self._connection.listAllDomains():
            if domain.name() == name:
                raise Conflict(
                    f"There is a domain {name!r} on this host already",
                    advice="Give another name with domain, or use in_place with confirm to replace its disks",
                )
        pieces, notes = self._new_pieces(name, self._targets())
        nvram = self._new_nvram(name)
        loan = self._plan_loan(uuid, [piece.target for piece in pieces]) if self._request.instant else None
        xml_of_point = stored_definition(self._repository, self._point)
        mapped = fit(
            xml_of_point,
            Target(
                name=name,
                uuid=uuid,
                fresh=uuid != self._point.domain_uuid,
                disks={piece.target: Layer(piece.path, piece.format) for piece in pieces},
                secrets=_secrets(pieces),
                nvram=nvram.path if nvram else None,
                network=self._network(),
            ),
            read_host(self._connection, xml_of_point),
        )
        xml = mapped.xml
        if loan is not None:
            models = definition.security_models(self._connection.getCapabilities())
            xml = definition.with_backing(xml, loan.layers(), models)
        return Plan(name, uuid, tuple(pieces), nvram, xml, (*notes, *mapped.notes), loan=loan)

    def _plan_loan(self, uuid: str, targets: Sequence[str]) -> lending.Loan:
        loan = lending.plan_loan(self._repository, self._found, targets, uuid)
        views.require_support(loan.source, qemu_owner(self._connection.getCapabilities()))
        return loan

    def _new_pieces(self, name: str, targets: Sequence[str]) -> tuple[list[Piece], list[str]]:
        pieces, notes = [], []
        for target in targets:
            held = self._point.disk(target)
            encrypted = held is not None and held.encrypted_source
            image_format = "raw" if held is not None and held.source_format == "raw" and not encrypted else "qcow2"
            if self._request.instant and image_format == "raw":
                image_format = "qcow2"
                notes.append(f"disk {target} was raw and is qcow2 now")
            directory, note = self._directory(target)
            if note and note not in notes:
                notes.append(note)
            path = os.path.join(directory, f"{names.file_stem(name, target)}.{image_format}")
            for taken in (path, f"{path}.part"):
                if os.path.lexists(taken):
                    raise Conflict(
                        f"{taken} exists already and is not overwritten",
                        advice="Give another directory or name, or use in_place",
                        path=taken,
                    )
            secret = self._new_secret(path) if encrypted else None
            pieces.append(Piece(target, path, image_format, f"{path}.part", secret=secret))
        return pieces, notes

    def _new_secret(self, path: str) -> str:
        # The same restore again has the same secret again.
        return str(uuids.uuid5(uuids.UUID(self._repository.uuid), f"{self._point.id}{path}"))

    def _directory(self, target: str) -> tuple[str, str | None]:
        """Where a disk goes, and a note when that is not where it came from."""
        if self._request.pool:
            directory = pools.directory_of(self._connection, self._request.pool)
            return names.check_directory(directory, "the pool's directory"), None
        if self._request.directory:
            return names.check_directory(self._request.directory), None
        held = self._point.disk(target)
        source = held.source[0].path if held is not None and held.source else ""
        directory = os.path.dirname(source)
        if source.startswith("/dev/"):
            return (
                names.check_directory(DEFAULT_DIRECTORY),
                f"disk {target} was on the block device {source}, which is not touched; it is an image in {DEFAULT_DIRECTORY} now",
            )
        if directory and os.path.isdir(directory):
            return directory, None
        return (
            names.check_directory(DEFAULT_DIRECTORY),
            f"the disks lay in {directory}, which is not here; they go to {DEFAULT_DIRECTORY}",
        )

    def _new_nvram(self, name: str) -> Piece | None:
        if self._point.nvram is None:
            return None
        suffix = "fd" if self._point.nvram == "raw" else "qcow2"
        directory = NVRAM_DIRECTORY if os.path.isdir(NVRAM_DIRECTORY) else DEFAULT_DIRECTORY
        path = os.path.join(directory, f"{names.file_stem(name)}_VARS.{suffix}")
        if os.path.lexists(path):
            path = os.path.join(directory, f"{names.file_stem(name, self._point.id)}_VARS.{suffix}")
        if os.path.lexists(path):
            raise Conflict(f"{path} exists already and is not overwritten", advice="Move it away", path=path)
        return Piece("nvram", path, self._point.nvram, f"{path}.part")

    def _network(self) -> str:
        network = self._request.network
        if network not in ("keep", "disconnected") and network not in self._connection.listNetworks():
            defined = [one.name() for one in self._connection.listAllNetworks()]
            if network not in defined:
                raise NotFound(
                    f"There is no network {network!r} on this host",
                    advice="The networks here are: " + (", ".join(sorted(defined)) or "none"),
                    existing=sorted(defined),
                )
        return network

    def _plan_in_place(self, name: str, uuid: str) -> Plan:
        handle = self._original()
        domain = read_domain(handle)
        if domain.state.active:
            raise Refused(
                f"Domain {name!r} is {domain.state.name}; its disks cannot be replaced under it",
                advice="Shut it down first, or restore under another name",
            )
        if domain.managed_save:
            raise Refused(
                f"Domain {name!r} has a managed-save image: its RAM would resume on other disks",
                advice=f"Drop the saved state (virsh managedsave-remove {name}), then run this again",
            )
        pieces = []
        for target in self._targets():
            disk = domain.disk(target)
            if disk is None or disk.path is None:
                raise Unsupported(
                    f"Disk {target!r} of domain {name!r} is not there, or is no local file",
                    advice="Restore under another name, or attach_to a domain",
                )
            _refuse_device(name, disk)
            pieces.append(self._in_place_of(domain.name, disk))
        self._refuse_shared(handle, domain, pieces)
        nvram = None
        xml = None
        if self._request.disks is None:
            if self._point.nvram is not None and domain.nvram is not None:
                nvram = self._aside("nvram", domain.nvram.path, self._point.nvram)
            layers = {piece.target: Layer(piece.path, piece.format) for piece in pieces}
            target_nvram = nvram.path if nvram else (domain.nvram.path if domain.nvram else None)
            xml_of_point = stored_definition(self._repository, self._point)
            mapped = fit(
                xml_of_point,
                Target(
                    name,
                    uuid,
                    fresh=False,
                    disks=layers,
                    nvram=target_nvram,
                    network=self._network(),
                    secrets=_secrets(pieces),
                ),
                read_host(self._connection, xml_of_point),
            )
            return Plan(name, uuid, tuple(pieces), nvram, mapped.xml, tuple(mapped.notes))
        return Plan(name, uuid, tuple(pieces), nvram, xml)

    def _in_place_of(self, name: str, disk: Disk) -> Piece:
        """The image that takes the place of a disk's."""
        held = self._point.disk(disk.target)
        piece = self._aside(disk.target, disk.path or "", disk.format or "raw")
        encrypted = held is not None and held.encrypted_source
        if self._request.disks is None:  # its definition is restored too
            return replace(piece, format="qcow2", secret=self._new_secret(piece.path)) if encrypted else piece
        if encrypted != disk.encrypted:
            raise Refused(
                f"Disk {disk.target!r} of domain {name!r} is {'' if disk.encrypted else 'not '}encrypted, and in the point it is"
                f" {'' if encrypted else 'not'}".rstrip(),
                advice="Leave out disks, so that the definition is restored too, or restore under another name",
            )
        if encrypted:
            passphrase = libvirt_secret.value_of(self._connection, disk.encryption) if disk.encryption else None
            if passphrase is None or disk.format != "qcow2":
                raise Refused(
                    f"Disk {disk.target!r} of domain {name!r} is encrypted, and libvirt does not tell the passphrase of its secret"
                    " or it is not a qcow2",
                    advice="Leave out disks, so that the definition is restored too, or restore under another name",
                )
            self._present[disk.target] = passphrase
        return piece

    def _key(self, piece: Piece) -> Passphrase | None:
        """What the restored image is encrypted with."""
        if piece.secret is not None:
            return self._request.passphrase
        return self._present.get(piece.target)

    def _aside(self, target: str, path: str, image_format: str) -> Piece:
        piece = Piece(
            target,
            path,
            image_format,
            f"{path}.{self._point.id}.part",
            f"{path}.before-{self._point.id}",
        )
        for taken in (piece.part, piece.aside or ""):
            if os.path.lexists(taken):
                raise Conflict(f"{taken} exists already", advice="Look at it, then move it away", path=taken)
        return piece

    def _refuse_shared(self, handle: Any, domain: Domain, pieces: Sequence[Piece]) -> None:
        """Whatever else stands on a file would see other content under it."""
        wanted = {os.path.realpath(piece.path): piece.path for piece in pieces}
        for user, path in _others_layers(self._connection, handle):
            if os.path.realpath(path) in wanted:
                raise Refused(
                    f"{path} is also in use by {user} and must not be replaced",
                    advice="Restore under another name",
                )
        del domain

    def _plan_attach(self, name: str, uuid: str) -> Plan:
        handle = find_domain(self._connection, name)
        domain = read_domain(handle)
        pieces, notes = self._new_pieces(f"{name}.{self._point.domain}.{self._point.id}", self._targets())
        taken = {disk.target for disk in domain.disks}
        attach = {}
        for piece in pieces:
            prefix = "sd" if piece.target.startswith("sd") else "vd"
            letter = next(
                f"{prefix}{chr(code)}" for code in range(ord("a"), ord("z") + 1) if f"{prefix}{chr(code)}" not in taken
            )
            taken.add(letter)
            attach[piece.target] = letter
        return Plan(name, uuid, tuple(pieces), None, None, tuple(notes), attach)

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
            "request": self._identity(),
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
                self._copy(piece)
            if plan.nvram is not None:
                journal.step("copy", target="nvram")
                self._copy_nvram(plan.nvram)
            settle.require_stopped(
                self._connection,
                journal.operation.plan,
                state="It runs on its own disks as they were, and nothing of the restore is left.",
                advice="Shut it down, then run this again",
            )
        except BaseException as error:
            try:
                settle.undo_restore(self._uri, journal)
            except (VmkeeperError, libvirt.libvirtError, OSError) as trouble:
                if isinstance(error, VmkeeperError):
                    error.state = f"Undoing it failed ({trouble}); the next run goes on with that."
                    error.args = (str(error),)
            raise
        # Every file is complete and checked; an interruption from here on is finished, not undone.
        journal.step("place")
        settle.finish_restore(self._uri, journal)

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
        if plan.nvram is not None:
            journal.step("copy", target="nvram")
            try:
                self._copy_nvram(plan.nvram)
            except BaseException:
                instant_restore.undo(self._uri, journal)
                raise
        instant_restore.stand_up(self._uri, journal)

    def _worker_of(self, uuid: str) -> worker.Job | None:
        """A worker that pulls the guest of this very restore local now."""
        if not self._begun(uuid):
            return None
        handle = settle.find(self._connection, uuid)
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
        instant_restore.pull(self._uri, plan.uuid, plan.name, seconds=self._request.wait_seconds)
        return None

    def _define_secrets(self, journal: Journal, plan: Plan) -> None:
        found = _secrets(plan.pieces)
        if not found or self._request.passphrase is None:
            return
        journal.step("secrets")
        for target, uuid in found.items():
            what = f"vmkeeper.libvirt: disk {target} of {plan.name}"
            libvirt_secret.define(self._connection, uuid, self._request.passphrase, what, ephemeral=False)

    def _copy(self, piece: Piece) -> None:
        lineage = self._found.history.lineage(self._point, piece.target)
        for holder in lineage:
            findings = verifying.check_link(self._repository, holder, piece.target)
            if findings:
                raise Refused(f"Point {self._point.id} cannot be restored: {findings[0].problem}")
        layers = stored.images_of(self._repository, lineage, piece.target, self._request.passphrase)
        restored = Image(piece.part, piece.format, self._key(piece))
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
            content = stream.read()
        descriptor = os.open(piece.part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

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
            warnings=[f"{plan.name}: {note}" for note in plan.notes],
        )


def _refuse_device(name: str, disk: Disk) -> None:
    """A device cannot be put aside and replaced by a rename: overwritten in the middle it would be neither old nor new."""
    path = disk.path or ""
    with contextlib.suppress(FileNotFoundError):
        if path.startswith("/dev/") or stat.S_ISBLK(os.stat(path).st_mode):
            raise Unsupported(
                f"Disk {disk.target!r} of domain {name!r} is the block device {path}, whose content could not be kept aside",
                advice=f"Restore the disk with attach_to, or under another name, look at it, and copy its image onto the device:"
                f" qemu-img convert -n -f <its format> -O {disk.format or 'raw'} <image> {path}",
            )


def _secrets(pieces: Sequence[Piece]) -> dict[str, str]:
    return {piece.target: piece.secret for piece in pieces if piece.secret is not None}


def _others_layers(connection: Any, handle: Any) -> list[tuple[str, str]]:
    """(who, path) of every image that another domain, or a snapshot of this one, stands on."""
    found: list[tuple[str, str]] = []
    for other in connection.listAllDomains():
        if other.UUIDString() == handle.UUIDString():
            continue
        for inactive in (False, True):
            if inactive and not other.isPersistent():
                continue
            for disk in read_domain(other, inactive=inactive).disks:
                try:
                    layers = chain.chain_of(disk)
                except (Refused, Unsupported):
                    layers = disk.chain
                found += [(f"domain {other.name()!r}", layer.path) for layer in layers if layer.path]
    with explaining(f"Reading the snapshots of domain {handle.name()!r}"):
        for snapshot in handle.listAllSnapshots():
            root = ElementTree.fromstring(snapshot.getXMLDesc(0))
            for source in root.iterfind("domain/devices/disk/source"):
                path = source.get("file") or source.get("dev")
                if path:
                    found.append((f"snapshot {snapshot.getName()!r}", path))
    return found
