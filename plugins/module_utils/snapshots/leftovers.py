# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots whose removal failed half-way: they hold nothing whole any more, and are only to be removed."""

from __future__ import annotations

from typing import Any

from .._errors import LibvirtFailed
from ..hypervisor.connection import find_by_uuid
from ..safety.recovery import failed, name_of
from .model import read_snapshots
from .removing import Request, remove


def finish_removals(uri: str, handle: Any, *, check: bool = False) -> list[dict[str, Any]]:
    """Remove them; returns ``{domain, what, action, settled, left}`` as :func:`..safety.recovery.recover` does."""
    findings: list[dict[str, Any]] = []
    domain = name_of(handle)
    try:
        snapshots = read_snapshots(handle)
    except LibvirtFailed as error:
        # Gone since it was listed, as the guest of a proof that has ended: it has no snapshots.
        return (
            []
            if find_by_uuid(handle.connect(), handle.UUIDString()) is None
            else [failed(domain, "its snapshots", error)]
        )
    for snapshot in snapshots:
        if snapshot.labels is None or not snapshot.labels.ending:
            continue
        what = f"snapshot {snapshot.name!r}, whose removal was begun"
        action, settled = "would be removed", False
        if not check:
            try:
                remove(uri, [handle], Request(snapshot.name))
                action, settled = "removed", True
            except Exception as error:  # noqa: BLE001 whatever it is: other domains have removals to be finished
                findings.append(failed(domain, what, error))
                continue
        findings.append({"domain": domain, "what": what, "action": action, "settled": settled, "left": []})
    return findings
