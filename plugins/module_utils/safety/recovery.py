# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find and settle everything that interrupted runs left on domains, whichever trade they belong to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import appliance
from . import journal, locks, release, settlement
from .journal import Operation
from .settlement import Settler
from .ticket import tickets_of

#: What an interrupted operation has left lying around: files, directories. By its kind.
Tellers = Mapping[str, Callable[[Operation], Sequence[str]]]


def recover(
    uri: str, handles: Sequence[Any], settlers: Mapping[str, Settler], tellers: Tellers, *, check: bool = False
) -> list[dict[str, Any]]:
    """Settle the domains one after another; returns ``{domain, what, action, settled, left}`` of each thing that was found.

    ``settled`` is False where it failed (``action`` says why) or, with ``check``, where it is only foreseen.  ``left`` are the
    paths that lay around because of it.
    """
    if not check:
        appliance.sweep()  # a look at a disk that was killed is in no journal
    findings = []
    for handle in handles:
        findings += _recover(uri, handle.UUIDString(), handle.name(), settlers, tellers, check=check)
    return findings


def unfinished_without_domain(
    handles: Sequence[Any], names: Collection[str] | None = None
) -> list[tuple[str, str, Operation]]:
    """UUID, name and operation of what was left for domains that are not, or not yet, among ``handles``, all of this host's.

    ``names`` are those of the only domains that are meant.
    """
    defined = {handle.UUIDString() for handle in handles}
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
    handles: Sequence[Any],
    settlers: Mapping[str, Settler],
    tellers: Tellers,
    *,
    names: Collection[str] | None = None,
    check: bool = False,
) -> list[dict[str, Any]]:
    """The same as :func:`recover` for what :func:`unfinished_without_domain` finds."""
    findings = []
    for uuid, name, _operation in unfinished_without_domain(handles, names):
        findings += _recover(uri, uuid, name, settlers, tellers, check=check)
    return findings


def _recover(
    uri: str, uuid: str, name: str, settlers: Mapping[str, Settler], tellers: Tellers, *, check: bool
) -> list[dict[str, Any]]:
    operation = journal.peek(uuid)
    told = operation is not None and operation.kind in tellers
    left = list(tellers[operation.kind](operation)) if told and operation is not None else []
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
        with locks.hold([(uuid, name)], "recover_domain"):
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
    except VmkeeperError as error:
        findings.append(
            {
                "domain": name,
                "what": "an interrupted operation",
                "action": f"failed: {error}",
                "settled": False,
                "left": left,
            }
        )
    else:
        # What can wait, and has to, is put off by its settler; its journal is still there then.
        findings += [{**one, "settled": journal.peek(uuid) is None, "left": left} for one in found]
    return findings
