# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring one or several domains to the size that was asked: facts, change set, steps, result."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .._errors import UNCHANGED, AgentSilent, LibvirtFailed, VmkeeperError
from ..hypervisor import appliance, checkpoints
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import explaining, wait_for_daemon
from ..hypervisor.definition import define
from ..hypervisor.domain_model import DomainState, parse_domain
from ..safety import settlement
from ..safety.journal import Journal
from ..safety.space import human
from ..safety.turns import in_turn
from . import disks, guest_filesystem, memory, shrinking, vcpus
from .change import (
    LIVE,
    NEXT_BOOT,
    NONE,
    OFFLINE,
    RESTART,
    Change,
    ChangeSet,
    DiskGrowth,
    DiskShrink,
    FilesystemGrowth,
    MemoryAction,
    VcpuAction,
)
from .change_set import compute
from .definition import configured_memory
from .facts import Facts, read_facts
from .memory_plan import live_memory
from .outcome import GUEST_SECONDS, Outcome, wait_for
from .preconditions import check_host, check_restart
from .request import Request
from .restart import RolledBack, restart
from .settle import OPERATION, SETTLERS, settle

#: Buses whose controllers do not tell a guest that a disk has grown, and how long one looks all the same.
_SILENT_BUSES = ("sata", "ide", "usb")
_SILENT_SECONDS = 3.0

#: What is known of a domain whose restart ended anywhere, and the way out.
_HALF = "What was begun is as far as it had got."
_IN_BETWEEN = "It may be off, and have either definition."
_GO_ON = "Run this again, or recover_domain, which finishes the restart or takes it back"

#: How long a balloon may take to reach its size after a boot.
_BOOT_SECONDS = 20.0


@dataclass
class Resized:
    """The result for one domain."""

    domain: str
    changed: bool
    result: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def resize(
    connection: Any, uri: str, handles: Sequence[Any], request: Request, *, check: bool = False
) -> list[Resized]:
    """Bring the domains to the asked size, one after the other; nothing is changed with ``check``.

    All are planned before the first is changed.  A failure has the results of those before it as ``facts['resized']``.
    """
    named = [(handle.UUIDString(), handle.name()) for handle in handles]
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(settlement.hold(named, "resize"))
        findings = settlement.settle_before_change(uri, handles, SETTLERS, check=check)
        planned = [_plan(handle, request) for handle in handles]
        check_host(request, [(facts, change_set.changes) for facts, change_set in planned])
        for handle, (facts, change_set) in zip(handles, planned):
            _check_shrinks(handle, facts, change_set)
        if check:
            results = [
                _Run(connection, uri, handle, request, *plan).predict() for handle, plan in zip(handles, planned)
            ]
        else:
            results = in_turn(
                handles,
                planned,
                lambda handle, plan: _Run(connection, uri, handle, request, *plan).carry_out(),
                read=lambda handle: _plan_anew(handle, request),
                tell=lambda done: {"resized": [one.result for one in done]},
            )
        for finding in findings:
            for one in results:
                if one.domain == finding["domain"]:
                    one.warnings.append(f"{one.domain}: {finding['what']} was {finding['action']}")
        return results


def _plan(handle: Any, request: Request) -> tuple[Facts, ChangeSet]:
    facts = _facts(handle, request)
    change_set = compute(request, facts)
    if change_set.shrinks:
        appliance.require("Making a disk smaller")
    return facts, change_set


def _plan_anew(handle: Any, request: Request) -> tuple[Facts, ChangeSet]:
    """The plan of a domain that waited for others, by what is true now; what was checked of it then is checked again."""
    facts, change_set = _plan(handle, request)
    _check_shrinks(handle, facts, change_set)
    return facts, change_set


def _check_shrinks(handle: Any, facts: Facts, change_set: ChangeSet) -> None:
    """Refuse now what does not fit: libguestfs tells it of a domain that is off, the guest of its own. Both are asked again then."""
    for shrink in change_set.shrinks:
        doing = _shrinking(facts.name, shrink.target)
        if facts.live is None:
            shrinking.check_fits(shrink.path, shrink.format, shrink.size, doing=doing)
        for mounted in facts.filesystems:
            if mounted.target == shrink.target and (least := guest_filesystem.least_size(handle, mounted)) is not None:
                shrinking.check_room(least, mounted.room(shrink.size), mounted.start, doing=doing)


def _shrinking(domain: str, target: str) -> str:
    return f"Making disk {target!r} of domain {domain!r} smaller"


def _facts(handle: Any, request: Request) -> Facts:
    return read_facts(
        handle,
        [disk.target for disk in request.disks],
        grow=[disk.target for disk in request.disks if disk.grow_filesystem],
        readers=request.allow_shrink,
    )


def sizes(facts: Facts) -> dict[str, Any]:
    """Configured and live sizes, for a diff; of what changes the result adds the reasons."""
    conf, live = facts.configured, facts.live
    return {
        "vcpus": {
            "configured": conf.vcpus_current,
            "live": live.vcpus_current if live else None,
            "maximum": conf.vcpus_max,
        },
        "memory": {
            "configured": configured_memory(conf),
            "live": live_memory(facts),
            "maximum": conf.memory_limit,
        },
        "disks": {target: disk.size for target, disk in sorted(facts.disks.items())},
        "filesystems": {one.mountpoint: one.size for one in facts.filesystems},
    }


class _Run:
    """One domain, from its change set to its result."""

    def __init__(
        self, connection: Any, uri: str, handle: Any, request: Request, facts: Facts, change_set: ChangeSet
    ) -> None:
        self._connection = connection
        self._uri = uri
        self._handle = handle
        self._request = request
        self._facts = facts
        self._set = change_set
        self._outcomes: dict[str, Outcome] = {}
        self._applied: dict[str, str] = {}
        self._downtime: int | None = None
        self._altered = False
        self._refused: VmkeeperError | None = None
        self._ended: list[str] = []

    # --- check mode ---

    def predict(self) -> Resized:
        before = sizes(self._facts)
        after = {key: dict(value) for key, value in before.items()}
        for change in self._set.due:
            _foresee(after, change)
        if self._set.definition is not None:
            _foresee_definition(after, self._set.definition)
        return self._resized(before, after, changed=bool(self._set.due), restarted=self._set.restart)

    # --- for real ---

    def carry_out(self) -> Resized:
        before = sizes(self._facts)
        old_xml, new_xml = self._facts.definition, self._set.definition
        redefine = new_xml is not None and new_xml != old_xml
        if not self._set.due:
            return self._resized(before, before, changed=False)
        self._journal = Journal.begin(
            OPERATION, [(self._facts.configured.uuid, self._facts.name)], self._intention(old_xml, new_xml)
        )
        try:
            with explaining(f"Changing the size of domain {self._facts.name!r}", state=_HALF, advice="Run this again"):
                self._live_changes()
                if self._set.restart and new_xml is not None:
                    self._restart(new_xml)
                elif redefine and new_xml is not None:
                    self._journal.step("definition")
                    self._altered = True
                    define(
                        self._connection,
                        new_xml,
                        doing=f"Storing the new size in the definition of domain {self._facts.name!r}",
                        state="The guest has its new size; the next start would have the old one.",
                    )
        except BaseException as error:
            self._give_up(error)
            self._tell_done(error)
            self._tell_ended(error)
            raise
        self._journal.finish()
        if self._refused is not None:
            self._tell_ended(self._refused)
            raise self._refused
        try:
            with explaining(f"Reading domain {self._facts.name!r} after it was changed"):
                after = sizes(_facts(self._handle, self._request))
        except VmkeeperError as error:
            error.now("All of it was changed as planned.")
            self._tell_ended(error)
            raise
        return self._resized(before, after, changed=self._altered, restarted=self._set.restart)

    def _intention(self, old_xml: str | None, new_xml: str | None) -> dict[str, Any]:
        return {
            "changes": [
                {"what": one.what, "before": one.before, "after": one.after, "how": one.how} for one in self._set.due
            ],
            "old_xml": old_xml,
            "new_xml": new_xml,
            "rollback": self._request.rollback,
            "judge": self._facts.agent is not None
            or self._request.health_command is not None
            or bool(self._set.shrinks),
            "was_running": self._facts.live is not None,
            "shrinks": [self._shrink(one) for one in self._set.shrinks],
            "health_command": list(self._request.health_command) if self._request.health_command else None,
            "health_timeout": self._request.health_timeout,
            "shutdown_timeout": self._request.shutdown_timeout,
        }

    def _shrink(self, shrink: DiskShrink) -> dict[str, Any]:
        """What the journal says of a disk that gets smaller; the names are new ones beside its image."""
        stem = f"{shrink.path}.vmk-{secrets.token_hex(4)}"
        return {
            "target": shrink.target,
            "path": shrink.path,
            "format": shrink.format,
            "size": shrink.size,
            "doing": _shrinking(self._facts.name, shrink.target),
            "work": f"{stem}.work",
            "copy": f"{stem}.smaller",
            "kept": f"{stem}.original",
        }

    def _give_up(self, error: BaseException) -> None:
        """A failure leaves the journal only while something is still to be settled: the guest may be shutting down.

        Then it was settled over another connection where libvirt went away, or the next run does that.
        """
        operation = self._journal.operation
        alive = self._connection.isAlive()
        # libvirt has refused a definition only where it said so; it may have stored one when it went away, or a signal came.
        refused = alive and isinstance(error, VmkeeperError)
        begun = operation.reached("shutdown") or (operation.reached("define") and not refused)
        accepted = operation.reached("start") and not self._request.rollback and isinstance(error, VmkeeperError)
        if not begun or isinstance(error, RolledBack) or (alive and accepted):
            self._journal.finish()

    def _live_changes(self) -> None:
        for change in self._set.due:
            if change.how not in (LIVE, OFFLINE) or change.action is None:
                continue
            self._end_checkpoints(change)
            self._journal.step(change.what)
            outcome = self._apply(change)
            self._applied[change.what] = change.how if outcome.taken or outcome.altered else NONE
            self._note(change, outcome)
            if not outcome.taken:
                self._not_taken(change, outcome)

    def _end_checkpoints(self, change: Change) -> None:
        if change.ends_checkpoints:
            self._journal.step(f"checkpoints {change.what}")
            self._altered = True
            checkpoints.end(
                self._handle,
                change.ends_checkpoints,
                state="The disk has its old size; the next backup may have to be a full one.",
            )
            self._ended += change.ends_checkpoints

    def _tell_done(self, error: BaseException) -> None:
        """What a failed task has changed already, and no way back undoes: disks stay as large as they are."""
        done = [what for what, how in self._applied.items() if how in (LIVE, OFFLINE) and self._stays(what)]
        if isinstance(error, VmkeeperError) and self._downtime is not None and error.state in (UNCHANGED, _HALF):
            error.now("It was restarted with its new size.")
        elif done and isinstance(error, VmkeeperError):
            state = "" if error.state == UNCHANGED else f"{error.state} "
            error.now(f"{state}What was changed before stays: {', '.join(done)}.")

    def _stays(self, what: str) -> bool:
        return what.startswith(("disk ", "filesystem ")) or not self._journal.operation.reached("shutdown")

    def _tell_ended(self, error: BaseException) -> None:
        """A failed task shows no warnings."""
        if self._ended and isinstance(error, VmkeeperError):
            error.now(
                f"{error.state} Checkpoints {', '.join(self._ended)} have ended, so the next backup is a full one."
            )

    def _note(self, change: Change, outcome: Outcome) -> None:
        self._outcomes[change.what] = outcome
        self._altered = self._altered or outcome.altered

    def _apply(self, change: Change) -> Outcome:
        info = self._facts.agent
        action = change.action
        if isinstance(action, VcpuAction):
            return vcpus.apply(self._handle, action, info)
        if isinstance(action, MemoryAction):
            return memory.apply(self._handle, action, info, change.after or 0)
        if isinstance(action, DiskGrowth):
            if change.how == OFFLINE:
                disks.grow_offline(self._handle, action)
                return Outcome(None, note="the domain is shut off")
            disks.grow_live(self._handle, action)
            return self._disk_seen(action)
        if isinstance(action, FilesystemGrowth):
            return guest_filesystem.take_room(self._handle, action.filesystem, action.disk_size)
        raise TypeError(f"no way to apply {action!r}")

    def _disk_seen(self, action: DiskGrowth) -> Outcome:
        """The disk's size by the guest, where something mounted lies on it and the agent may look."""
        known = next((one for one in self._facts.filesystems if one.target == action.target and one.disk_device), None)
        if known is None:
            why = self._facts.filesystems_problem or "the guest has mounted nothing that lies on it"
            return Outcome(None, note=f"what the guest sees is not known: {why}")
        silent = self._facts.disks[action.target].disk.bus in _SILENT_BUSES
        patience = _SILENT_SECONDS if silent else GUEST_SECONDS
        seen = guest_filesystem.wait_for_disk(self._handle, known, action.size, patience)
        return Outcome(
            seen, seen == action.size, "" if seen == action.size else "the guest has not noticed the new size"
        )

    def _not_taken(self, change: Change, outcome: Outcome) -> None:
        if self._request.apply == "live":
            of_disk = change.what.startswith(("disk ", "filesystem "))
            refused = VmkeeperError(
                f"Domain {self._facts.name!r} did not take {change.what} {change.after} live: {outcome.note}",
                state="It runs; the other changes were made." if of_disk else "It runs; its definition is as it was.",
                advice="Use apply: auto" + ("" if of_disk else ", with allow_restart to have it at once"),
                guest_sees=outcome.guest_sees,
            )
            if not of_disk:
                raise refused
            self._refused = self._refused or refused  # the definition is stored first: it is not concerned
            return
        if change.what.startswith("filesystem "):
            return  # no start grows it; a disk that was not noticed takes its filesystem along (_restart)
        if not change.restart_helps:
            return
        note = outcome.note
        if self._request.allow_restart and self._facts.configured.persistent:
            try:
                check_restart(self._request, self._facts)
                # The plan was live, the guest thought otherwise: the second best way.
                self._replace(change, replace(change, how=RESTART, why=f"the guest did not take it live: {note}"))
                return
            except AgentSilent as blind:
                note = f"{note}; no restart: {blind.problem}"
        if change.what in ("vcpus", "memory"):
            self._applied[change.what] = NEXT_BOOT
        self._set = replace(self._set, pending=(*self._set.pending, f"{change.what}: {note}"))

    def _replace(self, old: Change, new: Change) -> None:
        self._set = replace(self._set, changes=tuple(new if one is old else one for one in self._set.changes))

    def _restart(self, new_xml: str) -> None:
        for change in self._set.due:
            if change.how == RESTART and isinstance(change.action, DiskShrink):
                self._end_checkpoints(change)
        self._altered = True
        self._downtime = self._restarted(new_xml)
        facts = _facts(self._handle, self._request)
        for change in self._set.due:
            if change.how == RESTART:
                self._applied[change.what] = RESTART
                self._note(change, self._after_restart(change, facts))
        for change in self._set.due:
            if isinstance(change.action, FilesystemGrowth) and not self._outcomes[change.what].taken:
                self._note(change, self._grow_what_is_noticed_now(change.action, facts))
                self._applied[change.what] = RESTART if self._outcomes[change.what].altered else NONE

    def _restarted(self, new_xml: str) -> int:
        """The downtime. A restart in which libvirtd went away is finished, or taken back, as the next run would: its guest may be off."""
        try:
            with explaining(
                f"Restarting domain {self._facts.name!r} with its new size", state=_IN_BETWEEN, advice=_GO_ON
            ):
                return restart(self._connection, self._handle, self._journal, new_xml)
        except LibvirtFailed as error:
            if not self._connection.isAlive():
                self._settle_now(error)
            elif error.state == UNCHANGED:
                error.state, error.advice = _IN_BETWEEN, _GO_ON
            raise

    def _settle_now(self, error: LibvirtFailed) -> None:
        try:
            wait_for_daemon(self._uri)
            found = settle(self._uri, self._journal)
        except (VmkeeperError, libvirt.libvirtError, OSError) as trouble:
            error.now(f"{_IN_BETWEEN} Settling that failed: {trouble}")
            error.advice = f"Once libvirt answers: {_GO_ON[0].lower()}{_GO_ON[1:]}"
        else:
            error.now(f"Once libvirt answered again, the interrupted resize was {found['action']}.")
            error.advice = "Run this again"
            error.facts["rolled_back"] = self._journal.operation.reached("put-back")

    def _after_restart(self, change: Change, facts: Facts) -> Outcome:
        """What the guest says after it was started with its new size."""
        if isinstance(change.action, DiskShrink):
            return Outcome(None, note="its filesystem was checked before and after")
        if change.what == "vcpus":
            seen = len(facts.cpus.online) if facts.cpus else None
            if seen is None or seen == change.after:
                return Outcome(seen)
            return Outcome(seen, False, f"the guest has {seen} of {change.after} vCPUs online")
        if change.what == "memory":
            wait_for(
                lambda: memory.live(self._handle) == change.after, _BOOT_SECONDS
            )  # its balloon inflates at the boot
            have = memory.live(self._handle)
            if have != change.after:
                return Outcome(facts.memory.total, False, f"the guest has {human(have)} of {human(change.after or 0)}")
            left = len(facts.memory.offline_blocks)
            note = f"the guest left {left} blocks of its memory offline" if left else ""
            return Outcome(facts.memory.total, not left, note)
        if change.what.startswith("disk "):
            found = next((one for one in facts.filesystems if one.target == change.what[5:]), None)
            return Outcome(found.disk_size if found is not None else None)
        return Outcome(None, not isinstance(change.action, FilesystemGrowth))

    def _grow_what_is_noticed_now(self, action: FilesystemGrowth, facts: Facts) -> Outcome:
        found = next((one for one in facts.filesystems if one.target == action.filesystem.target), None)
        if found is None or found.problem:
            why = found.problem if found is not None else facts.filesystems_problem
            return Outcome(None, False, why or "the guest has mounted nothing that lies on it", altered=False)
        return guest_filesystem.take_room(self._handle, found, action.disk_size)

    # --- result ---

    def _resized(
        self, before: dict[str, Any], after: dict[str, Any], *, changed: bool, restarted: bool = False
    ) -> Resized:
        entries = []
        warnings = []
        for change in self._set.changes:
            outcome = self._outcomes.get(change.what, Outcome(None))
            why = "; ".join(part for part in (change.why, outcome.note) if part)
            entries.append(
                change.as_result(applied=self._applied.get(change.what), guest_sees=outcome.guest_sees, why=why)
            )
            if not outcome.taken:
                warnings.append(f"{self._facts.name}: {change.what}: {outcome.note}")
            if change.ends_checkpoints:
                warnings.append(
                    f"{self._facts.name}: resizing {change.what} ends the checkpoints"
                    f" {', '.join(change.ends_checkpoints)}; the next backup is a full one"
                )
            if change.warn and outcome.taken:
                warnings.append(f"{self._facts.name}: {change.what} stays: {change.why}")
            if change.how == NONE and any(one.what == f"disk {change.what.partition(' ')[2]}" for one in self._set.due):
                warnings.append(f"{self._facts.name}: {change.what} was not grown: {change.why}")
        if self._set.due:
            after = {**after, "changes": {one["what"]: f"{one['applied']}: {one['why']}" for one in entries}}
        waiting = [] if restarted else list(self._set.pending)
        return Resized(
            domain=self._facts.name,
            changed=changed,
            result={
                "domain": self._facts.name,
                "changes": entries,
                "restarted": restarted,
                "downtime_ms": self._downtime if restarted and self._facts.live is not None else 0,
                "restart_required": bool(waiting) and self._facts.live is not None,
                "restart_reasons": waiting if self._facts.live is not None else [],
                "rolled_back": False,
            },
            before=before,
            after=after,
            warnings=warnings,
        )


def _foresee(after: dict[str, Any], change: Change) -> None:
    """What the diff of check mode shows for one change."""
    if change.what in ("vcpus", "memory"):
        plugs = not isinstance(change.action, VcpuAction) or change.action.plug_to is not None
        if change.how in (LIVE, RESTART) and plugs:
            after[change.what]["live"] = change.after
    elif isinstance(change.action, (DiskGrowth, DiskShrink)):
        after["disks"][change.what[5:]] = change.after
    elif isinstance(change.action, FilesystemGrowth):
        after["filesystems"][change.action.filesystem.mountpoint] = change.after


def _foresee_definition(after: dict[str, Any], xml: str) -> None:
    domain = parse_domain(xml, DomainState("shutoff"))
    after["vcpus"].update(configured=domain.vcpus_current, maximum=domain.vcpus_max)
    after["memory"].update(configured=configured_memory(domain), maximum=domain.memory_limit)
