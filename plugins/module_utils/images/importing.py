# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Launch an image as a new domain, believing nothing that it says before it was checked.

Every file is copied to a private directory, its digest compared, its header read by our own parser, and only then
``qemu-img`` makes a fresh qcow2 of it, as QEMU's user and within limits.  The guest never gets a file from outside.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .._errors import Conflict, InvalidInput, NotFound, Unsupported
from ..hypervisor import definition as definitions
from ..hypervisor import qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.chain import virtual_size
from ..hypervisor.confinement import Confinement
from ..hypervisor.connection import explaining, find_domain
from ..hypervisor.domain_model import Layer, qemu_owner, read_domain, read_state
from ..hypervisor.image_node import Image, Passphrase
from ..safety import locks, places, settlement, space
from ..safety.journal import Journal
from ..safety.names import file_stem
from . import bases, bundle, conversion, exporting, foreign_header, machine, settle
from .manifest import ImageDisk, Manifest, Nvram
from .manifest import refuse as refusal

#: A linked disk's overlay begins nearly empty; room for what the guest writes first.
OVERLAY_ROOM = 64 << 20


@dataclass(frozen=True)
class Request:
    """The task's options, checked. ``memory`` in bytes; None takes the image's own value."""

    src: str
    domain: str
    directory: str
    mode: str = "copy"
    vcpus: int | None = None
    memory: int | None = None
    network: str | None = None
    virt_type: str = "auto"
    running: bool = False
    passphrase: Passphrase | None = None


@dataclass
class Imported:
    """The result for the domain and the image that it came from."""

    domain: dict[str, Any]
    image: dict[str, Any]
    changed: bool
    warnings: list[str] = field(default_factory=list)


def import_image(
    connection: Any, uri: str, request: Request, *, identity: str | None = None, check: bool = False
) -> Imported:
    """See that the domain exists, launched from the image. Nothing is changed with ``check``.

    ``identity`` is the UUID of a domain that is made.
    """
    key = bundle.lock_key(f"/domain/{request.domain}")
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(locks.hold([(key, request.domain)], f"import of {request.src}"))
        settlement.settle_named(uri, [(key, request.domain)], settle.SETTLERS, check=check)
        opened = stack.enter_context(bundle.Opened(request.src))
        manifest, digest = opened.read_manifest()
        image = exporting.as_result(request.src, manifest, digest)
        existing = _find(connection, request.domain)
        if existing is not None:
            return _keep(existing, request, digest, image, check=check)
        if request.passphrase is None and any(disk.encryption != "none" for disk in manifest.disks):
            raise InvalidInput(
                f"The image {request.src} is encrypted",
                advice="Give passphrase; the new domain's disks are not encrypted",
            )
        machine.check_network(connection, request.network)
        kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
        host = machine.choose_host(connection, manifest.machine, request.virt_type, kvm_usable=kvm)
        if request.mode == "linked" and not check:
            stack.enter_context(bases.in_use(request.directory, f"import of {request.src}"))
        plan = _plan(
            request, manifest, digest, identity or str(uuid.uuid4()), going=settle.placed_by(key) if check else set()
        )
        space.require(plan.needs(manifest), f"Importing {request.src}")
        warnings = _warnings(request, manifest)
        if check:
            return Imported(_predicted(request, plan), image, True, warnings)
        # Whoever finds the domain as soon as it is defined waits until it is whole.
        stack.enter_context(locks.hold([(plan.launch.uuid, request.domain)], f"import of {request.src}"))
        run = _Import(
            connection, uri, key, request, opened, manifest, plan, host, qemu_owner(connection.getCapabilities())
        )
        return Imported(run.run(), image, True, warnings)


@dataclass(frozen=True)
class _Plan:
    launch: machine.Launch
    staging: str
    missing: tuple[ImageDisk, ...]

    def needs(self, manifest: Manifest) -> list[tuple[str, int]]:
        directory = os.path.dirname(self.staging)
        copied = [disk.stored_size + limit_of(disk) for disk in self.missing]
        return [(directory, sum(copied) + OVERLAY_ROOM * len(manifest.disks))]


def limit_of(disk: ImageDisk) -> int:
    """The most that a disk's fresh qcow2 may take: what the manifest declares, and a little for metadata.

    A small file that unpacks into more than it declared is stopped there (a bomb), long before the host is full.
    """
    return min(disk.content_size, disk.virtual_size + (disk.virtual_size >> 6)) + (16 << 20)


def _plan(request: Request, manifest: Manifest, digest: str, identity: str, *, going: Collection[str]) -> _Plan:
    """``going``: files that are there, and will not be when it is done."""
    paths = {
        disk.target: os.path.join(request.directory, f"{file_stem(request.domain, disk.target)}.qcow2")
        for disk in manifest.disks
    }
    taken = [path for path in paths.values() if os.path.lexists(path) and path not in going]
    if taken:
        raise Conflict(
            f"{', '.join(taken)} exists already",
            advice="Choose another name for the domain or another directory",
            paths=taken,
        )
    if manifest.nvram is not None:
        path = os.path.join(request.directory, f"{file_stem(request.domain, 'nvram')}.fd")
        if os.path.lexists(path) and path not in going:
            raise Conflict(f"{path} exists already", advice="Choose another name for the domain or another directory")
        nvram = path
    else:
        nvram = None
    linked = {}
    if request.mode == "linked":
        linked = {disk.target: bases.path_of(request.directory, digest, disk.target) for disk in manifest.disks}
    return _Plan(
        launch=machine.Launch(
            name=request.domain,
            uuid=identity,
            digest=digest,
            vcpus=request.vcpus or manifest.machine.vcpus,
            memory=request.memory or manifest.machine.memory,
            network=request.network,
            paths=paths,
            bases=linked,
            nvram=nvram,
        ),
        staging=os.path.join(request.directory, f".{file_stem(request.domain)}.import-{secrets.token_hex(6)}"),
        missing=tuple(
            disk for disk in manifest.disks if disk.target not in linked or not os.path.exists(linked[disk.target])
        ),
    )


def _warnings(request: Request, manifest: Manifest) -> list[str]:
    warnings = []
    if manifest.machine.firmware == "uefi" and manifest.nvram is None:
        warnings.append(f"{request.domain}: the image has no UEFI variables; it boots from its disks' default loader")
    if manifest.machine.interfaces and request.network is None:
        warnings.append(f"{request.domain} has no network interface; set network to give it one")
    return warnings


def _find(connection: Any, name: str) -> Any:
    try:
        return find_domain(connection, name)
    except NotFound:
        return None


def _keep(handle: Any, request: Request, digest: str, image: dict[str, Any], *, check: bool) -> Imported:
    """A domain of that name exists: it is what was asked for if it was launched from this very image."""
    with explaining(f"Reading domain {request.domain!r}"):
        xml = handle.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    if machine.launched_from(xml) != digest:
        raise Conflict(
            f"There is a domain {request.domain!r}, and it was not launched from {request.src} as it is now",
            advice="Choose another name for the new domain",
        )
    result, launched = _result(handle), machine.launched_with(xml)
    for what, wanted in (("vcpus", request.vcpus), ("memory", request.memory)):
        # It may have another size by now: that is resize_domain's business, and does not make the launch another one.
        if wanted is not None and what in launched and wanted not in (launched[what], result[what]):
            raise Conflict(
                f"Domain {request.domain!r} was launched from this image with {what} {launched[what]} and not {wanted}",
                advice="Change it with vmkeeper.libvirt.resize_domain",
            )
    changed = request.running and not read_state(handle).active
    if changed and not check:
        _start(handle)
    if changed:
        result["state"] = "running"
    return Imported(result, image, changed)


def _start(handle: Any) -> None:
    with explaining(
        f"Starting domain {handle.name()!r}", state="It is defined and shut off.", advice="See libvirt's log"
    ):
        handle.create()


def _predicted(request: Request, plan: _Plan) -> dict[str, Any]:
    return {
        "name": request.domain,
        "uuid": None,
        "state": "running" if request.running else "shutoff",
        "vcpus": plan.launch.vcpus,
        "memory": plan.launch.memory,
        "disks": [{"target": target, "path": path} for target, path in plan.launch.paths.items()],
    }


def _result(handle: Any) -> dict[str, Any]:
    model = read_domain(handle, inactive=True)
    return {
        "name": model.name,
        "uuid": model.uuid,
        "state": read_state(handle).name,
        "vcpus": model.vcpus_current,
        "memory": model.memory_current,
        "disks": [{"target": disk.target, "path": disk.path} for disk in model.disks],
    }


class _Import:
    """One run, from the journal's first step to its last."""

    def __init__(
        self,
        connection: Any,
        uri: str,
        key: str,
        request: Request,
        opened: bundle.Opened,
        manifest: Manifest,
        plan: _Plan,
        host: machine.HostMachine,
        owner: tuple[int, int],
    ) -> None:
        self._connection = connection
        self._uri = uri
        self._key = key
        self._request = request
        self._opened = opened
        self._manifest = manifest
        self._plan = plan
        self._host = host
        self._owner = owner

    def run(self) -> dict[str, Any]:
        launch, staging = self._plan.launch, self._plan.staging
        journal = Journal.begin(
            settle.IMPORT,
            # The domain's own, too: until this is over nobody else changes it.
            [(self._key, launch.name), (launch.uuid, launch.name)],
            {"domain": launch.name, "uuid": launch.uuid, "staging": staging},
        )
        try:
            journal.step("stage")
            os.mkdir(staging, 0o700)
            os.chmod(
                staging, 0o711
            )  # whatever the umask: qemu-img passes through as QEMU's user; it can make nothing here
            made = {}
            for disk in self._plan.missing:
                made[disk.target] = self._receive(journal, disk)
            if launch.bases:
                self._keep_bases(journal, made)
                made = {disk.target: self._overlay(disk) for disk in self._manifest.disks}
            places_of = {made[target]: launch.paths[target] for target in made}
            if self._manifest.nvram is not None and launch.nvram is not None:
                places_of[self._receive_nvram(self._manifest.nvram)] = launch.nvram
            journal.step("place", files=[{"path": place, "inode": inode_of(path)} for path, place in places_of.items()])
            for path, place in places_of.items():
                os.chown(path, *self._owner)
                places.fsync_file(path)
                os.link(path, place)  # never replaces what somebody else has put there meanwhile
                os.unlink(path)
            bundle.remove(staging)
            places.fsync_directory(self._request.directory)
            journal.step("define", nvram=self._manifest.nvram.size if self._manifest.nvram is not None else None)
            xml = machine.definition(launch, self._manifest.machine, self._manifest.disks, self._host)
            definitions.define(
                self._connection, xml, doing=f"Defining domain {launch.name!r}", state="Nothing of the image was kept."
            )
            self._check_nvram()
            journal.step("defined")
            journal.finish()
        except BaseException as error:
            settle.undo(settle.settle_import, self._uri, journal, error)
            raise
        handle = self._connection.lookupByUUIDString(launch.uuid)
        if self._request.running:
            _start(handle)
        return _result(handle)

    def _receive(self, journal: Journal, disk: ImageDisk) -> str:
        """A fresh qcow2 of one disk; see the module's own words for the order."""
        journal.step("copy", target=disk.target)
        copy = os.path.join(self._plan.staging, f"{disk.target}.from-outside")
        fresh = os.path.join(self._plan.staging, f"{disk.target}.qcow2")
        self._opened.copy(disk.file, disk.stored_size, disk.sha256, copy)
        foreign_header.check(copy, disk.format, disk.virtual_size, disk.file, disk.encryption)
        journal.step("convert", target=disk.target)
        os.chown(copy, os.geteuid(), self._owner[1])
        os.chmod(copy, 0o440)
        qemu_img.create(fresh, disk.virtual_size, self._owner)
        confined = Confinement(*self._owner, file_size=limit_of(disk))
        try:
            doing = f"Converting {disk.file}"
            if disk.encryption != "none":
                source = Image(copy, disk.format, self._request.passphrase)
                conversion.decrypt(source, fresh, doing=doing, confined=confined)
            else:
                conversion.convert(copy, disk.format, fresh, "qcow2", doing=doing, confined=confined)
        except qemu_img.ImageToolFailed as error:
            # Ended by SIGXFSZ, or EFBIG where qemu-img catches it: it unpacks into more than it declared.
            raise refusal(f"{disk.file} could not be read within its declared size ({error.problem})") from error
        os.unlink(copy)
        if virtual_size(Layer(path=fresh, format="qcow2")) != disk.virtual_size:
            raise refusal(f"{disk.file} is not a disk of {disk.virtual_size} bytes")
        return fresh

    def _receive_nvram(self, nvram: Nvram) -> str:
        """The UEFI variables, which only the guest's own firmware ever reads."""
        path = os.path.join(self._plan.staging, nvram.file)
        self._opened.copy(nvram.file, nvram.size, nvram.sha256, path)
        return path

    def _check_nvram(self) -> None:
        """Raise where the domain could not start with the image's UEFI variables; undoing takes it away again."""
        if self._manifest.nvram is None:
            return
        handle = self._connection.lookupByUUIDString(self._plan.launch.uuid)
        wanted = machine.nvram_misfit(handle, self._manifest.nvram.size)
        if wanted is not None:
            raise Unsupported(
                f"The image's UEFI variables have {self._manifest.nvram.size} bytes, and this host's firmware takes {wanted}",
                state="Nothing of the image was kept.",
                advice="Install firmware of the same build as where it was exported (Debian: ovmf, Fedora and RHEL: edk2-ovmf)",
            )

    def _keep_bases(self, journal: Journal, made: dict[str, str]) -> None:
        """Put new bases where later launches find them, read-only for QEMU's user and owned by root."""
        journal.step("bases")
        directory = bases.make_directory(self._request.directory)
        for target, path in made.items():
            os.chown(path, os.geteuid(), self._owner[1])
            os.chmod(path, 0o440)
            places.fsync_file(path)
            # Two launches may make the same base at once: it has the same content, and the first stays.
            with contextlib.suppress(FileExistsError):
                os.link(path, self._plan.launch.bases[target])
            os.unlink(path)
        places.fsync_directory(directory)

    def _overlay(self, disk: ImageDisk) -> str:
        path = os.path.join(self._plan.staging, f"{disk.target}.overlay")
        qemu_img.create_overlay(
            path,
            backing=self._plan.launch.bases[disk.target],
            backing_format="qcow2",
            size=disk.virtual_size,
            owner=self._owner,
        )
        return path


def inode_of(path: str) -> list[int]:
    """Device and inode of a file: itself, whatever its name."""
    status = os.lstat(path)
    return [status.st_dev, status.st_ino]
