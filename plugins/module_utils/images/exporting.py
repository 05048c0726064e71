# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Export a domain, running or not, or one of its snapshots, as an image: the effects of an :class:`~.export_plan.ExportPlan`."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import Conflict, LibvirtFailed, NoSpace, VmkeeperError
from ..hypervisor import appliance, backup_job, qemu_img
from ..hypervisor.connection import explaining, message_of
from ..hypervisor.domain_model import Layer, qemu_owner, read_domain
from ..hypervisor.image_node import Image
from ..safety import consistency, instant, names, places, reservation, sentry, settlement, space, targets, worker
from ..safety.journal import Journal
from ..safety.sentry import Sentry, Watch
from . import bundle, conversion, export_plan, foreign_header, live_copy, sealing, settle
from .bundle import lock_key
from .export_plan import DiskPlan, ExportPlan, Facts, Request
from .manifest import LARGEST_NVRAM, NVRAM_FILE, ImageDisk, Manifest, Nvram, Source

_NO_IMAGE = "No image was made."


@dataclass
class Exported:
    """The result: the image, and whether this run made it."""

    image: dict[str, Any]
    changed: bool
    warnings: list[str] = field(default_factory=list)


def export(connection: Any, uri: str, handle: Any, request: Request, *, check: bool = False) -> Exported:
    """See that the image exists. Nothing is changed with ``check``."""
    named = [(handle.UUIDString(), handle.name()), (lock_key(request.path), request.path)]
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(settlement.hold(named, f"export of image {request.name!r}"))
        settled = settlement.settle_before_change(uri, [handle], settle.SETTLERS, check=check)
        if any(one.get("finished") == request.path for one in settled):
            # The interrupted run had got so far that its image is whole; it is what this task wants.
            return Exported(existing(request.path), changed=True)
        if request.seal:
            appliance.require("Sealing an image")
        facts = export_plan.read_facts(handle, request)
        owner = qemu_owner(connection.getCapabilities())
        scratch = request.scratch or export_plan.SCRATCH
        direct = (
            request.scratch is None
            and request.passphrase is None  # what is to be encrypted is nowhere in the destination as it is
            and targets.is_local(request.dest)
            and places.reachable_by(request.dest, owner)
        )
        plan = export_plan.plan_export(request, facts, direct=direct, scratch=scratch)
        if os.path.lexists(request.path):
            return _compare_existing(request, facts, plan)
        if plan.copy_directory is not None:
            names.check_directory(scratch, "scratch")
            if plan.live:
                targets.check(scratch, owner, "scratch directory")
        kept_free = _kept_free(plan, request.dest)
        space.require(plan.needs(request.dest, kept_free), f"Exporting domain {plan.domain.name!r}")
        if check:
            return _predict(request, plan)
        return _Export(uri, handle, request, facts, plan, owner).run()


def _kept_free(plan: ExportPlan, dest: str) -> int:
    """Bytes that stay free where QEMU copies a running guest's disks to, with what is set aside there for each."""
    if not plan.live:
        return 0
    directory = plan.copy_directory or dest
    return sentry.floor(directory) * reservation.share_of(len(plan.disks), directory)


def existing(path: str) -> dict[str, Any]:
    """The ``image`` of a module's result for one that is there, by what its manifest says."""
    with bundle.Opened(path) as opened:
        manifest, digest = opened.read_manifest()
    return as_result(path, manifest, digest)


def _compare_existing(request: Request, facts: Facts, plan: ExportPlan) -> Exported:
    """An image of that name exists: the same content is what was asked for, anything else is not overwritten."""
    advice = "Choose another name, or remove that directory first"
    with bundle.Opened(request.path) as opened:
        opened.require_ours()
        manifest, digest = opened.read_manifest()
        differences = list(_differences_of_kind(request, manifest, plan))
        untold = _why_not_compared(facts, manifest, plan.domain.name, differences)
        if untold is not None:
            # Whoever only wants it handed over is told what it is: an earlier run of the same task may have made it.
            source = (manifest.source.uuid, manifest.source.snapshot)
            same = not differences and source == (plan.domain.uuid, request.snapshot) and _is_as_good(request, manifest)
            there: dict[str, Any] = {"image": as_result(request.path, manifest, digest)} if same else {}
            raise Conflict(
                f"There is an image {request.path} from {manifest.created}, and {untold}",
                advice=advice,
                **there,
            )
        if not differences:
            differences = list(_differences_of_content(request, manifest, plan, opened))
    if differences:
        raise Conflict(
            f"There is an image {request.path} from {manifest.created} that differs in {', '.join(differences)}",
            advice=advice,
        )
    return Exported(as_result(request.path, manifest, digest), changed=False)


def _why_not_compared(facts: Facts, manifest: Manifest, name: str, differences: Sequence[str]) -> str | None:
    """Why nobody can tell whether an image still is what the domain holds; None where reading both tells it."""
    if facts.live:
        return f"domain {name!r} runs: its content is another one now"
    if facts.inside:
        return f"snapshot {facts.snapshot!r} of domain {name!r} lies inside its images, which are not compared with it"
    if not differences and manifest.sealed and any(disk.unsealed_sha256 is None for disk in manifest.disks):
        # A digest of what was encrypted would tell whoever reads the manifest what it is, by trying.
        return f"it is sealed and encrypted: whether domain {name!r} still holds what it was made of cannot be told"
    return None


def _is_as_good(request: Request, manifest: Manifest) -> bool:
    """Whether an image that is there opens with what this task gives, and is as consistent as it wants."""
    if request.quiesce == "required" and manifest.consistency not in consistency.CLEAN:
        return False
    return request.passphrase is None or all(
        qemu_img.opens(Image(os.path.join(request.path, disk.file), disk.format, request.passphrase))
        for disk in manifest.disks
    )


def _encryption(request: Request) -> str:
    return "luks" if request.passphrase is not None else "none"


def _differences_of_kind(request: Request, manifest: Manifest, plan: ExportPlan) -> Iterator[str]:
    """In what an image differs from what was asked, by what its manifest says."""
    if manifest.machine != plan.machine:
        yield "the machine"
    if {disk.target for disk in manifest.disks} != {disk.target for disk in plan.disks}:
        yield "the choice of disks"
    if any(disk.format != request.format or disk.compression != request.compression for disk in manifest.disks):
        yield "the format or the compression"
    if manifest.sealed != request.seal:
        yield "what is sealed"
    if any(disk.encryption != _encryption(request) for disk in manifest.disks):
        yield "the encryption"
    if dict(manifest.tags) != dict(request.tags):
        yield "the tags"


def _differences_of_content(
    request: Request, manifest: Manifest, plan: ExportPlan, opened: bundle.Opened
) -> Iterator[str]:
    """In what an image of the right kind differs from the domain's disks as they are now, by reading both."""
    if (manifest.nvram.sha256 if manifest.nvram else None) != (bundle.digest_of(plan.nvram) if plan.nvram else None):
        yield "the UEFI variables"
        return
    wanted = {disk.target: disk for disk in plan.disks}
    for disk in manifest.disks:
        if disk.virtual_size != wanted[disk.target].size:
            yield f"the size of disk {disk.target}"
        elif opened.digest(disk.file, disk.stored_size) != disk.sha256:
            yield f"the file {disk.file}, which is damaged"
        elif not _holds_content_of(wanted[disk.target].source, disk, request):
            yield f"the content of disk {disk.target}"


def _holds_content_of(source: Layer, disk: ImageDisk, request: Request) -> bool:
    """Whether a stopped domain's disk is still what the image was made of."""
    path, image_format = source.path or "", source.format or "raw"
    stored = os.path.join(request.path, disk.file)
    if request.passphrase is not None and not request.seal:
        return conversion.same_as_encrypted(path, image_format, Image(stored, disk.format, request.passphrase))
    if disk.unsealed_sha256 is not None:
        return conversion.digest_as_raw(path, image_format, request.dest) == disk.unsealed_sha256
    return not request.seal and conversion.same_content(path, image_format, stored, disk.format)


def _predict(request: Request, plan: ExportPlan) -> Exported:
    image = {
        "path": request.path,
        "name": request.name,
        "manifest": os.path.join(request.path, "manifest.json"),
        "digest": None,
        "created": None,
        "consistency": plan.expected_level,
        "frozen_ms": None,
        "disks": [
            {
                "target": disk.target,
                "bus": disk.bus,
                "file": disk.file,
                "format": request.format,
                "compression": request.compression,
                "virtual_size": disk.size,
                "stored_size": None,
                "content_size": None,
                "sha256": None,
                "serial": disk.serial,
                "unsealed_sha256": None,
                "encryption": _encryption(request),
            }
            for disk in plan.disks
        ],
        "machine": plan.machine.as_json(),
        "not_captured": [dict(part) for part in plan.not_captured],
        "tags": dict(request.tags),
        "sealed": list(request.seal),
    }
    return Exported(image, changed=True, warnings=_warnings(request, plan, plan.expected_level, plan.why_not_frozen))


def as_result(path: str, manifest: Manifest, digest: str) -> dict[str, Any]:
    """The ``image`` of a module's result."""
    return {
        "path": path,
        "name": manifest.name,
        "manifest": os.path.join(path, "manifest.json"),
        "digest": f"sha256:{digest}",
        "created": manifest.created,
        "consistency": manifest.consistency,
        "frozen_ms": manifest.frozen_ms,
        "disks": [disk.as_json() for disk in manifest.disks],
        "machine": manifest.machine.as_json(),
        "not_captured": [dict(part) for part in manifest.not_captured],
        "tags": dict(manifest.tags),
        "sealed": list(manifest.sealed),
    }


def _warnings(request: Request, plan: ExportPlan, level: str, why_not_frozen: str | None) -> list[str]:
    name = plan.domain.name
    warnings = []
    if set(request.seal) != set(sealing.OPERATIONS):
        how = f"sealed only by {', '.join(request.seal)}" if request.seal else "not sealed"
        warnings.append(f"{name}: the image is {how}; with it may travel {sealing.unsealed(request.seal)}")
    left = [
        f"{part['name']} ({part['reason']})" for part in plan.not_captured if part["reason"] not in ("cdrom", "floppy")
    ]
    if left:
        warnings.append(f"{name}: not captured: {', '.join(left)}")
    if level == "crash":
        reason = why_not_frozen or ("it was not frozen" if plan.live else f"the domain was {plan.domain.state.reason}")
        warnings.append(f"{name}: the image is only crash-consistent: {reason}")
    return warnings


def level_of_cut(outcome: instant.Outcome[None]) -> str:
    """The consistency level of a copy that has begun. Raises where it must not go on, so that it is told before hours of copying."""
    name = outcome.member.name
    if not outcome.thawed or not outcome.resumed:
        raise VmkeeperError(
            f"It is not confirmed that {name!r} is thawed and running",
            state="No image was made, and nothing is copied."
            " The guard on this host goes on thawing until the agent confirms it or the domain stops.",
            advice="Look at the guest; if it hangs, restart its qemu-guest-agent",
        )
    if isinstance(outcome.error, NoSpace):
        raise outcome.error
    if outcome.error is not None:
        raise LibvirtFailed(
            f"Copying the disks of domain {name!r} could not begin: {message_of(outcome.error)}",
            state="No image was made; the guest is as it was before.",
            libvirt=message_of(outcome.error),
        )
    level = consistency.level(
        outcome.member.state, frozen_over_cut=outcome.frozen_over_cut, hook_proved=outcome.hook_proved
    )
    if outcome.member.required and level not in consistency.QUIESCED:
        raise VmkeeperError(
            f"Domain {name!r} did not stay frozen until its disks were cut, and quiesce is required",
            state="No image was made; the guest is as it was before.",
            advice="Look at what thawed it (the agent's log), or give a longer deadline",
        )
    return level


class _Export:
    """One run, from the journal's first step to its last."""

    def __init__(
        self, uri: str, handle: Any, request: Request, facts: Facts, plan: ExportPlan, owner: tuple[int, int]
    ) -> None:
        self._uri = uri
        self._handle = handle
        self._request = request
        self._facts = facts
        self._plan = plan
        self._owner = owner
        identifier = secrets.token_hex(6)
        self._staging = bundle.staging_of(request.path, identifier)
        # A directory of our own also below the scratch: what is removed later is all ours.
        self._copies = (
            os.path.join(plan.copy_directory, f".vmkeeper-export-{identifier}")
            if plan.copy_directory
            else self._staging
        )

    @property
    def _floor(self) -> int:
        return sentry.floor(self._copies)

    def run(self) -> Exported:
        domain = self._plan.domain
        directories = sorted({self._staging, self._copies})
        journal = Journal.begin(
            settle.EXPORT, [(domain.uuid, domain.name)], {"path": self._request.path, "directories": directories}
        )
        try:
            journal.step("stage")
            for directory in directories:
                os.mkdir(directory, 0o700)
            level, frozen_ms, why_not = self._plan.expected_level, None, self._plan.why_not_frozen
            if self._plan.live:
                level, frozen_ms, why_not = self._copy_live(journal)
            elif self._plan.inside is not None:
                self._take_out(journal, self._plan.inside)
            disks = self._write(journal)
            manifest = self._manifest(disks, self._copy_nvram(), level, frozen_ms)
            journal.step("seal", manifest=bundle.sha256_of_bytes(manifest.to_bytes()))
            digest = bundle.seal(self._staging, self._request.path, manifest)
            journal.step("sealed")
            for directory in directories:
                bundle.remove(directory)
            journal.finish()
            return Exported(
                as_result(self._request.path, manifest, digest),
                changed=True,
                warnings=_warnings(self._request, self._plan, level, why_not),
            )
        except BaseException as error:
            settle.undo(settle.settle_export, self._uri, journal, error)
            raise

    def _copy_live(self, journal: Journal) -> tuple[str, int | None, str | None]:
        """Copy the disks of one instant; returns the level, how long the guest was frozen, and why it was not."""
        plan = self._plan
        journal.step("targets")
        files = self._make_targets()
        watching = Sentry(self._uri, [Watch(plan.domain.uuid, self._copies, self._reserve())], self._floor)
        # Before it writes anything: a directory that no journal names would stay for ever.
        journal.step("watch", sentry=watching.directory)
        watching.post()
        backup_job.forget_last(self._handle)
        now = read_domain(self._handle)
        if not now.state.active:
            raise VmkeeperError(f"Domain {now.name!r} has stopped meanwhile", state=_NO_IMAGE, advice="Run this again")
        xml = live_copy.backup_xml(files, [disk.target for disk in now.disks if disk.chain])
        member = instant.Member(
            handle=self._handle,
            uuid=now.uuid,
            name=now.name,
            state=now.state,
            runtime_id=now.runtime_id,
            freeze=plan.freeze and now.state.running,
            required=self._request.quiesce == "required",
            standing=plan.standing,
            info=self._facts.agent,
        )

        def begin(one: instant.Member) -> None:
            live_copy.obey(watching, one.name, self._copies)
            live_copy.begin(one.handle, xml)
            with contextlib.suppress(LibvirtFailed):  # tried again when the guest is on its way
                self._limit(files)

        outcome = instant.take(
            self._uri,
            [member],
            begin,
            deadline=self._request.deadline,
            purpose=f"export of image {self._request.name!r}",
            journal=journal,
        )[now.uuid]
        level = level_of_cut(outcome)
        journal.step("copy")
        self._limit(files)
        live_copy.finish(self._uri, self._handle, self._copies, watching)
        watching.dismiss()
        for path in files.values():
            reservation.release(path)
        return level, outcome.frozen_ms, outcome.why_not_frozen or plan.why_not_frozen

    def _make_targets(self) -> dict[str, str]:
        """What QEMU writes each disk to, by target."""
        os.chmod(self._copies, 0o711)  # QEMU passes through; the files are its own, 0600
        files = {}
        for disk in self._plan.disks:
            with explaining(
                f"Reading the size of disk {disk.target!r} of domain {self._plan.domain.name!r}", state=_NO_IMAGE
            ):
                size = int(self._handle.blockInfo(disk.target)[0])  # read again under the lock: it must match exactly
            files[disk.target] = self._copy_of(disk.target)
            qemu_img.create(files[disk.target], size, self._owner)
        return files

    def _reserve(self) -> dict[str, int]:
        """Set room aside for each of them; bytes by file, 0 where the filesystem cannot do that."""
        reserved = {}
        for disk in self._plan.disks:
            path, size = self._copy_of(disk.target), disk.estimate + self._floor
            reserved[os.path.basename(path)] = size if reservation.reserve(path, size) else 0
        return reserved

    def _take_out(self, journal: Journal, snapshot: str) -> None:
        """Copy what the images hold of an internal snapshot."""
        for disk in self._plan.disks:
            journal.step("copy", target=disk.target)
            conversion.take_out(
                disk.source.path or "",
                snapshot,
                self._copy_of(disk.target),
                shared=self._plan.shared,
                doing=f"Copying snapshot {snapshot!r} out of disk {disk.target!r} of domain {self._plan.domain.name!r}",
                bandwidth=self._request.bandwidth,
            )

    def _limit(self, targets: Iterable[str]) -> None:
        """Slow the copy down, the largest disk first. What the guest is about to overwrite is copied at full speed all the same."""
        uuid = self._plan.domain.uuid
        estimates = {disk.target: disk.estimate for disk in self._plan.disks}
        largest_first = sorted(targets, key=lambda target: -estimates[target])
        live_copy.limit(self._handle, largest_first, worker.limit_for(uuid, self._request.bandwidth))

    def _copy_of(self, target: str) -> str:
        if not self._plan.converts:
            return os.path.join(self._staging, f"{target}.qcow2")
        return os.path.join(self._copies, f"{target}.copy")

    def _source_of(self, disk: DiskPlan) -> tuple[str, str]:
        """Path and format of what a disk of the image is made of."""
        if self._plan.seals:
            return self._sealed_of(disk.target), "raw"
        if self._plan.copied:
            return self._copy_of(disk.target), "qcow2"
        return disk.source.path or "", disk.source.format or "raw"

    def _seal(self, journal: Journal) -> dict[str, str]:
        """Seal copies of the disks; returns the digests of what a stopped domain's held before, by target."""
        plan, digests = self._plan, {}
        doing, limit = f"Sealing the image of domain {plan.domain.name!r}", self._request.bandwidth
        for disk in plan.disks:
            journal.step("copy-to-seal", target=disk.target)
            copy = self._sealed_of(disk.target)
            if plan.copied:
                conversion.convert(self._copy_of(disk.target), "qcow2", copy, "raw", doing=doing, bandwidth=limit)
                os.unlink(self._copy_of(disk.target))
            else:
                source, source_format = disk.source.path or "", disk.source.format or "raw"
                conversion.convert(source, source_format, copy, "raw", doing=doing, bandwidth=limit)
                digests[disk.target] = conversion.content_digest(copy)
        journal.step("clean", operations=list(self._request.seal))
        sealing.seal(
            [self._sealed_of(disk.target) for disk in plan.disks],
            self._request.seal,
            doing=doing,
            scratch=self._copies,
            discards=targets.is_local(self._copies),
        )
        return digests

    def _sealed_of(self, target: str) -> str:
        return os.path.join(self._copies, f"{target}.to-seal")

    def _write(self, journal: Journal) -> list[ImageDisk]:
        """The disks in the image's format, each looked at as an importer will."""
        written = []
        digests = self._seal(journal) if self._plan.seals else {}
        for disk in self._plan.disks:
            path = os.path.join(self._staging, disk.file)
            source, source_format = self._source_of(disk)
            journal.step("write", target=disk.target)
            content_size = conversion.content_size(source, source_format)
            doing = f"Exporting disk {disk.target!r} of domain {self._plan.domain.name!r}"
            if self._request.passphrase is not None:
                encrypted = Image(path, "qcow2", self._request.passphrase)
                conversion.encrypt(
                    source, source_format, encrypted, disk.size, doing=doing, bandwidth=self._request.bandwidth
                )
            elif self._plan.converts:
                conversion.convert(
                    source,
                    source_format,
                    path,
                    self._request.format,
                    self._request.compression,
                    doing=doing,
                    bandwidth=self._request.bandwidth,
                )
            if self._plan.converts and (self._plan.copied or self._plan.seals):
                os.unlink(source)
            encryption = _encryption(self._request)
            foreign_header.check(path, self._request.format, disk.size, disk.file, encryption)
            written.append(
                ImageDisk(
                    target=disk.target,
                    bus=disk.bus,
                    file=disk.file,
                    format=self._request.format,
                    compression=self._request.compression,
                    virtual_size=disk.size,
                    stored_size=os.stat(path).st_size,
                    content_size=content_size,
                    sha256=bundle.digest_of(path),
                    serial=disk.serial,
                    # Of an encrypted image it would tell somebody who guesses the content that the guess is right.
                    unsealed_sha256=digests.get(disk.target) if self._request.passphrase is None else None,
                    encryption=encryption,
                )
            )
        return written

    def _copy_nvram(self) -> Nvram | None:
        """The UEFI variables as they are now: they change when somebody changes the firmware's settings, not with the disks."""
        if self._plan.nvram is None:
            return None
        path = os.path.join(self._staging, NVRAM_FILE)
        with open(self._plan.nvram, "rb") as stream:
            places.write_new(path, stream.read(LARGEST_NVRAM))
        return Nvram(NVRAM_FILE, os.stat(path).st_size, bundle.digest_of(path))

    def _manifest(self, disks: list[ImageDisk], nvram: Nvram | None, level: str, frozen_ms: int | None) -> Manifest:
        domain = self._plan.domain
        return Manifest(
            name=self._request.name,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            source=Source(domain.name, domain.uuid, self._request.snapshot),
            consistency=level,
            frozen_ms=frozen_ms,
            machine=self._plan.machine,
            disks=tuple(disks),
            nvram=nvram,
            not_captured=self._plan.not_captured,
            tags=self._request.tags,
            sealed=self._request.seal,
        )
