# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find and settle everything that interrupted runs left on domains, whichever trade they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import appliance
from . import journal, locks, release, settlement
from .settlement import Settler
from .ticket import tickets_of


def recover(
    uri: str, handles: Sequence[Any], settlers: Mapping[str, Settler], *, check: bool = False
) -> list[dict[str, Any]]:
    """Settle the domains one after another; returns ``{domain, what, action, settled}`` of each thing that was found.

    ``settled`` is False where it failed (``action`` says why) or, with ``check``, where it is only foreseen.
    """
    if not check:
        appliance.sweep()  # a look at a disk that was killed is in no journal
    findings = []
    for handle in handles:
        findings += _recover(uri, handle.UUIDString(), handle.name(), settlers, check=check)
    return findings


def recover_undefined(
    uri: str, handles: Sequence[Any], settlers: Mapping[str, Settler], *, check: bool = False
) -> list[dict[str, Any]]:
    """The same for what was left under the UUIDs of domains that are not, or not yet, among ``handles``, all of this host's."""
    defined = {handle.UUIDString() for handle in handles}
    findings = []
    for uuid in sorted(journal.all_unfinished() - defined):
        operation = journal.peek(uuid)
        if operation is not None:
            name = next((one["name"] for one in operation.domains if one["uuid"] == uuid), uuid)
            findings += _recover(uri, uuid, name, settlers, check=check)
    return findings


def _recover(uri: str, uuid: str, name: str, settlers: Mapping[str, Settler], *, check: bool) -> list[dict[str, Any]]:
    return _foresee(uuid, name, settlers) if check else _settle(uri, uuid, name, settlers)


def _foresee(uuid: str, name: str, settlers: Mapping[str, Settler]) -> list[dict[str, Any]]:
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


def _settle(uri: str, uuid: str, name: str, settlers: Mapping[str, Settler]) -> list[dict[str, Any]]:
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
            found = settlement.settle_named(uri, [(uuid, name)], settlers)
        except VmkeeperError as error:
            findings.append(
                {"domain": name, "what": "an interrupted operation", "action": f"failed: {error}", "settled": False}
            )
        else:
            # What can wait, and has to, is put off by its settler; its journal is still there then.
            findings += [{**one, "settled": journal.peek(uuid) is None} for one in found]
    return findings
