# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Take one snapshot of one or several domains at one instant: the effects of a :class:`~.plan.TakePlan`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .._errors import Conflict, InvalidInput, LibvirtFailed, Refused, VmkeeperError
from ..hypervisor import power, qemu_img
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import answering, constant, explaining, message_of, open_connection, wait_for_daemon
from ..hypervisor.domain_model import qemu_owner, read_domain, read_state
from ..hypervisor.image_header import read_qcow2
from ..safety import consistency, instant, places, settlement, space
from ..safety.checkpoints_aside import set_aside
from ..safety.journal import Journal
from . import facts as reading
from . import nvram, settle
from .model import by_name, read_snapshots, write_labels
from .plan import (
    Existing,
    Facts,
    OverlayPlan,
    Request,
    TakePlan,
    check_group,
    compare_existing,
    plan_take,
    snapshot_xml,
)
from .settlers import SETTLERS


@dataclass
class Taken:
    """The result for one domain."""

    domain: str
    snapshot: dict[str, Any]
    changed: bool
    before: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


def take(connection: Any, uri: str, handles: Sequence[Any], request: Request, *, check: bool = False) -> list[Taken]:
    """``state: present``: see that every domain has the snapshot. Nothing is changed with ``check``."""
    named = [(handle.UUIDString(), handle.name()) for handle in handles]
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(settlement.hold(named, f"snapshot {request.name!r}"))
        settlement.settle_before_change(uri, handles, SETTLERS, check=check)
        facts = [reading.read_facts(handle) for handle in handles]
        if check:
            facts = [_without_doomed(connection, one) for one in facts]
        existing = [compare_existing(request, one) for one in facts]
        check_group([(one.domain.name, found) for one, found in zip(facts, existing)], request.name)
        if existing[0] is not None:
            return [
                _keep(handle, one, found, check=check) for handle, one, found in zip(handles, facts, existing) if found
            ]
        plans = [plan_take(request, one) for one in facts]
        _check_group_plan(plans)
        _check_reachable(connection, request)
        space.require([need for plan in plans for need in plan.needs()], f"Taking snapshot {request.name!r}")
        if check:
            return [_predict(plan, one) for plan, one in zip(plans, facts)]
        return _Taking(connection, uri, list(handles), facts, plans, request).run()


def _without_doomed(connection: Any, facts: Facts) -> Facts:
    """Check mode settles nothing, so it must not see what the real run would take back first."""
    name = settle.doomed(connection, facts.domain.uuid)
    return replace(facts, snapshots=tuple(snapshot for snapshot in facts.snapshots if snapshot.name != name))


def _check_group_plan(plans: Sequence[TakePlan]) -> None:
    if len(plans) < 2:
        return
    for plan in plans:
        if plan.memory:
            raise Refused(
                "A group snapshot cannot hold memory",
                advice="Leave out memory, or take the domains one by one",
            )
        if plan.mode == "internal":
            raise Refused(
                "Internal snapshots cannot be cut at one instant for several domains",
                advice="Use mode: external",
            )


def _check_reachable(connection: Any, request: Request) -> None:
    """An overlay that QEMU cannot reach would fail inside the window, or, of a domain that is off, at its next start."""
    owner = qemu_owner(connection.getCapabilities())
    if request.directory and os.geteuid() == 0 and not places.reachable_by(request.directory, owner):
        raise InvalidInput(
            f"QEMU, which runs as user {owner[0]} here, cannot reach the directory {request.directory}",
            advice="Give it and what is above it the permission to be entered (chmod o+x), or choose another",
        )


def _keep(handle: Any, facts: Facts, found: Existing, *, check: bool) -> Taken:
    """The snapshot is there; at most its labels change."""
    before = found.snapshot.as_result(facts.domain.name)
    if found.relabel is None:
        return Taken(facts.domain.name, before, changed=False, before=before)
    if not check:
        write_labels(handle, found.snapshot.name, found.relabel, description=found.description)
    after = {
        **before,
        "tags": dict(found.relabel.tags),
        "protected": found.relabel.protected,
        "description": before["description"] if found.description is None else found.description,
    }
    return Taken(facts.domain.name, after, changed=True, before=before)


def _predict(plan: TakePlan, facts: Facts) -> Taken:
    current = next((snapshot.name for snapshot in facts.snapshots if snapshot.current), None)
    overlays = {overlay.target: overlay for overlay in plan.overlays}
    result = {
        "name": plan.name,
        "domain": plan.domain.name,
        "mode": plan.mode,
        "mode_reason": plan.mode_reason,
        "consistency": plan.expected_level,
        "frozen_ms": None,
        "paused_ms": None,
        "created": None,
        "description": plan.description,
        "tags": dict(plan.tags),
        "protected": plan.protected,
        "disks": [
            {
                "target": disk.target,
                "mode": plan.mode,
                "base": disk.path,
                "base_format": disk.format,
                "overlay": overlays[disk.target].path if disk.target in overlays else None,
            }
            for disk in plan.capture.disks
        ],
        "memory": plan.memory_file or (True if plan.memory else None),
        "nvram": plan.nvram.path if plan.nvram else None,
        "not_captured": [part.as_result() for part in plan.capture.left_out],
        "parent": current,
        "current": True,
    }
    return Taken(
        plan.domain.name,
        result,
        changed=True,
        warnings=_warnings(plan, plan.expected_level, plan.why_not_frozen),
    )


def _warnings(plan: TakePlan, level: str, why_not_frozen: str | None) -> list[str]:
    warnings = []
    left_out = plan.capture.warning(plan.domain.name)
    if left_out:
        warnings.append(left_out)
    if level == "crash":
        reason = why_not_frozen or (
            f"it was {plan.domain.state.name} ({plan.domain.state.reason})"
            if not plan.domain.state.running
            else "it was not frozen"
        )
        warnings.append(f"{plan.domain.name}: the snapshot is only crash-consistent: {reason}")
    if not plan.domain.persistent:
        warnings.append(f"{plan.domain.name} is transient: its snapshots are forgotten when it stops")
    return warnings


class _Taking:
    """One run, from the journal's first step to its last."""

    def __init__(
        self,
        connection: Any,
        uri: str,
        handles: list[Any],
        facts: list[Facts],
        plans: list[TakePlan],
        request: Request,
    ) -> None:
        self._connection = connection
        self._uri = uri
        self._handles = handles
        self._facts = facts
        self._plans = plans
        self._request = request
        self._by_uuid = {plan.domain.uuid: plan for plan in plans}

    def run(self) -> list[Taken]:
        domains = [(plan.domain.uuid, plan.domain.name) for plan in self._plans]
        self._journal = Journal.begin(settle.OPERATION, domains, settle.intention(self._plans, self._request.quiesce))
        try:
            owner = qemu_owner(self._connection.getCapabilities())
            self._journal.step("overlays")
            for plan in self._plans:
                for overlay in plan.overlays:
                    self._make_overlay(overlay, owner)
            self._shut_down()
            for handle, plan in zip(self._handles, self._plans):
                if not read_state(handle).active:
                    _go_on_recording(plan)
            outcomes = instant.take(
                self._uri,
                self._members(),
                self._cut,
                deadline=self._request.deadline,
                purpose=f"snapshot {self._request.name!r}",
                journal=self._journal,
            )
            levels = self._judge(outcomes)
        except BaseException as error:
            self._undo(error)
            raise
        # From here on the snapshot is good: what fails now leaves it, and the journal, for the next run to finish.
        try:
            self._journal.step("label", levels=levels)
            for handle, plan in zip(self._handles, self._plans):
                self._label(handle, plan, outcomes[plan.domain.uuid], levels[plan.domain.uuid])
        finally:
            self._start_again()
        self._journal.finish()
        self._check_thawed(outcomes)
        return [
            self._taken(handle, plan, outcomes[plan.domain.uuid]) for handle, plan in zip(self._handles, self._plans)
        ]

    def _make_overlay(self, overlay: OverlayPlan, owner: tuple[int, int]) -> None:
        try:
            qemu_img.create_overlay(
                overlay.path, backing=overlay.base, backing_format=overlay.base_format, size=overlay.size, owner=owner
            )
        except FileExistsError as error:
            self._journal.step("not-ours", path=overlay.path)
            raise Conflict(f"{overlay.path} was made by somebody else meanwhile", advice="Run this again") from error

    def _shut_down(self) -> None:
        going = [(handle, plan) for handle, plan in zip(self._handles, self._plans) if plan.shutdown]
        if not going:
            return
        self._journal.step("shutdown")
        state = "No snapshot was taken; what had shut down is started again. A guest that is late may still go down."
        still = power.shut_down([handle for handle, _plan in going], state=state)
        if still:
            raise VmkeeperError(
                f"{', '.join(still)} did not shut down within {power.SHUTDOWN_SECONDS:.0f} s",
                state=state,
                advice="See that the guest reacts to the ACPI power button or has its agent running",
            )
        self._journal.step("shut-off")

    def _members(self) -> list[instant.Member]:
        members = []
        for handle, plan, facts in zip(self._handles, self._plans, self._facts):
            # Looked at again under the lock, just before the cut: a saved RAM image would resume on the base under its overlay.
            now = read_domain(handle)
            if now.managed_save:
                raise Refused(
                    f"Domain {now.name!r} was saved meanwhile",
                    advice="Start it, or drop the saved state, then run this again",
                )
            if now.state.active != (plan.domain.state.active and not plan.shutdown):
                raise Refused(
                    f"Domain {now.name!r} was {'started' if now.state.active else 'stopped'} meanwhile",
                    advice="Run this again",
                )
            if plan.freeze and not now.state.running and self._request.quiesce == "required":
                raise Refused(
                    f"Domain {now.name!r} is {now.state.name} now and cannot be frozen, and quiesce is required",
                    advice="Resume it, then run this again",
                )
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
                    info=facts.agent,
                )
            )
        return members

    def _cut(self, member: instant.Member) -> str:
        plan = self._by_uuid[member.uuid]
        _refuse_changed(member)
        names = ["VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC"]
        if plan.mode == "external":
            names.append("VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT")
            if not plan.memory:
                names.append("VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY")
            elif member.state.running:
                names.append("VIR_DOMAIN_SNAPSHOT_CREATE_LIVE")
        else:
            names = []
        if plan.nvram is not None:
            nvram.keep(plan.nvram.source, plan.nvram.path)  # before: a snapshot that exists has its copy
        with set_aside(member.handle):
            member.handle.snapshotCreateXML(snapshot_xml(plan), sum(constant(name) or 0 for name in names))
        _refuse_changed(member)  # what was started or saved meanwhile was not cut as planned
        return plan.name

    def _judge(self, outcomes: dict[str, instant.Outcome[str]]) -> dict[str, str]:
        """The level of each domain's snapshot by UUID; raises when any is not what was asked for."""
        failed = [outcome for outcome in outcomes.values() if outcome.error is not None]
        if failed:
            error = failed[0].error
            raise VmkeeperError(
                f"Taking snapshot {self._request.name!r} of domain {failed[0].member.name!r} failed: {message_of(error) if error else ''}",
                state="No domain of the task has the snapshot; every guest runs as before."
                if len(outcomes) > 1
                else "It has no snapshot of that name; the guest is as it was before.",
                advice="See libvirt's log if the reason is not clear",
            )
        levels = {
            uuid: consistency.level(
                outcome.member.state,
                frozen_over_cut=outcome.frozen_over_cut,
                hook_proved=outcome.hook_proved,
                with_memory=self._by_uuid[uuid].memory,
            )
            for uuid, outcome in outcomes.items()
        }
        broken = [
            outcome.member.name
            for uuid, outcome in outcomes.items()
            if outcome.member.required
            and (outcome.member.freeze or outcome.member.standing)
            and levels[uuid] not in consistency.QUIESCED
        ]
        if broken:
            raise VmkeeperError(
                f"{', '.join(broken)} did not stay frozen until the snapshot was cut, and quiesce is required",
                state="The snapshot was taken back.",
                advice="Look at what thawed it (the agent's log), or give a longer deadline",
            )
        unclean = [plan.domain.name for plan in self._plans if plan.shutdown and levels[plan.domain.uuid] != "offline"]
        if unclean:
            raise VmkeeperError(
                f"{', '.join(unclean)} stopped without a clean shutdown",
                state="The snapshot was taken back, and what crashed was started again; what somebody destroyed is off.",
                advice="Look at the guest's own log; quiesce: auto takes a snapshot without stopping it",
            )
        return levels

    def _label(self, handle: Any, plan: TakePlan, outcome: instant.Outcome[str], level: str) -> None:
        if plan.nvram is not None:
            places.fsync_file(plan.nvram.path)
        paused_ms = outcome.paused_ms
        if plan.memory and plan.mode == "internal":
            paused_ms = outcome.cut_ms  # QEMU holds the guest for as long as it writes the memory
        write_labels(
            handle,
            plan.name,
            plan.labels(level, outcome.frozen_ms, paused_ms),
            state="The snapshot exists, without its labels; run this again.",
        )
        _make_private(plan)

    def _taken(self, handle: Any, plan: TakePlan, outcome: instant.Outcome[str]) -> Taken:
        snapshot = by_name(read_snapshots(handle), plan.name)
        if snapshot is None:
            raise LibvirtFailed(
                f"The snapshot {plan.name!r} of domain {plan.domain.name!r} has gone",
                state="Somebody removed it.",
            )
        why = outcome.why_not_frozen or plan.why_not_frozen
        if (plan.freeze or plan.standing) and outcome.why_not_frozen is None and not outcome.frozen_over_cut:
            why = "the guest did not stay frozen until the cut was done"
        return Taken(
            plan.domain.name,
            snapshot.as_result(plan.domain.name),
            changed=True,
            warnings=_warnings(plan, snapshot.consistency, why),
        )

    def _check_thawed(self, outcomes: dict[str, instant.Outcome[str]]) -> None:
        frozen = [outcome.member.name for outcome in outcomes.values() if not outcome.thawed or not outcome.resumed]
        if frozen:
            raise VmkeeperError(
                f"It is not confirmed that {', '.join(frozen)} is thawed and running",
                state="The snapshot exists. The guard on this host goes on thawing until the agent confirms it or the domain stops.",
                advice="Look at the guest; if it hangs, restart its qemu-guest-agent",
            )

    def _start_again(self) -> None:
        if not any(plan.shutdown for plan in self._plans):
            return
        try:
            self._handles = [answering(handle, self._uri) for handle in self._handles]
        except VmkeeperError as error:
            error.now("The snapshot exists; what was shut down for it may be off.")
            error.advice = "Once libvirt answers, run this again, or recover_domain, which starts it"
            raise
        with contextlib.ExitStack() as stack:  # each of them, whatever becomes of the others
            for handle, plan in zip(self._handles, self._plans):
                if plan.shutdown:
                    stack.callback(self._start_one, handle, plan)

    def _start_one(self, handle: Any, plan: TakePlan) -> None:
        with explaining(
            f"Starting domain {plan.domain.name!r} again",
            state="The snapshot exists, and the domain is shut off.",
            advice="Start it, then see libvirt's log",
        ):
            if not handle.isActive():
                self._journal.note("start")
                handle.create()

    def _undo(self, error: BaseException) -> None:
        """Back to how it was; what cannot be undone now stays in the journal for the next run."""
        operation = self._journal.operation
        try:
            self._journal.step("undo")  # from here on the next run takes it back, too, whatever becomes of this one
            if operation.reached("shutdown"):
                wait_for_daemon(self._uri)  # a guest that is off for it must not stay so because libvirtd is restarted
            kept = settle.undo(self._uri, self._journal)
        except (VmkeeperError, libvirt.libvirtError, OSError) as trouble:
            state = f"Undoing it failed ({trouble}); the next run, or recover_domain, goes on with that."
            # Whatever is left to undo, every chain is whole, and can be undone below a guest that runs.
            try:
                settle.start_again(open_connection(self._uri), operation)
            except (VmkeeperError, libvirt.libvirtError):
                if operation.reached("shutdown"):
                    state = f"What was shut down for it may be off. {state}"
            if isinstance(error, VmkeeperError):
                error.now(state)
        else:
            if kept and isinstance(error, VmkeeperError):
                error.now(
                    f"The snapshot stays on {', '.join(kept)}, as a crash-consistent one: nothing may be written below its"
                    " overlays while the guest runs. Every guest runs."
                )


def _refuse_changed(member: instant.Member) -> None:
    """Looked at just before the cut: a saved RAM image would resume on the base under its overlay."""
    handle = member.handle
    same_run = bool(handle.isActive()) == member.state.active and member.runtime_id in (None, handle.ID())
    if not same_run or (not member.state.active and handle.isPersistent() and handle.hasManagedSaveImage()):
        raise Refused(
            f"Domain {member.name!r} was started, stopped or saved meanwhile", state="", advice="Run this again"
        )


def _go_on_recording(plan: TakePlan) -> None:
    """Give the overlays of a domain that is off the bitmaps that record in its images: live, libvirt does that.

    libvirt believes a chain of bitmaps only if every layer has it, recording.
    """
    for overlay in plan.overlays:
        if overlay.base_format != "qcow2":
            continue
        for bitmap in read_qcow2(overlay.base).bitmaps:
            if bitmap.name in plan.domain.checkpoints and bitmap.enabled and not bitmap.in_use:
                qemu_img.run(
                    ["bitmap", "--add", "-f", "qcow2", overlay.path, bitmap.name],
                    doing=f"Adding the dirty bitmap {bitmap.name} to {overlay.path}",
                )


def _make_private(plan: TakePlan) -> None:
    """A memory file is written by libvirtd with its own umask; it holds the guest's RAM."""
    if plan.memory_file:
        with contextlib.suppress(OSError):
            os.chmod(plan.memory_file, 0o600)
