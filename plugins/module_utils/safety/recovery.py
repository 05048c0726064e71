# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find and settle everything that interrupted runs left on domains, whichever trade they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import VmkeeperError
from . import journal, locks, release, settlement
from .settlement import Settler
from .ticket import tickets_of


@dataclass(frozen=True)
class Absent:
    """Stands for a domain that an interrupted operation names and that libvirt does not know (any more, or yet)."""

    uuid: str
    label: str

    def UUIDString(self) -> str:
        """Its UUID."""
        return self.uuid

    def name(self) -> str:
        """What the operation called it."""
        return self.label


def absent(handles: Sequence[Any]) -> list[Absent]:
    """The domains of unfinished operations that are not among ``handles``, all of the host's, and that nobody works on now."""
    present = {handle.UUIDString() for handle in handles}
    found = []
    for uuid in journal.known():
        operation = journal.peek(uuid)
        if operation is None or any(one["uuid"] in present for one in operation.domains):
            continue
        if locks.holder(uuid) is None:
            found.append(Absent(uuid, next(one["name"] for one in operation.domains if one["uuid"] == uuid)))
    return found


def recover(
    uri: str, handles: Sequence[Any], settlers: Mapping[str, Settler], *, check: bool = False
) -> list[dict[str, Any]]:
    """Settle the domains one after another; returns ``{domain, what, action, settled}`` of each thing that was found.

    ``settled`` is False where it failed (``action`` says why) or, with ``check``, where it is only foreseen.
    """
    findings = []
    for handle in handles:
        findings += _foresee(handle, settlers) if check else _settle(uri, handle, settlers)
    return findings


def _foresee(handle: Any, settlers: Mapping[str, Settler]) -> list[dict[str, Any]]:
    uuid, name = handle.UUIDString(), handle.name()
    findings = [
        {
            "domain": name,
            "what": f"frozen or paused for {ticket.purpose} by a run that has ended",
            "action": "would be thawed",
            "settled": False,
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
            }
        )
    return findings


def _settle(uri: str, handle: Any, settlers: Mapping[str, Settler]) -> list[dict[str, Any]]:
    uuid, name = handle.UUIDString(), handle.name()
    findings: list[dict[str, Any]] = []
    with locks.hold([(uuid, name)], "recover_domain"):
        try:
            if release.release_orphans(uuid):
                findings.append(
                    {
                        "domain": name,
                        "what": "frozen or paused by a run that has ended",
                        "action": "thawed",
                        "settled": True,
                    }
                )
            found = settlement.settle_before_change(uri, [handle], settlers)
        except VmkeeperError as error:
            findings.append(
                {"domain": name, "what": "an interrupted operation", "action": f"failed: {error}", "settled": False}
            )
        else:
            findings += [{**one, "settled": True} for one in found]
    return findings
