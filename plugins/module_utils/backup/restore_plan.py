# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a restore will do: which files, in the place of which, under which definition. Nothing is changed here."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .._errors import Conflict, InvalidInput, NotFound, Refused, Unsupported
from ..hypervisor import definition, libvirt_secret, pools
from ..hypervisor.connection import find_by_uuid, find_domain
from ..hypervisor.domain_model import Disk, Layer, qemu_owner, read_domain
from ..hypervisor.image_node import Passphrase
from ..safety import names, views
from ..safety.host_graph import HostGraph, read_graph
from . import lending, listing
from .host import read_host, stored_definition
from .mapping import Target, fit
from .repository import Repository

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
    """Everything that will be done. ``keys`` are those of replaced disks, which keep their libvirt secret."""

    name: str
    uuid: str
    pieces: tuple[Piece, ...]
    nvram: Piece | None
    xml: str | None
    notes: tuple[str, ...] = ()
    attach: Mapping[str, str] = field(default_factory=dict)
    loan: lending.Loan | None = None
    keys: Mapping[str, Passphrase] = field(default_factory=dict, repr=False)


def check_request(request: Request) -> None:
    """Refuse options that exclude each other."""
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


class Planner:
    """Plans the restore of one point."""

    def __init__(self, connection: Any, repository: Repository, found: listing.Found, request: Request) -> None:
        self._connection = connection
        self._repository = repository
        self._found = found
        self._point = found.point
        self._request = request
        self._keys: dict[str, Passphrase] = {}

    def identity(self) -> dict[str, Any]:
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

    def original(self) -> Any:
        """The domain that the point was made of."""
        handle = find_by_uuid(self._connection, self._point.domain_uuid)
        if handle is None:
            raise NotFound(
                f"The domain {self._point.domain!r} ({self._point.domain_uuid}) is not defined here",
                advice="Leave out in_place to define it anew",
            )
        return handle

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

    def plan(self, name: str, uuid: str) -> Plan:
        """What will be done to make, or change, that domain."""
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
                secrets=secrets_of(pieces),
                nvram=nvram.path if nvram else None,
                network=self._network(),
            ),
            read_host(self._connection, xml_of_point),
        )
        xml = mapped.xml
        if loan is not None:
            models = definition.security_models(self._connection.getCapabilities())
            xml = definition.with_backing(xml, loan.layers(), models, loan.secrets())
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
        handle = self.original()
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
            if disk is None or disk.path is None or disk.sliced:
                raise Unsupported(
                    f"Disk {target!r} of domain {name!r} is not there, or is no local file of its own",
                    advice="Restore under another name, or attach_to a domain",
                )
            _refuse_device(name, disk)
            pieces.append(self._in_place_of(domain.name, disk))
        refuse_shared(self._connection, uuid, pieces)
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
                    secrets=secrets_of(pieces),
                ),
                read_host(self._connection, xml_of_point),
            )
            return Plan(name, uuid, tuple(pieces), nvram, mapped.xml, tuple(mapped.notes), keys=self._keys)
        return Plan(name, uuid, tuple(pieces), nvram, xml, keys=self._keys)

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
            self._keys[disk.target] = passphrase
        return piece

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


def secrets_of(pieces: Sequence[Piece]) -> dict[str, str]:
    """Disk and UUID of the libvirt secrets that the pieces need."""
    return {piece.target: piece.secret for piece in pieces if piece.secret is not None}


def refuse_shared(connection: Any, uuid: str, pieces: Sequence[Piece]) -> None:
    """Whatever else stands on an image of that domain would see other content under it. Call it under the locks."""
    graph = read_graph(connection, {os.path.dirname(os.path.realpath(piece.path)) for piece in pieces})
    for piece in pieces:
        users = users_besides(graph, piece.path, uuid)
        if users:
            raise Refused(
                f"{piece.path} is also in use by {', '.join(users)} and must not be replaced",
                advice="Restore under another name",
            )


def users_besides(graph: HostGraph, path: str, uuid: str) -> tuple[str, ...]:
    """Who needs the content of an image, besides the definition of the domain with that UUID: its snapshots count."""
    readers = [str(reader) for reader in graph.readers(path) if (reader.kind, reader.uuid) != ("domain", uuid)]
    return tuple(dict.fromkeys([*readers, *(f"the image {child}" for child in graph.children(path))]))
