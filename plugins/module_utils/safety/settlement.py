# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Before a domain is changed, what an earlier run left of it is finished or undone.

A trade brings a settler for each kind of operation that it journals.  What belongs to another trade is refused by name:
``recover_domain`` knows them all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .._errors import Unfinished
from . import checkpoints_aside, journal, locks, release
from .journal import Journal

#: Finishes or undoes one interrupted operation, closes its journal, and returns ``{what, action}``.
#: Called with the uri under the locks of the task's domains; must do nothing twice.
Settler = Callable[[str, Journal], dict[str, str]]


@contextlib.contextmanager
def hold(domains: Sequence[tuple[str, str]], operation: str) -> Iterator[None]:
    """Hold the locks of ``domains`` and of those that an interrupted operation ties to them, all in one order.

    Settling a group needs the locks of all its members: two tasks that took them one by one, each from its own member on, would
    wait for each other.
    """
    while True:
        tied = _tied(domains)
        with locks.hold(tied, operation):
            if set(_tied(domains)) <= set(tied):
                yield
                return


def _tied(domains: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    found = dict(domains)
    for uuid, _name in domains:
        interrupted = journal.peek(uuid)
        for one in interrupted.domains if interrupted is not None else ():
            found.setdefault(one["uuid"], one["name"])
    return sorted(found.items())


def settle_before_change(
    uri: str, handles: Sequence[Any], settlers: Mapping[str, Settler], *, check: bool = False
) -> list[dict[str, str]]:
    """Settle the domains' interrupted operations; returns ``{domain, what, action}`` of each.

    Call it inside :func:`hold` of the domains.  With ``check`` nothing is settled, and only what could not be is refused.
    """
    return settle_named(uri, [(handle.UUIDString(), handle.name()) for handle in handles], settlers, check=check)


def settle_named(
    uri: str, domains: Sequence[tuple[str, str]], settlers: Mapping[str, Settler], *, check: bool = False
) -> list[dict[str, str]]:
    """The same for pairs of UUID and name, of domains that need not be defined any more."""
    findings = []
    for uuid, name in domains:
        if check:
            operation = journal.peek(uuid)
            if operation is not None and operation.kind not in settlers:
                raise _foreign(name, operation.kind)
            continue
        release.release_orphans(uuid)
        if checkpoints_aside.settle(uri, uuid):
            found = {"what": "checkpoints that an interrupted run had put aside", "action": "defined again"}
            findings.append({"domain": name, **found})
        pending = journal.unfinished(uuid)
        if pending is None:
            continue
        settler = settlers.get(pending.operation.kind)
        if settler is None:
            raise _foreign(name, pending.operation.kind)
        # The task may name only some domains of the group that was interrupted; see hold().
        group = [(one["uuid"], one["name"]) for one in pending.operation.domains]
        with locks.hold(group, f"settling {pending.operation.kind}"):
            findings.append({"domain": name, **settler(uri, pending)})
    return findings


def given_up(pending: Journal, what: str, *, where: str = "its files") -> dict[str, str]:
    """Close the journal of a domain that was undefined since: nothing is left that could be finished, and no file is touched."""
    pending.finish()
    return {"what": what, "action": f"given up: the domain is not defined any more; {where} are left alone"}


def _foreign(name: str, kind: str) -> Unfinished:
    return Unfinished(
        f"Domain {name!r} has an interrupted operation ({kind}) that must be settled first",
        advice=f"Run vmkeeper.libvirt.recover_domain for {name!r}, or the same {kind} task again",
        operation=kind,
    )
