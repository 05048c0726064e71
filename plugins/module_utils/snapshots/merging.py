# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make several layers one: the effects of a :class:`~.merge_plan.Work`, live or offline.

Every effect looks at what is true first, so the whole can be run again after an interruption at any point; that is all
that settling it does.  The content seen through the top of a run is the same at every instant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .._errors import UNCHANGED, LibvirtFailed, VmkeeperError
from ..hypervisor import apparmor, block_jobs, checkpoints, power
from ..hypervisor.connection import answering, explaining, find_by_uuid, open_connection
from ..hypervisor.domain_model import read_domain
from ..safety import processes, settlement, worker
from ..safety.journal import Journal
from ..safety.space import allocated_in_all
from . import layer_merge, records
from .ground import refuse_saved
from .merge_plan import Merge, Work
from .remains import Merged, remove_unneeded

#: Kinds of operations in the journal that are a :class:`Work` and nothing else.
COMMIT = "blockcommit"
REMOVAL = "snapshot removal"


#: How often libvirtd may go away while a guest is off for a merge: one that our calls end would do so for ever.
_LOSSES = 3


def run(handle: Any, uri: str, work: Work, journal: Journal, *, seconds: float | None = None) -> Merged:
    """:func:`merge_all` from the journal's first step to its end.

    A commit that fails leaves a chain that is whole, so the journal is closed and the task may be asked again, or not.
    What fails after a commit stays in the journal for the next run to finish, and so does what libvirt no longer tells of.  A
    guest that was shut down for it is started again in any case: where libvirtd goes away meanwhile, it is waited for, and the
    merge done to its end over another connection.
    """
    lost = 0
    with _telling_what_was_begun(work, journal):
        while True:
            try:
                with explaining(_doing(handle)):
                    return _run_once(handle, work, journal, seconds)
            except LibvirtFailed as error:
                if not journal.operation.reached("shutdown") or handle.connect().isAlive():
                    raise
                lost += 1
                handle = _when_it_answers(handle, uri, error, again=lost < _LOSSES)


def _doing(handle: Any) -> str:
    return f"Merging layers of domain {handle.name()!r}"


def _run_once(handle: Any, work: Work, journal: Journal, seconds: float | None) -> Merged:
    try:
        with explaining(_doing(handle)):
            done = merge_all(handle, work, journal, seconds=seconds)
    except block_jobs.TookTooLong:
        raise
    except (VmkeeperError, OSError) as error:
        before = journal.operation.steps[-1]["name"] in _BEFORE_A_COMMIT_IS_DONE
        try:
            if before:
                _settle_disks(handle, work, journal, refused=isinstance(error, block_jobs.NotBegun))
        finally:
            _start_again(handle, journal)
        if before:
            with contextlib.suppress(OSError):  # then the next run finds that nothing is left to do
                journal.finish()
        raise
    journal.finish()
    return done


def _when_it_answers(handle: Any, uri: str, error: LibvirtFailed, *, again: bool) -> Any:
    """The domain over another connection; where there is none, or ``again`` is False, ``error``, which says what that leaves."""
    trouble = ""
    if again:
        try:
            return answering(handle, uri)
        except VmkeeperError as none:
            trouble = f" {none.problem}."
    error.now(f"{_MAY_BE_OFF}{trouble}")
    error.advice = (
        "Once libvirt answers, run this again, or recover_domain, which finishes the merge and starts the guest"
    )
    raise error


_MAY_BE_OFF = "The guest was shut down for the merge and may be off; its layers are whole."


@contextlib.contextmanager
def _telling_what_was_begun(work: Work, journal: Journal) -> Iterator[None]:
    """A failure that says "nothing was changed", as of a look at a domain whose libvirtd has gone, does not know of this work."""
    try:
        yield
    except VmkeeperError as error:
        if error.state == UNCHANGED and journal.operation.steps[-1]["name"] != "begin":
            ended = ", ".join(repr(name) for name in work.ended)
            error.state = (
                "The merge of its layers was begun: what the guest sees is whole, and a job that runs goes on."
            )
            error.state += f" There may be no way back to {ended} any more." if ended else ""
            error.advice = error.advice or "Run this again, which takes it up, or recover_domain"
        raise


#: Steps at which every chain is whole and nothing is known to be merged that is not noted yet.
_BEFORE_A_COMMIT_IS_DONE = ("begin", "mark", "shutdown", "shut-off", "commits", "commit")


def _written(work: Work, journal: Journal, *, refused: bool) -> bool:
    """Whether the content of any layer but the tops may have changed; ``refused``: the last commit did not begin."""
    begun = [step["disk"] for step in journal.operation.steps if step["name"] == "commit"]
    pulled = {merge.target for merge in work.merges if merge.pull}
    together = journal.operation.reached("commits")
    return together or any(target not in pulled for target in (begun[:-1] if refused else begun))


def _settle_disks(handle: Any, work: Work, journal: Journal, *, refused: bool = False, cancelled: bool = False) -> None:
    """For an operation that goes no further: what was merged is noted, what is being merged stops, the rest stays as it is.

    ``cancelled``: whoever asks wants every job of these disks to end.  Else one that is not ours may be what was in the way.
    """
    steps = journal.operation.steps
    together = journal.operation.reached("commits")
    finished = {step["disk"] for step in steps if step["name"] == "verify"} - {
        step["disk"] for step in steps[-1:] if step["name"] == "commit"
    }
    merges = []
    for merge in work.merges:
        if merge.target not in finished:
            if cancelled or (together and layer_merge.commits_below(handle, merge)):
                block_jobs.cancel(handle, merge.target)
            if not layer_merge.is_merged(handle, merge):
                continue
            # It ended before it could be stopped, or was the quickest of several that were begun together.
            layer_merge.relink(handle, merge)
            layer_merge.verify(handle, merge)
        merges.append(merge)
    for rebased in work.rebased:
        if any(rebased.path == merge.base for merge in merges):
            records.rebase_snapshot(handle, rebased)
    if any(merge.pull for merge in merges):
        _end_checkpoints(handle, work)
    if not merges and not _written(work, journal, refused=refused):
        for name in work.ended:
            records.unmark_ending(handle, name)  # they are as whole as they were
    remove_unneeded(handle, [path for merge in merges for path in merge.gone if path in work.files], Merged())


def abandon(uri: str, pending: Journal) -> dict[str, str]:
    """Cancel an operation that was stopped: its running jobs end and the chains stay as they are now."""
    handle = find_by_uuid(open_connection(uri), pending.operation.domains[0]["uuid"])
    if handle is None:
        return settle(uri, pending)
    work = Work.from_json(pending.operation.plan["work"])
    if pending.operation.steps[-1]["name"] not in _BEFORE_A_COMMIT_IS_DONE:
        return settle(uri, pending)
    try:
        _settle_disks(handle, work, pending, cancelled=True)
        _wait_for_late(handle, pending)
    finally:
        _start_again(answering(handle, uri), pending)
    pending.finish()
    return {"what": f"a {pending.operation.kind} in progress", "action": "cancelled"}


def settle(uri: str, pending: Journal, *, seconds: float | None = None) -> dict[str, str]:
    """Finish an interrupted run; returns ``{what, action}``. ``seconds`` as for :func:`merge_all`."""
    handle = find_by_uuid(open_connection(uri), pending.operation.domains[0]["uuid"])
    work = Work.from_json(pending.operation.plan["work"])
    what = f"an interrupted {pending.operation.kind}"
    if handle is None:
        return settlement.given_up(pending, what)
    refuse_saved(read_domain(handle), state=f"There is {what} on it; all its layers were kept as they are.")
    if work.restart:
        _wait_for_late(handle, pending)
    if work.restart and handle.isActive() and not pending.operation.reached("commit"):
        # Nothing was merged, and the guest runs: it is not shut down by a task that was not allowed to.
        _settle_disks(handle, work, pending)
        pending.finish()
        return {"what": what, "action": "taken back"}
    run(handle, uri, work, pending, seconds=seconds)
    return {"what": what, "action": "finished"}


def merge_all(handle: Any, work: Work, journal: Journal, *, seconds: float | None = None) -> Merged:
    """Do the work and return what was done; ``seconds`` limits the wait for each live job (it goes on all the same)."""
    done = Merged()
    if work.ended:
        # From the first byte of a commit on nobody may go back to them, whatever becomes of this run.
        journal.step("mark", snapshots=list(work.ended))
        for name in work.ended:
            records.mark_ending(handle, name)
    if work.restart:
        _shut_down(handle, journal)
    _begin_together(handle, work, journal)
    for merge in work.merges:
        # Between the disks it may have been saved: a live commit keeps that off, and nothing else does.
        refuse_saved(
            read_domain(handle), state="Its layers are whole; those of its disks that were merged before stay so."
        )
        moved = allocated_in_all((*merge.merged[1:], merge.base) if merge.pull else merge.merged)
        done.committed_bytes[merge.target] = done.committed_bytes.get(merge.target, 0) + moved
        journal.step("commit", disk=merge.target, base=merge.base)
        layer_merge.commit(
            handle, merge, bandwidth=_limit(handle, work), seconds=seconds, done=_relinked(journal, merge)
        )
        journal.step("relink", disk=merge.target)
        layer_merge.relink(handle, merge)
        journal.step("verify", disk=merge.target)
        layer_merge.verify(handle, merge)
    if work.checkpoints_ended:
        journal.step("checkpoints")
        _end_checkpoints(handle, work)
    _start_again(handle, journal)
    journal.step("snapshots")
    for rebased in work.rebased:
        records.rebase_snapshot(handle, rebased)
    for name in work.ended:
        records.forget_snapshot(handle, name)
    journal.step("remove")
    remove_unneeded(handle, work.files, done)
    return done


def _limit(handle: Any, work: Work) -> int:
    """The limit of a job that begins now, which may be another one than was asked: see ``domain_job``."""
    return worker.limit_for(handle.UUIDString(), work.bandwidth)


def _relinked(journal: Journal, merge: Merge) -> bool:
    """Whether an earlier run came to the step that follows the disk's merge."""
    return any(step["name"] == "relink" and step["disk"] == merge.target for step in journal.operation.steps)


def _end_checkpoints(handle: Any, work: Work) -> None:
    """libvirt 9.0 may lose changes by a pull across layers, silently, and the next increment would lack them.

    So may a pull that was finished offline, since the guest was switched off.  Only now, and not before the pull: until the
    layers leave the chain their bitmaps are right, and QEMU may not be allowed to remove them from there.
    """
    checkpoints.end(
        handle, work.checkpoints_ended, state="The layers are merged; run this again before the next backup."
    )


# --- a guest that is shut down for it --------------------------------------------------------------------------------


def _shut_down(handle: Any, journal: Journal) -> None:
    if journal.operation.reached("shut-off") or not handle.isActive():
        return  # somebody who started it since then wants it to run: what is denied then says so
    journal.step("shutdown")
    state = "No layer was merged. A guest that is late may still go down."
    if power.shut_down([handle], state=state):
        raise VmkeeperError(
            f"Domain {handle.name()!r} did not shut down within {power.SHUTDOWN_SECONDS:.0f} s",
            state=state,
            advice="See that the guest reacts to the ACPI power button or has its agent running",
        )
    journal.step("shut-off")


def _wait_for_late(handle: Any, journal: Journal) -> None:
    """A guest whose power button was pressed may still be on its way down; who looked now would believe that it stays."""
    operation = journal.operation
    if operation.reached("shutdown") and not operation.reached("shut-off") and operation.boot_id == processes.boot_id():
        power.wait_for_late([handle])


def _start_again(handle: Any, journal: Journal) -> None:
    """Start what this operation itself has shut down, in this boot; what is off otherwise is off for other reasons."""
    operation = journal.operation
    if not operation.reached("shutdown") or operation.boot_id != processes.boot_id():
        return
    state = read_domain(handle).state
    if state.active or state.reason not in power.ENDED_BY_ITSELF:
        return
    journal.note("start")
    with explaining(
        f"Starting domain {handle.name()!r} again",
        state="It is shut off, and its layers are whole.",
        advice="Start it, then see libvirt's log",
    ):
        handle.create()


# --- several disks ---------------------------------------------------------------------------------------------------


def _begin_together(handle: Any, work: Work, journal: Journal) -> None:
    """Begin all commits below active layers before one of them ends.

    When one ends, libvirt before 12.1 writes the AppArmor profile of the guest anew, which denies those that have not begun
    (docs/apparmor.md).  What cannot be begun here says so when its turn comes.
    """
    if not handle.isActive():
        return
    below = []
    for merge in work.merges:
        found = None if merge.pull else layer_merge.live_run(handle, merge)
        if found is not None and not found.active:
            below.append((merge, found))
    if len(below) < 2:
        return
    journal.step("commits", disks=[merge.target for merge, _found in below])
    # Held, the first cannot end while the others are begun.
    bandwidth = block_jobs.HELD if apparmor.rules_file(handle) else _limit(handle, work)
    begun = []
    try:
        for merge, found in below:
            block_jobs.begin_intermediate(handle, merge.target, found.base, found.top, bandwidth=bandwidth)
            begun.append(merge.target)
    except block_jobs.NotBegun:
        pass
    finally:
        for target in begun:
            block_jobs.release(handle, target, _limit(handle, work))
