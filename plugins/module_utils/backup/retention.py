# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Apply a retention policy to the points of domains in a repository."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._errors import InvalidInput, NotFound, VmkeeperError
from ..hypervisor.image_node import Passphrase
from . import listing, removal
from .folding_plan import RemovalPlan
from .repository import History, Repository, open_repository
from .retention_plan import Keep, Kept, Plan, plan_retention


@dataclass
class Pruned:
    """The result: what stays and why, what went, and the bytes that this freed."""

    kept: list[Kept] = field(default_factory=list)
    removed: list[dict[str, Any]] = field(default_factory=list)
    freed: int = 0
    warnings: list[str] = field(default_factory=list)

    def as_result(self) -> dict[str, Any]:
        """The module's keys."""
        return {
            "kept": [one.as_result() for one in self.kept],
            "removed": self.removed,
            "freed_bytes": self.freed,
        }


def prune(
    connection: Any,
    uri: str,
    path: str,
    domains: Sequence[str] | None,
    keep: Keep,
    *,
    fold: bool,
    passphrase: Passphrase | None = None,
    check: bool = False,
) -> Pruned:
    """Remove what ``keep`` does not keep, domain by domain. Nothing is changed with ``check``.

    One domain's failure does not stop the others; it is raised at the end, with what was done in its facts.
    """
    if not keep:
        raise InvalidInput(
            "No keep option is given, or all are 0, and that would remove every point",
            advice="Give at least one of keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly and keep_yearly",
        )
    repository = open_repository(path)
    pruned, failures = Pruned(), []
    for subject in _subjects(connection, repository, domains):
        try:
            _prune_domain(
                connection, uri, repository, subject, keep, pruned, fold=fold, passphrase=passphrase, check=check
            )
        except VmkeeperError as error:
            failures.append((subject, error))
    if failures:
        subject, first = failures[0]
        raise VmkeeperError(
            "; ".join(f"{one.name}: {error.problem}" for one, error in failures),
            state=f"{first.state} The other domains are done." if first.state else "The other domains are done.",
            advice=first.advice,
            **pruned.as_result(),
        ) from first
    return pruned


def _subjects(connection: Any, repository: Repository, domains: Sequence[str] | None) -> list[removal.Subject]:
    if domains is None:
        return [removal.subject_of(connection, repository, uuid) for uuid in repository.domain_uuids()]
    found = {}
    for domain in domains:
        subject = removal.find_subject(connection, repository, domain)
        if subject is None or not os.path.isdir(repository.domain_directory(subject.uuid)):
            raise NotFound(
                f"There is no point of domain {domain!r} in {repository.path}",
                advice="backup_info lists what there is",
                domain=domain,
            )
        found[subject.uuid] = subject
    return list(found.values())


def _prune_domain(
    connection: Any,
    uri: str,
    repository: Repository,
    subject: removal.Subject,
    keep: Keep,
    pruned: Pruned,
    *,
    fold: bool,
    passphrase: Passphrase | None,
    check: bool,
) -> None:
    earlier = _stored(repository, subject.uuid)
    with removal.alone(uri, repository, subject, "applying a retention policy", check=check) as finished:
        history = repository.history(subject.uuid)
        plan = _plan(repository, subject, history, keep, fold=fold)
        pruned.warnings += _warnings(subject, history, plan)
        done = removal.remove_points(
            connection,
            repository,
            subject,
            history,
            [point.id for point in plan.removed],
            passphrase=passphrase,
            check=check,
        )
        pruned.kept += plan.kept
        pruned.removed += [point.as_result() for point in reversed((*finished, *done.points))]
        if check:
            pruned.freed += done.most_freed + _beside_images(repository, history, done)
        else:
            pruned.freed += max(0, earlier - _stored(repository, subject.uuid))


def _plan(repository: Repository, subject: removal.Subject, history: History, keep: Keep, *, fold: bool) -> Plan:
    damaged = {
        point.id: problem
        for point in history.points
        if (problem := listing.trouble(repository, history, point)) is not None
    }
    return plan_retention(
        history.points,
        keep,
        damaged=damaged,
        grounds=repository.grounds(subject.uuid, history.broken),
        fold=fold,
    )


def _warnings(subject: removal.Subject, history: History, plan: Plan) -> list[str]:
    told = [f"{subject.name}: point {one.id} is damaged and stays: {one.problem}" for one in history.broken]
    told += [f"{subject.name}: point {one.point.id} is {one.why}" for one in plan.kept if one.why.startswith("damaged")]
    return told


def _stored(repository: Repository, domain_uuid: str) -> int:
    """Bytes that the directory of a domain takes."""
    return _taken(repository.domain_directory(domain_uuid))


def _beside_images(repository: Repository, history: History, removal_plan: RemovalPlan) -> int:
    """Bytes of everything but images (sums, manifests, proofs) in the points that go, or are described anew."""
    touched = {point.id for point in removal_plan.points} | {merge.point for merge in removal_plan.merges}
    return sum(
        _taken(repository.point_directory(point.domain_uuid, point.id), without={disk.file for disk in point.disks})
        for point in (*history.points, *history.going)
        if point.id in touched
    )


def _taken(directory: str, *, without: Collection[str] = ()) -> int:
    """Bytes that the files below a directory take on their filesystem."""
    return sum(
        os.lstat(os.path.join(where, name)).st_blocks * 512
        for where, _directories, names in os.walk(directory)
        for name in names
        if name not in without
    )
