# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``restore mode: instant``: a guest that runs at once on overlays over its point, and is then pulled local.

Until ``start`` an interruption is undone, for nobody has written anything, unless somebody has started the guest by hand.
From then on the overlays hold the guest's writes: an interruption is only ever finished.  The journal stays open, and the
definition names the repository's files, until no disk of the guest needs them.

Layers that are encrypted are opened by a libvirt secret that is in libvirtd's memory only.  A guest that stopped after libvirtd
was restarted, or one that was shut down before all was pulled, needs the passphrase once more: the same restore brings it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import LibvirtFailed, Refused, VmkeeperError
from ..hypervisor import block_jobs, chain, definition, image_node, libvirt_secret, qemu_img
from ..hypervisor.backup_job import DAEMON_PATIENCE
from ..hypervisor.binding import libvirt
from ..hypervisor.block_jobs import TookTooLong
from ..hypervisor.connection import constant, explaining, find_by_uuid, open_connection
from ..hypervisor.domain_model import Layer, qemu_owner, read_domain, read_state
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..hypervisor.image_node import Image, Keys, Passphrase
from ..safety import host_graph, locks, places, views, worker
from ..safety import journal as journals
from ..safety.journal import Journal, Operation
from . import settle
from .lending import Loan, lend, let_open

KIND = "instant-restore"

#: A guest that stopped so was meant to stop; any other that stands on its point was meant to run.
_MEANT = ("shutdown", "destroyed")
_POLL_SECONDS = 0.5
_MOST_ERRORS = 3


def begin(uuid: str, name: str, plan: dict[str, Any]) -> Journal:
    """``plan`` holds ``point, request, notes, pieces, xml, uuid, name, loan, bandwidth``; pieces as those of a restore."""
    return Journal.begin(KIND, [(uuid, name)], plan)


def unfinished(connection: Any, uuid: str, identity: Mapping[str, Any]) -> Journal | None:
    """The same restore, interrupted when its guest had been started, and still to be finished. Call it under the domain's lock.

    None for one that will be undone, and for one whose domain somebody has undefined since: those are settled.
    """
    pending = journals.unfinished(uuid)
    if pending is None or pending.operation.kind != KIND or find_by_uuid(connection, uuid) is None:
        return None
    if _goes_back(connection, pending.operation):
        return None
    return pending if pending.operation.plan["request"] == identity else None


def left_behind(connection: Any, operation: Operation | None) -> list[str]:
    """The images that a settled restore leaves, because its domain was undefined after its guest had been started."""
    if operation is None or operation.kind != KIND or find_by_uuid(connection, operation.plan["uuid"]) is not None:
        return []
    if _goes_back(connection, operation):
        return []
    return [piece["path"] for piece in operation.plan["pieces"] if os.path.lexists(piece["path"])]


def _loan(plan: Mapping[str, Any]) -> Loan:
    return Loan.from_json(plan["loan"])


def _disks(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [piece for piece in plan["pieces"] if piece["target"] != "nvram"]


# --- it stands up ------------------------------------------------------------------------------------------------


def stand_up(uri: str, pending: Journal, passphrase: Passphrase | None = None) -> None:
    """Lend the point, put overlays over it, define the domain and start it. Raises with everything undone."""
    plan = pending.operation.plan
    try:
        connection = open_connection(uri)
        owner = qemu_owner(connection.getCapabilities())
        loan = _loan(plan)
        pending.step("lend")
        lend(loan, owner)
        tops = {target: layers[0] for target, layers in loan.layers().items()}
        for piece in _disks(plan):
            pending.step("overlay", target=piece["target"])
            # A disk that was encrypted in the guest's own image is so from the first write on.
            overlay = Image(piece["part"], "qcow2", passphrase if piece["secret"] else None)
            size, below = loan.sizes[piece["target"]], tops[piece["target"]].path
            qemu_img.create_layer(overlay, size, backing=below, owner=owner)
            places.fsync_file(overlay.path)
        pending.step("place")
        for piece in plan["pieces"]:
            settle.place(piece)
        pending.step("define")
        definition.define(
            connection,
            plan["xml"],
            doing=f"Defining domain {plan['name']!r}",
            state="Everything is as it was before.",
        )
        let_open(connection, loan, passphrase, f"instant restore of {plan['name']}")
        _start(connection, pending)
    except BaseException as error:
        if not pending.operation.reached("running"):
            _undo_after(error, uri, pending)
        raise


def _undo_after(error: BaseException, uri: str, pending: Journal) -> None:
    try:
        if _unwritten(open_connection(uri), pending.operation):
            undo(uri, pending)
    except (VmkeeperError, libvirt.libvirtError, OSError) as trouble:
        if isinstance(error, VmkeeperError):
            error.now(f"Undoing it failed ({trouble}); the next run goes on with that.")


def _goes_back(connection: Any, operation: Operation) -> bool:
    """Whether an interrupted restore is undone, not finished: before its start, unless somebody has started its guest by hand."""
    started = operation.reached("start") and not operation.reached("undo")
    return not started and _unwritten(connection, operation)


def _unwritten(connection: Any, operation: Operation) -> bool:
    """Whether nobody has written anything yet: neither our guest nor one that somebody has started by hand."""
    if not operation.reached("define"):
        return True
    handle = find_by_uuid(connection, operation.plan["uuid"])
    if operation.reached("running") or (handle is not None and handle.isActive()):
        return False
    return not any(
        chain.holds_data(piece["path"]) for piece in _disks(operation.plan) if os.path.lexists(piece["path"])
    )


def _start(connection: Any, pending: Journal) -> None:
    plan = pending.operation.plan
    handle = find_by_uuid(connection, plan["uuid"])
    if handle is None:
        raise Refused(f"The restored domain {plan['name']!r} was undefined meanwhile", advice="Run the restore again")
    pending.step("start")
    if not handle.isActive():
        with explaining(
            f"Starting the restored domain {plan['name']!r}",
            state="What the guest has written, if anything, is kept.",
            advice="See libvirt's log of the domain",
        ):
            handle.create()
    pending.step("running")


def stand_again(uri: str, pending: Journal, passphrase: Passphrase | None = None) -> None:
    """Start a guest that stopped while it stood on its point: a crash, a reboot of the host. Running: nothing to do."""
    connection = open_connection(uri)
    plan = pending.operation.plan
    handle = find_by_uuid(connection, plan["uuid"])
    if handle is None or handle.isActive():
        return
    lend(_loan(plan), qemu_owner(connection.getCapabilities()))
    let_open(connection, _loan(plan), passphrase, f"instant restore of {plan['name']}")
    try:
        _start(connection, pending)
    except BaseException as error:
        if not pending.operation.reached("running"):
            _undo_after(error, uri, pending)
        raise


def undo(uri: str, pending: Journal) -> None:
    """Remove all of it; nobody has written anything."""
    plan = pending.operation.plan
    pending.step("undo")
    handle = find_by_uuid(open_connection(uri), plan["uuid"])
    paths = {piece["path"] for piece in _disks(plan)}
    if handle is not None and paths & {disk.path for disk in read_domain(handle, inactive=True).disks}:
        with explaining(f"Undefining domain {plan['name']!r}", state="Its files are kept."):
            handle.undefineFlags(constant("VIR_DOMAIN_UNDEFINE_NVRAM") or 0)
    for piece in plan["pieces"]:
        if os.path.lexists(piece["part"]) or pending.operation.reached("place"):
            places.undo_rename_new(piece["part"], piece["path"])
    settle.forget_secrets(uri, plan["pieces"])
    _let_go(uri, plan)
    pending.finish()


def _let_go(uri: str, plan: Mapping[str, Any]) -> None:
    """Nobody stands on the point any more."""
    loan = _loan(plan)
    views.close_view(loan.name)
    if loan.secret is not None:
        with explaining("Removing the key of an encrypted point", state="No guest uses it.", advice="Run this again"):
            libvirt_secret.forget(open_connection(uri), loan.secret)


# --- it becomes independent --------------------------------------------------------------------------------------


def pull(uri: str, uuid: str, name: str, *, seconds: float | None = None, passphrase: Passphrase | None = None) -> bool:
    """Pull a guest local and let the repository go; False when that is done already.

    Raises :class:`TookTooLong` when a disk takes longer than ``seconds``; the copying goes on then.  Raises :class:`Refused`
    where somebody has undefined the domain meanwhile.
    """
    with locks.hold([(uuid, name)], "pulling an instantly restored domain local"):
        pending = journals.unfinished(uuid)
        if pending is None or pending.operation.kind != KIND:
            return False
        if not carry_on(uri, pending, seconds=seconds, passphrase=passphrase):
            left = left_behind(open_connection(uri), pending.operation)
            raise Refused(
                f"The restored domain {name!r} was undefined before it was pulled local",
                state=_left_alone(left),
                advice="Keep, move or remove those files, then run the restore again"
                if left
                else "Run the restore again",
            )
        return True


def _left_alone(left: Sequence[str]) -> str:
    return f"What its guest has written is left alone in {', '.join(left)}" if left else "None of its images is left"


def start_worker(uri: str, uuid: str, name: str) -> worker.Job:
    """Let a worker :func:`pull`."""
    return worker.start(KIND, uri, [(uuid, name)], "backup.instant_restore", {"uuid": uuid, "name": name})


def work(uri: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker does."""
    return {"changed": pull(uri, request["uuid"], request["name"])}


def carry_on(uri: str, pending: Journal, *, seconds: float | None = None, passphrase: Passphrase | None = None) -> bool:
    """From a started guest to one that needs the repository no more. Every step looks first at what is done.

    Returns whether the domain is there: somebody may undefine it at any time, and then there is nothing to finish.
    """
    plan = pending.operation.plan
    handle = find_by_uuid(open_connection(uri), plan["uuid"])
    if handle is not None:
        try:
            if not handle.isActive():
                raise _Stopped(read_state(handle).reason)
            pending.step("pull")
            for piece in _disks(plan):
                _pull_disk(uri, plan, piece["target"], seconds)
        except _Stopped as stopped:
            _after_stop(uri, pending, stopped.reason, passphrase)
        pending.step("detach")
        _define_alone(uri, plan)
    pending.step("release")
    _require_unused(uri, plan)
    there = find_by_uuid(open_connection(uri), plan["uuid"]) is not None
    _let_go(uri, plan)
    pending.finish()
    return there


class _Stopped(Exception):
    """The guest does not run."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _pull_disk(uri: str, plan: Mapping[str, Any], target: str, seconds: float | None) -> None:
    """Across restarts of libvirtd: QEMU goes on meanwhile."""
    lowest = _loan(plan).layers()[target][-1].path or ""
    errors, away_since = 0, None
    while True:
        try:
            handle = find_by_uuid(open_connection(uri), plan["uuid"])
            if handle is None or not handle.isActive():
                raise _Stopped(read_state(handle).reason if handle is not None else "undefined")
            away_since = None
            limit = worker.limit_for(plan["uuid"], plan["bandwidth"])
            block_jobs.pull(handle, target, lowest, None, bandwidth=limit, seconds=seconds)
            return
        except TookTooLong:
            raise
        except (LibvirtFailed, libvirt.libvirtError) as error:
            if _answers(uri):
                errors += 1
                if errors >= _MOST_ERRORS:
                    raise
            else:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > DAEMON_PATIENCE:
                    raise LibvirtFailed(
                        f"libvirtd went away while domain {plan['name']!r} was pulled local, and did not come back",
                        state="The guest runs, and still needs the repository.",
                        advice="Start libvirtd, then run this again",
                    ) from error
        time.sleep(_POLL_SECONDS)


def _answers(uri: str) -> bool:
    try:
        open_connection(uri).close()
    except VmkeeperError:
        return False
    return True


def _after_stop(uri: str, pending: Journal, reason: str, passphrase: Passphrase | None) -> None:
    """A guest that was shut down is made whole as it lies; one that was lost waits for its restart."""
    plan = pending.operation.plan
    if reason == "undefined":
        return
    connection = open_connection(uri)
    handle = find_by_uuid(connection, plan["uuid"])
    if handle is not None and handle.isPersistent() and handle.hasManagedSaveImage():
        raise Refused(
            f"Domain {plan['name']!r} has a saved state that needs the repository {_loan(plan).repository}",
            state="It is shut off, and nothing of it is lost.",
            advice=f"Run its restore again, or virsh start {plan['name']}, then run this again",
        )
    if reason not in _MEANT:
        raise Refused(
            f"Domain {plan['name']!r} stopped ({reason}) while it was pulled local",
            state="What it had written is safe in its own images, which still need the repository.",
            advice="Run its restore again, or recover_domain: it is started and pulled on",
        )
    loan = _loan(plan)
    if loan.secret is not None and passphrase is None:
        raise Refused(
            f"Domain {plan['name']!r} was shut down before all of it was local, and the rest is encrypted in {loan.repository}",
            state="What it had written is safe in its own images, which still need the repository.",
            advice="Run its restore again with its passphrase, which makes it whole as it lies",
        )
    lend(loan, qemu_owner(connection.getCapabilities()))
    pending.step("flatten")
    for piece in _disks(plan):
        if _stands_on_something(piece["path"]):
            _flatten(loan, piece, passphrase)


def _flatten(loan: Loan, piece: Mapping[str, Any], passphrase: Passphrase | None) -> None:
    encrypted = loan.secrets()
    below = (layer.path or "" for layer in loan.layers()[piece["target"]])
    layers = [
        Image(piece["path"], "qcow2", passphrase if piece["secret"] else None),
        *(Image(path, "qcow2", passphrase if path in encrypted else None) for path in below),
    ]
    with Keys() as keys:
        # Safe mode: the content is the same at every instant, and the link is dropped last.
        qemu_img.run(
            ["rebase", "-q", "--image-opts", "-b", "", image_node.as_options(image_node.node(layers, keys))],
            doing=f"Making {piece['path']} independent of the repository",
            keys=keys,
            with_caller=True,
        )


def _stands_on_something(path: str) -> bool:
    try:
        return read_qcow2(path).backing_file is not None
    except FileNotFoundError:
        return False
    except (OSError, BadHeader) as error:
        raise Refused(f"The image {path} cannot be read: {error}", advice="Check it with qemu-img check") from error


def _define_alone(uri: str, plan: Mapping[str, Any]) -> None:
    connection = open_connection(uri)
    handle = find_by_uuid(connection, plan["uuid"])
    if handle is None or not handle.isPersistent():
        return
    ours = {piece["path"] for piece in _disks(plan)}
    layers = {
        disk.target: Layer(disk.path, disk.format)
        for disk in read_domain(handle, inactive=True).disks
        if disk.path in ours and len(disk.chain) > 1
    }
    if layers:
        definition.define(
            connection,
            definition.with_disk_layers(definition.persistent_xml(handle), layers),
            doing=f"Writing the definition of domain {plan['name']!r} without the repository",
            state="The guest runs on its own disks.",
        )


def _require_unused(uri: str, plan: Mapping[str, Any]) -> None:
    """Whoever has put a snapshot or a clone above the overlays meanwhile may still need the point."""
    loan = _loan(plan)
    view = os.path.realpath(loan.view) + "/"
    connection = open_connection(uri)
    for piece in _disks(plan):
        with contextlib.suppress(OSError, BadHeader):
            below = read_qcow2(piece["path"]).backing_file
            if below is None or not os.path.realpath(below).startswith(view):
                continue
            readers = host_graph.read_graph(connection, [os.path.dirname(piece["path"])]).readers(piece["path"])
            if readers:
                raise Refused(
                    f"{piece['path']} still stands on the repository and is needed by {', '.join(map(str, readers))}",
                    state=f"Domain {plan['name']!r} itself does not need it any more.",
                    advice="Remove that, then run this again",
                )


def settle_instant(uri: str, pending: Journal) -> dict[str, str]:
    """Undo one whose guest was started by nobody, finish any other; returns ``{what, action}``."""
    plan = pending.operation.plan
    what = f"an interrupted instant restore of {plan['point']}"
    # One that was being undone may have lost its domain to that, and only to that.
    if _goes_back(open_connection(uri), pending.operation):
        undo(uri, pending)
        return {"what": what, "action": "undone"}
    handle = find_by_uuid(open_connection(uri), plan["uuid"])
    if handle is not None and not handle.isActive() and read_state(handle).reason not in _MEANT:
        stand_again(uri, pending)
    if carry_on(uri, pending):
        return {"what": what, "action": "finished"}
    left = left_behind(open_connection(uri), pending.operation)
    return {"what": what, "action": f"given up: the domain was undefined. {_left_alone(left)}"}
