# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make restore points: targets and sentry before, one begin call at the instant, then sums, manifest, one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import InvalidInput, LibvirtFailed, NoSpace, VmkeeperError
from ..hypervisor import block_jobs, definition, libvirt_secret, qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import constant, dotted, explaining, message_of, version_triple
from ..hypervisor.domain_model import qemu_owner, read_domain
from ..hypervisor.image_node import Image, Passphrase
from ..safety import consistency, instant, locks, places, processes, settlement, space
from ..safety.journal import Journal
from . import checkpoints, digests, job, manifest, reservation, settle, settlers, stored
from . import facts as reading
from .manifest import Point, StoredDisk
from .plan import (
    REASONS,
    DiskPlan,
    Facts,
    PointPlan,
    Request,
    backup_xml,
    checkpoint_xml,
    floor_of,
    must_stage,
    plan_point,
    refuse_impossible,
    source_layers,
    young_enough,
)
from .repository import (
    Repository,
    check_target,
    is_local,
    make_domain_directory,
    new_id,
    open_repository,
    sweep,
)
from .sentry import Sentry, Watch

#: An NVRAM larger than this is none.
_NVRAM_LIMIT = 64 << 20

#: For the random key of a scratch image; the least that QEMU can measure.
_KEY_MILLISECONDS = 10


@dataclass
class Made:
    """The result for one domain."""

    point: dict[str, Any]
    changed: bool
    warnings: list[str] = field(default_factory=list)


def take(
    connection: Any, uri: str, handles: Sequence[Any], path: str, request: Request, *, check: bool = False
) -> list[Made]:
    """``state: present``: make a point of every domain, all at one instant. Nothing is changed with ``check``."""
    refuse_impossible(request)
    repository = open_repository(path, create=True, check=check)
    owner = qemu_owner(connection.getCapabilities())
    named = [(handle.UUIDString(), handle.name()) for handle in handles]
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(locks.hold(named, f"backup into {repository.path}"))
            settlement.settle_before_change(uri, handles, settlers.SETTLERS)
            for uuid, name in sorted(named):
                stack.enter_context(repository.locked(uuid, f"backup of {name}"))
                sweep(repository, uuid)
        else:
            settlement.settle_before_change(uri, handles, settlers.SETTLERS, check=True)
        facts = [reading.read_facts(handle, repository, repair=not check) for handle in handles]
        fresh = _recent(request, facts)
        if fresh is not None:
            return fresh
        plans = [plan_point(request, one) for one in facts]
        scratch = _scratch(request, repository, plans, owner, check=check)
        _require_opening(repository, facts, plans)
        floor = floor_of(_filesystem_size(scratch or repository.path))
        _require_space(repository, plans, floor, scratch)
        if check:
            return [_predict(plan, request) for plan in plans]
        return _Taking(connection, uri, repository, owner, list(handles), facts, plans, request, floor, scratch).run()


def _scratch(
    request: Request, repository: Repository, plans: Sequence[PointPlan], owner: tuple[int, int], *, check: bool
) -> str | None:
    """Where QEMU writes to, when that is not the repository."""
    if not must_stage(request, plans, local=is_local(repository.path)):
        if any(plan.live for plan in plans):
            check_target(repository.path, owner)
        return None
    if request.scratch is None and not check:
        places.passable_directory(places.SCRATCH)
    directory = request.scratch or places.SCRATCH
    while request.scratch is None and check and not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    if request.scratch is not None or not check:
        check_target(directory, owner, "scratch directory")
    return directory


def _require_opening(repository: Repository, facts: Sequence[Facts], plans: Sequence[PointPlan]) -> None:
    """An increment is written with the passphrase of what it stands on, or not at all."""
    for one, plan in zip(facts, plans):
        for disk in plan.disks:
            parent = one.history.point(disk.parent) if disk.parent else None
            if parent is not None:
                stored.require_opening(
                    repository,
                    parent,
                    [disk.target],
                    disk.passphrase,
                    advice="Give the passphrase of that point, or type: full to begin a new chain with this one",
                )


def _recent(request: Request, facts: Sequence[Facts]) -> list[Made] | None:
    """With ``min_age``, the points that are young enough, if every domain of the task has one."""
    if request.min_age is None:
        return None
    found = [young_enough(one.history, request.min_age, manifest.now_utc()) for one in facts]
    if any(point is None for point in found):
        return None
    return [Made(point.as_result(), changed=False) for point in found if point is not None]


def _filesystem_size(path: str) -> int:
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def _require_space(repository: Repository, plans: Sequence[PointPlan], floor: int, scratch: str | None) -> None:
    needs = [(repository.path, sum(plan.estimate for plan in plans))]
    if scratch is not None:
        needs.insert(0, (scratch, sum(plan.estimate for plan in plans if plan.live)))
    for directory, needed in space.total_by_filesystem(needs).items():
        free = space.free_bytes(directory)
        if free < needed + floor:
            what = "repository" if directory == repository.path else "scratch directory"
            raise NoSpace(
                f"The {what} {directory} has {space.human(free)} free; this backup may need {space.human(needed)} there,"
                f" and {space.human(floor)} stay free so that no write of a guest can fail",
                advice="Make room there, or remove old points",
                path=directory,
                needed=needed + floor,
                free=free,
            )


def _predict(plan: PointPlan, request: Request) -> Made:
    point = Point(
        id="",
        sequence=plan.sequence,
        domain=plan.domain.name,
        domain_uuid=plan.domain.uuid,
        created="",
        type=plan.type,
        reason=REASONS[plan.reason],
        parent=plan.parent,
        consistency=plan.expected_level,
        disks=tuple(
            StoredDisk(
                disk.target,
                disk.type,
                REASONS[disk.reason],
                disk.parent,
                disk.facts.size,
                disk.estimate,
                0,
                compression=disk.compression,
                encryption=manifest.LUKS if disk.passphrase is not None else None,
            )
            for disk in plan.disks
        ),
        description=request.description or "",
        tags=request.tags or {},
        protected=request.protected,
        not_captured=tuple(part.as_result() for part in plan.capture.left_out),
        stored_bytes=plan.estimate,
    )
    result = {**point.as_result(), "id": None, "created": None}
    return Made(result, changed=True, warnings=_warnings(plan, request, plan.expected_level, plan.why_not_frozen))


def _warnings(plan: PointPlan, request: Request, level: str, why_not_frozen: str | None) -> list[str]:
    warnings = []
    left_out = plan.capture.warning(plan.domain.name)
    if left_out:
        warnings.append(left_out)
    if level == "crash":
        warnings.append(f"{plan.domain.name}: the point is only crash-consistent: {_why_crash(plan, why_not_frozen)}")
    asked = request.compression is not None
    uncompressed = [disk.target for disk in plan.disks if asked and disk.facts.disk.encrypted]
    if uncompressed:
        warnings.append(
            f"{plan.domain.name}: {', '.join(uncompressed)} is encrypted in the guest's own image, and stays so uncompressed"
        )
    opened = [disk.target for disk in plan.disks if disk.reason == "encryption changed" and disk.passphrase is None]
    if opened:
        warnings.append(
            f"{plan.domain.name}: {', '.join(opened)} is stored in the clear, while the points before are encrypted"
        )
    full = [
        disk for disk in plan.disks if disk.parent is None and disk.reason in ("raw", "old qcow2", "transient domain")
    ]
    if full:
        warnings.append(
            f"{plan.domain.name}: always full: " + ", ".join(f"{disk.target} ({REASONS[disk.reason]})" for disk in full)
        )
    return warnings


def _why_crash(plan: PointPlan, why_not_frozen: str | None) -> str:
    if plan.domain.managed_save:
        return "it has a saved state, whose memory is not part of the point"
    if not plan.domain.state.running:
        return f"it was {plan.domain.state.name} ({plan.domain.state.reason})"
    return why_not_frozen or "it was not frozen"


class _Taking:
    """One run, from the journal's first step to its last."""

    def __init__(
        self,
        connection: Any,
        uri: str,
        repository: Repository,
        owner: tuple[int, int],
        handles: list[Any],
        facts: list[Facts],
        plans: list[PointPlan],
        request: Request,
        floor: int,
        scratch: str | None,
    ) -> None:
        self._connection = connection
        self._uri = uri
        self._repository = repository
        self._owner = owner
        self._handles = {plan.domain.uuid: handle for handle, plan in zip(handles, plans)}
        self._facts = {one.domain.uuid: one for one in facts}
        self._plans = plans
        self._by_uuid = {plan.domain.uuid: plan for plan in plans}
        self._request = request
        self._floor = floor
        self._ids = {plan.domain.uuid: new_id() for plan in plans}
        self._live = [plan for plan in plans if plan.live]
        self._scratch = scratch
        # Nothing that is stored encrypted lies in the clear on its way. A random key needs no slow derivation, which would
        # hold up QEMU, and the guest with it, when it opens the target.
        self._key = Passphrase(secrets.token_hex(32).encode())
        encrypting = any(disk.passphrase is not None for plan in self._live for disk in plan.disks)
        self._secret = str(uuids.uuid4()) if encrypting else None

    def run(self) -> list[Made]:
        """Make the points; undone as a whole when anything fails before they exist."""
        self._begin()
        try:
            self._journal.step("targets")
            for plan in self._plans:
                self._make_targets(plan)
            outcomes = self._cut_all()
            points = [self._describe(plan, outcomes.get(plan.domain.uuid)) for plan in self._plans]
        except OSError as error:
            self._undo(error)
            raise self._explained(error) from error
        except BaseException as error:
            self._undo(error)
            raise
        # Every point is whole now; whatever comes after leaves it to the next run to finish.
        self._journal.step("publish")
        settle.finish(self._uri, self._journal)
        self._check_thawed(outcomes)
        return [
            Made(
                point.as_result(),
                changed=True,
                warnings=_warnings(
                    plan, self._request, point.consistency, self._why_not(plan, outcomes.get(plan.domain.uuid))
                ),
            )
            for plan, point in zip(self._plans, points)
        ]

    def _begin(self) -> None:
        self._journal = Journal.begin(
            settle.BACKUP,
            [(plan.domain.uuid, plan.domain.name) for plan in self._plans],
            {
                "repository": self._repository.path,
                "repository_uuid": self._repository.uuid,
                "secret": self._secret,
                "domains": {
                    plan.domain.uuid: {
                        "id": self._ids[plan.domain.uuid],
                        "checkpoint": self._checkpoint(plan),
                        "retire": list(plan.retire),
                        "scratch": self._push_directory(plan) if plan.live and self._scratch else None,
                    }
                    for plan in self._plans
                },
            },
        )

    def _checkpoint(self, plan: PointPlan) -> str | None:
        return self._repository.checkpoint_name(self._ids[plan.domain.uuid]) if plan.live and plan.tracked else None

    def _directory(self, plan: PointPlan) -> str:
        return self._repository.new_directory(plan.domain.uuid, self._ids[plan.domain.uuid])

    def _push_directory(self, plan: PointPlan) -> str:
        """Where QEMU writes."""
        if self._scratch is None:
            return self._directory(plan)
        return os.path.join(self._scratch, f"vmkeeper-backup-{self._ids[plan.domain.uuid]}")

    # --- targets -----------------------------------------------------------------------------------

    def _make_targets(self, plan: PointPlan) -> None:
        make_domain_directory(self._repository, plan.domain.uuid)
        directory = self._directory(plan)
        _make_passable(directory)
        if plan.live and self._scratch is not None:
            _make_passable(self._push_directory(plan))
        for disk in plan.disks:
            # The name of the parent holds in the point's directory before and after the rename.
            backing = f"../{disk.parent}/{disk.file}" if disk.parent is not None else None
            qemu_img.create_layer(
                Image(os.path.join(directory, disk.file), "qcow2", disk.passphrase),
                disk.facts.size,
                backing=backing,
                compression=disk.compression,
            )
            if plan.live and self._scratch is not None:
                qemu_img.create_layer(self._pushed(plan, disk), disk.facts.size, milliseconds=_KEY_MILLISECONDS)
            if plan.live:
                os.chown(self._pushed(plan, disk).path, *self._owner)

    def _pushed(self, plan: PointPlan, disk: DiskPlan) -> Image:
        """What QEMU writes of a disk of a running domain."""
        key = self._key if self._scratch is not None and disk.passphrase is not None else None
        return Image(os.path.join(self._push_directory(plan), disk.file), "qcow2", key)

    def _reserve(self, plan: PointPlan) -> dict[str, int]:
        reserved = {}
        for disk in plan.disks:
            size = disk.estimate + self._floor
            kept = reservation.reserve(self._pushed(plan, disk).path, size)
            reserved[disk.file] = size if kept else 0
        return reserved

    # --- the instant -------------------------------------------------------------------------------

    def _cut_all(self) -> dict[str, instant.Outcome[None]]:
        if not self._live:
            self._copy_cold()
            return {}
        floor = self._floor
        if self._secret is not None:
            libvirt_secret.define(
                self._connection,
                self._secret,
                self._key,
                "vmkeeper.libvirt: scratch images of a backup",
                ephemeral=True,
            )
        watches = [Watch(plan.domain.uuid, self._push_directory(plan), self._reserve(plan)) for plan in self._live]
        self._sentry = sentry = Sentry(self._uri, watches, floor)
        self._journal.step("watch", sentry=sentry.directory)
        sentry.post()
        for plan in self._live:
            job.forget_last(self._handles[plan.domain.uuid])
        outcomes: dict[str, instant.Outcome[None]] = instant.take(
            self._uri,
            self._members(),
            self._cut,
            deadline=self._request.deadline,
            purpose=f"backup into {self._repository.path}",
            journal=self._journal,
        )
        self._check_cuts(outcomes)
        self._journal.step("copy")
        for plan in self._live:
            self._limit(plan)
        for plan in self._live:
            self._wait(plan)
        sentry.dismiss()
        self._journal.step("copied")
        if self._scratch is not None:
            self._journal.step("store")
            for plan in self._live:
                self._store(plan)
        self._copy_cold()
        return outcomes

    def _store(self, plan: PointPlan) -> None:
        """From the scratch directory into the repository, which may take its time: the guest does not wait for it."""
        for disk in plan.disks:
            pushed = self._pushed(plan, disk)
            reservation.release(pushed.path)
            stored_as = Image(os.path.join(self._directory(plan), disk.file), "qcow2", disk.passphrase)
            doing = f"Storing disk {disk.target!r} of domain {plan.domain.name!r}"
            if disk.parent is None:
                qemu_img.copy_chain(
                    [pushed],
                    stored_as,
                    compression=disk.compression,
                    doing=doing,
                    bandwidth=self._request.bandwidth,
                )
            else:
                qemu_img.copy_layer(
                    pushed,
                    stored_as,
                    disk.facts.size,
                    backing=f"../{disk.parent}/{disk.file}",
                    compression=disk.compression,
                    doing=doing,
                    bandwidth=self._request.bandwidth,
                )

    def _members(self) -> list[instant.Member]:
        members = []
        for plan in self._live:
            handle = self._handles[plan.domain.uuid]
            now = read_domain(handle)
            if not now.state.active:
                raise VmkeeperError(
                    f"Domain {now.name!r} has stopped meanwhile", state="No point was made.", advice="Run this again"
                )
            self._check_sizes(handle, plan)
            members.append(
                instant.Member(
                    handle=handle,
                    uuid=now.uuid,
                    name=now.name,
                    state=now.state,
                    runtime_id=now.runtime_id,
                    freeze=plan.freeze and now.state.running,
                    required=self._request.quiesce == "required",
                    standing=plan.standing,
                    info=self._facts[now.uuid].agent,
                )
            )
        return members

    def _check_sizes(self, handle: Any, plan: PointPlan) -> None:
        # A target of another size fails the begin call, inside the freeze.
        for disk in plan.disks:
            with explaining(f"Reading the size of disk {disk.target!r} of domain {plan.domain.name!r}"):
                size = int(handle.blockInfo(disk.target)[0])
            if size != disk.facts.size:
                raise VmkeeperError(
                    f"Disk {disk.target!r} of domain {plan.domain.name!r} was resized just now",
                    state="No point was made.",
                    advice="Run this again",
                )

    def _cut(self, member: instant.Member) -> None:
        plan = self._by_uuid[member.uuid]
        name = self._checkpoint(plan)
        self._obey(plan)
        member.handle.backupBegin(
            backup_xml(plan, self._push_directory(plan), self._secret),
            checkpoint_xml(plan, name) if name else None,
            constant("VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL") or 0,
        )
        with contextlib.suppress(LibvirtFailed):  # tried again when the guest is on its way
            self._limit(plan)  # some milliseconds, in which the fastest disks would copy as many MiB
        self._keep_nvram(plan)  # half a megabyte, and of the same instant

    def _keep_nvram(self, plan: PointPlan) -> None:
        kept = os.path.join(self._push_directory(plan) if plan.live else self._directory(plan), "nvram.fd")
        if plan.domain.nvram is not None and not os.path.exists(kept):
            _copy_nvram(plan.domain.nvram.path, kept)

    def _check_cuts(self, outcomes: dict[str, instant.Outcome[None]]) -> None:
        for uuid, outcome in outcomes.items():
            if isinstance(outcome.error, NoSpace):
                raise outcome.error
            if outcome.error is not None:
                raise LibvirtFailed(
                    f"Beginning the backup of domain {self._by_uuid[uuid].domain.name!r} failed: {message_of(outcome.error)}",
                    state="No domain of the task has a new point; every guest runs as before.",
                    advice="See libvirt's log if the reason is not clear",
                )
        broken = [
            outcome.member.name
            for uuid, outcome in outcomes.items()
            if outcome.member.required and self._level(uuid, outcome) not in consistency.QUIESCED
        ]
        if broken:
            raise VmkeeperError(
                f"{', '.join(broken)} did not stay frozen until the backup had begun, and quiesce is required",
                state="No point was made.",
                advice="Look at what thawed it (the agent's log), or give a longer deadline",
            )

    def _level(self, uuid: str, outcome: instant.Outcome[None] | None) -> str:
        plan = self._by_uuid[uuid]
        if outcome is None:
            return consistency.level(plan.domain.state, managed_save=plan.domain.managed_save)
        return consistency.level(
            outcome.member.state, frozen_over_cut=outcome.frozen_over_cut, hook_proved=outcome.hook_proved
        )

    def _obey(self, plan: PointPlan) -> None:
        verdict = self._sentry.verdict()
        if verdict:
            raise NoSpace(
                f"The backup of domain {plan.domain.name!r} was aborted: {verdict}",
                state="No point was made, and no write of the guest failed.",
                advice="Make room there, then run this again",
                path=self._scratch or self._repository.path,
            )

    # --- the copy ----------------------------------------------------------------------------------

    def _limit(self, plan: PointPlan) -> None:
        """Slow the copy down. What the guest is about to overwrite is copied at full speed all the same: it does not wait."""
        if self._request.bandwidth:
            for disk in plan.disks:
                block_jobs.limit_running(self._handles[plan.domain.uuid], disk.target, self._request.bandwidth)

    def _wait(self, plan: PointPlan) -> None:
        directory = self._push_directory(plan)
        end = job.wait(self._uri, self._handles[plan.domain.uuid], directory, self._sentry.verdict)
        self._obey(plan)
        if not end.success:
            raise VmkeeperError(
                f"The backup of domain {plan.domain.name!r} failed: {end.message}",
                state="No point was made; older points and their checkpoints are as they were.",
                advice="See libvirt's log of the domain, then run this again",
            )
        block_jobs.resume_starved(self._handles[plan.domain.uuid], seconds=0.0)
        processes.wait_released(os.path.join(directory, disk.file) for disk in plan.disks)

    def _copy_cold(self) -> None:
        cold = [plan for plan in self._plans if not plan.live]
        if not cold:
            return
        self._journal.step("copy-stopped")
        for plan in cold:
            for disk in plan.disks:
                # No -U: while it is copied, the image's lock keeps the domain from being started under the copy.
                qemu_img.copy_chain(
                    _source(disk),
                    Image(os.path.join(self._directory(plan), disk.file), "qcow2", disk.passphrase),
                    compression=disk.compression,
                    doing=f"Copying disk {disk.target!r} of the stopped domain {plan.domain.name!r}",
                    bandwidth=self._request.bandwidth,
                )
            now = read_domain(self._handles[plan.domain.uuid])
            if now.state != plan.domain.state or now.managed_save != plan.domain.managed_save:
                raise VmkeeperError(
                    f"Domain {now.name!r} was started or saved while its disks were copied",
                    state="No point was made.",
                    advice="Run this again",
                )

    # --- what makes it a point ---------------------------------------------------------------------

    def _describe(self, plan: PointPlan, outcome: instant.Outcome[None] | None) -> Point:
        self._journal.step("describe", domain=plan.domain.name)
        uuid, directory = plan.domain.uuid, self._directory(plan)
        disks = tuple(self._describe_disk(plan, disk, directory) for disk in plan.disks)
        files = self._write_files(plan, directory)
        name = self._checkpoint(plan)
        point = Point(
            id=self._ids[uuid],
            sequence=plan.sequence,
            domain=plan.domain.name,
            domain_uuid=uuid,
            created=manifest.parse_time(_time_of(self._ids[uuid])).isoformat(timespec="seconds"),
            type=plan.type,
            reason=REASONS[plan.reason],
            parent=plan.parent,
            consistency=self._level(uuid, outcome),
            frozen_ms=outcome.frozen_ms if outcome else None,
            paused_ms=outcome.paused_ms if outcome else None,
            checkpoint=name,
            group=tuple(sorted(self._ids.values())) if len(self._ids) > 1 else (),
            disks=disks,
            description=self._request.description or "",
            tags=dict(self._request.tags or {}),
            protected=self._request.protected,
            not_captured=tuple(part.as_result() for part in plan.capture.left_out),
            nvram=plan.domain.nvram.format if plan.domain.nvram and "nvram.fd" in files else None,
            files=files,
            versions=_versions(self._connection),
            stored_bytes=sum(disk.stored_bytes for disk in disks),
            changed_bytes=sum(disk.changed_bytes for disk in disks),
        )
        for entry in os.scandir(directory):
            status = entry.stat(follow_symlinks=False)
            if (status.st_uid, status.st_gid) != (0, 0) and is_local(directory):
                os.chown(entry.path, 0, 0)  # a server may have made somebody else of root, and not let go
            os.chmod(entry.path, 0o600)
        places.write_json(os.path.join(directory, "manifest.json"), manifest.to_json(point))
        return point

    def _describe_disk(self, plan: PointPlan, disk: DiskPlan, directory: str) -> StoredDisk:
        path = os.path.join(directory, disk.file)
        reservation.release(path)
        # Where QEMU pushed elsewhere, the digests are of what it pushed: a fault of the copy does not become the truth.
        pushed = plan.live and self._scratch is not None
        top = self._pushed(plan, disk) if pushed else Image(path, "qcow2", disk.passphrase)
        layers = [top]
        if disk.parent is not None:
            history = self._facts[plan.domain.uuid].history
            parent = history.point(disk.parent)
            if parent is not None:
                lineage = history.lineage(parent, disk.target)
                layers += stored.images_of(self._repository, lineage, disk.target, disk.passphrase)
        extents = digests.extents_of(layers)
        own = [extent for extent in extents if extent.depth == 0]
        grown_from = disk.parent_size if disk.parent_size is not None and disk.parent_size < disk.facts.size else None
        with digests.content_of(layers, extents) as content:
            sums = digests.sums_of(
                content, extents, disk.facts.size, complete=disk.parent is None, grown_from=grown_from
            )
        digests.write_sums(os.path.join(directory, f"{disk.target}.sums"), sums)
        plain: Sequence[digests.Extent] = ()
        if not disk.coded:
            plain = digests.extents_of([Image(path)]) if pushed else own
        return StoredDisk(
            target=disk.target,
            type=disk.type,
            reason=REASONS[disk.reason],
            parent=disk.parent,
            virtual_size=disk.facts.size,
            stored_bytes=os.stat(path).st_blocks * 512,
            changed_bytes=sum(extent.length for extent in own if extent.data or disk.parent is not None),
            metadata=digests.metadata_digest(path, plain),
            source_format=disk.facts.layers[0].format,
            source=source_layers(disk.facts),
            compression=disk.compression,
            encryption=manifest.LUKS if disk.passphrase is not None else None,
            encrypted_source=disk.facts.disk.encrypted,
        )

    def _write_files(self, plan: PointPlan, directory: str) -> dict[str, str]:
        handle = self._handles[plan.domain.uuid]
        contents = {"domain.xml": _definition(handle, plan)}
        name = self._checkpoint(plan)
        if name:
            contents["checkpoint.xml"] = checkpoints.full_xml(handle, name)
        for file, text in contents.items():
            _write(os.path.join(directory, file), text.encode())
        self._keep_nvram(plan)
        kept = os.path.join(self._push_directory(plan), "nvram.fd")
        if plan.live and self._scratch is not None and os.path.exists(kept):
            _copy_nvram(kept, os.path.join(directory, "nvram.fd"))
        if os.path.exists(os.path.join(directory, "nvram.fd")):
            contents["nvram.fd"] = ""
        return {file: digests.file_digest(os.path.join(directory, file)) for file in sorted(contents)}

    # --- ends --------------------------------------------------------------------------------------

    def _why_not(self, plan: PointPlan, outcome: instant.Outcome[None] | None) -> str | None:
        why = (outcome.why_not_frozen if outcome else None) or plan.why_not_frozen
        if why is None and outcome is not None and (plan.freeze or plan.standing) and not outcome.frozen_over_cut:
            return "the guest did not stay frozen until the backup had begun"
        return why

    def _check_thawed(self, outcomes: dict[str, instant.Outcome[None]]) -> None:
        frozen = [outcome.member.name for outcome in outcomes.values() if not outcome.thawed]
        if frozen:
            raise VmkeeperError(
                f"The guest agent of {', '.join(frozen)} did not confirm the thaw",
                state="The restore point exists. The guard on this host goes on thawing until the agent confirms it or the domain stops.",
                advice="Look at the guest; if it hangs, restart its qemu-guest-agent",
            )

    def _explained(self, error: OSError) -> VmkeeperError:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else VmkeeperError
        return kind(
            f"Writing the restore point into {self._repository.path} failed: {error}",
            state="No point was made; older points and their checkpoints are as they were.",
            advice="See to the repository's filesystem, then run this again",
            path=self._repository.path,
        )

    def _undo(self, error: BaseException) -> None:
        """Back to how it was; what cannot be undone now stays in the journal for the next run."""
        try:
            settle.undo(self._uri, self._journal)
        except (VmkeeperError, libvirt.libvirtError, OSError) as trouble:
            if isinstance(error, VmkeeperError):
                error.state = f"Undoing it failed ({trouble}); the next run, or recover_domain, goes on with that."
                error.args = (str(error),)


def _source(disk: DiskPlan) -> list[Image]:
    """The images of a stopped domain's disk."""
    return [
        Image(layer.path, layer.format or "raw", disk.facts.passphrase if layer.encrypted else None)
        for layer in disk.facts.layers
    ]


def _make_passable(directory: str) -> None:
    """QEMU's user gets through it and cannot list it."""
    os.mkdir(directory, 0o711)
    os.chmod(directory, 0o711)


def _time_of(identifier: str) -> str:
    stamp = identifier.partition("-")[0]
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}T{stamp[9:11]}:{stamp[11:13]}:{stamp[13:15]}+00:00"


def _definition(handle: Any, plan: PointPlan) -> str:
    """The definition of the next start; where that lacks a captured disk (plugged in live), the present one."""
    if plan.domain.persistent:
        inactive = read_domain(handle, inactive=True)
        if all(inactive.disk(disk.target) is not None for disk in plan.disks):
            return definition.persistent_xml(handle)
    flags = (constant("VIR_DOMAIN_XML_SECURE") or 0) | (constant("VIR_DOMAIN_XML_MIGRATABLE") or 0)
    with explaining(f"Reading the definition of domain {plan.domain.name!r}"):
        return str(handle.XMLDesc(flags))


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _copy_nvram(source: str, destination: str) -> None:
    try:
        if os.stat(source).st_size > _NVRAM_LIMIT:
            raise InvalidInput(f"{source} is too large for UEFI variables", advice="See the domain's definition")
    except FileNotFoundError:
        return  # a domain that was never started has none yet
    shutil.copyfile(source, destination)
    descriptor = os.open(destination, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions(connection: Any) -> dict[str, str]:
    return {
        "libvirt": dotted(version_triple(connection.getLibVersion())),
        "qemu": dotted(version_triple(connection.getVersion())),
        "host": str(connection.getHostname()),
    }
