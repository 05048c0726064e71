# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make restore points: targets and sentry before, one begin call at the instant, then sums, manifest, one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid as uuids
from collections.abc import Sequence
from typing import Any

from .._errors import LibvirtFailed, NoSpace, VmkeeperError
from ..hypervisor import backup_job, block_jobs, image_node, libvirt_secret, qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import connect_again, constant, explaining, find_by_uuid, message_of
from ..hypervisor.domain_model import qemu_owner, read_domain
from ..hypervisor.image_node import Image
from ..safety import consistency, instant, processes, reservation, sentry, settlement
from ..safety.journal import Journal
from ..safety.sentry import Sentry, Watch
from . import describing, listing, manifest, preflight, settle, settlers, stillness, stored
from . import facts as reading
from .manifest import Point
from .plan import (
    DiskPlan,
    Facts,
    PointPlan,
    Request,
    backup_xml,
    checkpoint_xml,
    plan_point,
    refuse_impossible,
    young_enough,
)
from .preflight import Made
from .repository import (
    Repository,
    make_domain_directory,
    new_id,
    open_repository,
    sweep,
)


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
            stack.enter_context(settlement.hold(named, f"backup into {repository.path}"))
            settlement.settle_before_change(uri, handles, settlers.SETTLERS)
            for uuid, name in sorted(named):
                stack.enter_context(repository.locked(uuid, f"backup of {name}"))
                sweep(repository, uuid)
        else:
            settlement.settle_before_change(uri, handles, settlers.SETTLERS, check=True)
        facts = [reading.read_facts(handle, repository, repair=not check) for handle in handles]
        fresh = _recent(request, facts, repository)
        if fresh is not None:
            return fresh
        plans = [plan_point(request, one) for one in facts]
        scratch = preflight.scratch_directory(request, repository, plans, owner, check=check)
        preflight.require_opening(repository, facts, plans)
        floor = sentry.floor(scratch or repository.path)
        preflight.require_space(repository, plans, floor, scratch)
        if check:
            return [preflight.predict(plan, request) for plan in plans]
        return _Taking(connection, uri, repository, owner, list(handles), facts, plans, request, floor, scratch).run()


def _recent(request: Request, facts: Sequence[Facts], repository: Repository) -> list[Made] | None:
    """With ``min_age``, the points that are young enough, if every domain of the task has one."""
    if request.min_age is None:
        return None
    found = [young_enough(request, one, manifest.now_utc()) for one in facts]
    if any(point is None for point in found):
        return None
    points = [point for point in found if point is not None]
    proofs = [listing.recorded_proof(repository.point_directory(point.domain_uuid, point.id)) for point in points]
    return [Made({**point.as_result(), "verified": proof}, changed=False) for point, proof in zip(points, proofs)]


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
        self._ids: dict[str, str] = {}
        for plan in plans:
            taken = [*self._ids.values(), *(point.id for one in facts for point in one.history.points)]
            self._ids[plan.domain.uuid] = new_id(taken)
        self._live = [plan for plan in plans if plan.live]
        self._scratch = scratch
        # Nothing that is stored encrypted lies in the clear on its way. A random key needs no slow derivation, which would
        # hold up QEMU, and the guest with it, when it opens the target.
        self._key = image_node.random_key()
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
            points = [self._complete(plan, outcomes.get(plan.domain.uuid)) for plan in self._plans]
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
                {**point.as_result(), "verified": None},
                changed=True,
                warnings=preflight.warnings_of(
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
                qemu_img.create_layer(self._pushed(plan, disk), disk.facts.size, milliseconds=qemu_img.KEY_MILLISECONDS)
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
        # Before the cut: what is written after it would not be of the instant, what is written before costs one more run.
        self._marks = {plan.domain.uuid: stillness.marks_of(files_read(plan)) for plan in self._plans if not plan.live}
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
        self._sentry = Sentry(self._uri, watches, floor)
        # Before it writes anything: a directory that no journal names would stay for ever.
        self._journal.step("watch", sentry=self._sentry.directory)
        self._sentry.post()
        for plan in self._live:
            backup_job.forget_last(self._handles[plan.domain.uuid])
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
        self._sentry.dismiss()
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
                history = self._facts[plan.domain.uuid].history
                qemu_img.copy_layer(
                    pushed,
                    stored_as,
                    disk.facts.size,
                    backing=f"../{disk.parent}/{disk.file}",
                    below=stored.images_below(self._repository, history, disk.parent, disk.target, disk.passphrase),
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
            self._limit(plan)  # libvirt takes a tenth of a second to return, in which a fast disk copies a hundred MiB
        self._keep_nvram(plan)  # half a megabyte, and of the same instant

    def _keep_nvram(self, plan: PointPlan) -> None:
        kept = os.path.join(self._push_directory(plan) if plan.live else self._directory(plan), "nvram.fd")
        if plan.domain.nvram is not None and not os.path.exists(kept):
            describing.copy_nvram(plan.domain.nvram.path, kept)

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
        """Slow the copy down, the largest disk first. What the guest is about to overwrite is copied at full speed all the same."""
        if self._request.bandwidth:
            for disk in sorted(plan.disks, key=lambda disk: -disk.estimate):
                block_jobs.limit_running(self._handles[plan.domain.uuid], disk.target, self._request.bandwidth)

    def _look_up_again(self, plan: PointPlan) -> None:
        """The domain over a connection that lives: a restart of libvirtd during a long copy ends the connection, and not the backup."""
        self._connection = connect_again(self._uri)
        handle = find_by_uuid(self._connection, plan.domain.uuid)
        if handle is None:
            raise VmkeeperError(
                f"Domain {plan.domain.name!r} has gone while it was backed up",
                state="No point was made; older points are as they were.",
                advice="Define it, or start it, then run this again",
            )
        self._handles[plan.domain.uuid] = handle

    def _wait(self, plan: PointPlan) -> None:
        directory = self._push_directory(plan)
        end = backup_job.wait(self._uri, self._handles[plan.domain.uuid], directory, self._sentry.verdict)
        self._obey(plan)
        if not end.success:
            raise VmkeeperError(
                f"The backup of domain {plan.domain.name!r} failed: {end.message}",
                state="No point was made; older points and their checkpoints are as they were.",
                advice="See libvirt's log of the domain, then run this again",
            )
        self._look_up_again(plan)
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
            self._keep_nvram(plan)
            self._look_up_again(plan)
            self._require_still(plan)

    def _require_still(self, plan: PointPlan) -> None:
        now = read_domain(self._handles[plan.domain.uuid])
        written = stillness.written_since(self._marks[plan.domain.uuid])
        before = plan.domain.state
        # Why a domain is off, libvirtd forgets when it is restarted.
        same = now.state.name == before.name and now.state.reason in (before.reason, "unknown")
        if written or not same or now.managed_save != plan.domain.managed_save:
            what = f"{', '.join(written)} of domain {now.name!r} was written to, as by a guest that somebody has started and stopped,"
            raise VmkeeperError(
                (what if written else f"Domain {now.name!r} was started or saved") + " while the backup copied",
                state="No point was made.",
                advice="Run this again",
            )

    def _complete(self, plan: PointPlan, outcome: instant.Outcome[None] | None) -> Point:
        """Everything of the point, in its directory that has not its name yet."""
        self._journal.step("describe", domain=plan.domain.name)
        uuid = plan.domain.uuid
        self._keep_nvram(plan)
        self._look_up_again(plan)
        written = describing.Written(
            plan=plan,
            id=self._ids[uuid],
            directory=self._directory(plan),
            # Where QEMU pushed elsewhere, the digests are of what it pushed: a fault of the copy does not become the truth.
            pushed=self._push_directory(plan) if plan.live and self._scratch is not None else None,
            pushed_images={disk.target: self._pushed(plan, disk) for disk in plan.disks},
            history=self._facts[uuid].history,
            level=self._level(uuid, outcome),
            frozen_ms=outcome.frozen_ms if outcome else None,
            paused_ms=outcome.paused_ms if outcome else None,
            checkpoint=self._checkpoint(plan),
            group=tuple(sorted(self._ids.values())) if len(self._ids) > 1 else (),
        )
        return describing.complete(self._connection, self._handles[uuid], self._repository, written, self._request)

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
                error.now(f"Undoing it failed ({trouble}); the next run, or recover_domain, goes on with that.")


def _source(disk: DiskPlan) -> list[Image]:
    """The images of a stopped domain's disk."""
    return [
        Image(layer.path, layer.format or "raw", disk.facts.passphrase if layer.encrypted else None)
        for layer in disk.facts.layers
    ]


def files_read(plan: PointPlan) -> list[str]:
    """What a stopped domain's point is read from."""
    layers = [layer for disk in plan.disks for layer in disk.facts.layers]
    files = [path for layer in layers for path in (layer.path, layer.data_file) if path is not None]
    return [*files, *([plan.domain.nvram.path] if plan.domain.nvram is not None else [])]


def _make_passable(directory: str) -> None:
    """QEMU's user gets through it and cannot list it."""
    os.mkdir(directory, 0o711)
    os.chmod(directory, 0o711)
