# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find and settle everything that interrupted runs left on domains, whichever trade they belong to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from .._errors import VmkeeperError
from ..hypervisor import appliance
from ..hypervisor.binding import libvirt
from . import journal, locks, release, settlement
from .journal import Operation
from .settlement import Settler
from .ticket import tickets_of

#: The path in the URI of the libvirt whose domains are root's (https://libvirt.org/uri.html).
_SYSTEM = "/system"

#: What an interrupted operation has left lying around: files, directories. By its kind.
Tellers = Mapping[str, Callable[[Operation], Sequence[str]]]


def recover(
    uri: str,
    handles: Sequence[Any],
    settlers: Mapping[str, Settler],
    tellers: Tellers,
    *,
    last: Collection[str] = (),
    check: bool = False,
) -> list[dict[str, Any]]:
    """Settle the domains one after another; returns ``{domain, what, action, settled, left}`` of each thing that was found.

    ``settled`` is False where it failed (``action`` says why) or, with ``check``, where it is only foreseen.  ``left`` are the
    paths that lay around because of it.  Whatever one domain's trouble is, the others are settled.  Operations of the kinds in
    ``last`` come after all others: they take long, and a guest that is frozen or off must not wait for them.
    """
    if not check:
        appliance.sweep()  # a look at a disk that was killed is in no journal
    findings = []

    def takes_long(handle: Any) -> bool:
        operation = journal.peek(handle.UUIDString())
        return operation is not None and operation.kind in last

    for handle in sorted(handles, key=takes_long):
        findings += _recover(uri, handle.UUIDString(), name_of(handle), settlers, tellers, check=check)
    return findings


def name_of(handle: Any) -> str:
    """Its name; its UUID where it is gone by now."""
    try:
        return str(handle.name())
    except libvirt.libvirtError:
        return str(handle.UUIDString())


def failed(domain: str, what: str, error: Exception, left: Sequence[str] = ()) -> dict[str, Any]:
    """The finding of what could not be settled. An error that is not one of ours is named with its type."""
    said = str(error) if isinstance(error, VmkeeperError) else f"{type(error).__name__}: {error}"
    return {"domain": domain, "what": what, "action": f"failed: {said}", "settled": False, "left": list(left)}


def unfinished_without_domain(
    connection: Any, names: Collection[str] | None = None
) -> list[tuple[str, str, Operation]]:
    """UUID, name and operation of what was left for domains that are not, or not yet, defined on this host.

    ``names`` are those of the only domains that are meant.  A libvirt that is not the system's, such as a user's own, does not
    know the system's domains: nothing can be said there.
    """
    if urlsplit(connection.getURI()).path != _SYSTEM:
        return []
    defined = {handle.UUIDString() for handle in connection.listAllDomains()}
    found: dict[str, tuple[str, str, Operation]] = {}
    for uuid in sorted(journal.all_unfinished() - defined):
        operation = journal.peek(uuid)
        if operation is None or any(one["uuid"] in defined for one in operation.domains):
            continue
        name = next((one["name"] for one in operation.domains if one["uuid"] == uuid), uuid)
        if names is None or name in names or uuid in names:
            found.setdefault(operation.id, (uuid, name, operation))  # an operation may have several UUIDs
    return list(found.values())


def recover_undefined(
    uri: str,
    connection: Any,
    settlers: Mapping[str, Settler],
    tellers: Tellers,
    *,
    names: Collection[str] | None = None,
    check: bool = False,
) -> list[dict[str, Any]]:
    """The same as :func:`recover` for what :func:`unfinished_without_domain` finds."""
    findings = []
    for uuid, name, _operation in unfinished_without_domain(connection, names):
        findings += _recover(uri, uuid, name, settlers, tellers, check=check)
    return findings


def _recover(
    uri: str, uuid: str, name: str, settlers: Mapping[str, Settler], tellers: Tellers, *, check: bool
) -> list[dict[str, Any]]:
    operation = journal.peek(uuid)
    left: list[str] = []
    if operation is not None and operation.kind in tellers:
        # What cannot be told is no reason not to settle it.
        with contextlib.suppress(OSError, VmkeeperError):
            left = list(tellers[operation.kind](operation))
    return _foresee(uuid, name, settlers, left) if check else _settle(uri, uuid, name, settlers, left)


def _foresee(uuid: str, name: str, settlers: Mapping[str, Settler], left: list[str]) -> list[dict[str, Any]]:
    findings = [
        {
            "domain": name,
            "what": f"frozen or paused for {ticket.purpose} by a run that has ended",
            "action": "would be thawed",
            "settled": False,
            "left": [],
        }
        for ticket in tickets_of(uuid)
        if release.orphaned(ticket)
    ]
    operation = journal.peek(uuid)
    holder = locks.holder(uuid)
    if operation is not None and holder is None:
        known = operation.kind in settlers
        last = operation.steps[-1]["name"] if operation.steps else "none"
        findings.append(
            {
                "domain": name,
                "what": f"an interrupted {operation.kind}, begun {operation.started}, last step {last!r}",
                "action": "would be finished or taken back"
                if known
                else "belongs to a newer version of the collection",
                "settled": False,
                "left": left,
            }
        )
    return findings


def _settle(uri: str, uuid: str, name: str, settlers: Mapping[str, Settler], left: list[str]) -> list[dict[str, Any]]:
    findings: list[dict[str, Any]] = []
    try:
        with settlement.hold([(uuid, name)], "recover_domain"):
            if release.release_orphans(uuid):
                findings.append(
                    {
                        "domain": name,
                        "what": "frozen or paused by a run that has ended",
                        "action": "thawed",
                        "settled": True,
                        "left": [],
                    }
                )
            found = settlement.settle_named(uri, [(uuid, name)], settlers)
    except Exception as error:  # noqa: BLE001 whatever it is: the next domain may be one that has to be thawed
        findings.append(failed(name, "an interrupted operation", error, left))
    else:
        # What can wait, and has to, is put off by its settler; its journal is still there then.
        findings += [{**one, "settled": journal.peek(uuid) is None, "left": left} for one in found]
    return findings
