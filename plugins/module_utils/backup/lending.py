# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let a guest stand on a point's images as they lie in the repository, which stays as it is: :mod:`..safety.views`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import Refused, Unsupported
from ..hypervisor.domain_model import Layer
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety import places, views
from . import verifying
from .listing import Found
from .repository import Repository


@dataclass(frozen=True)
class Loan:
    """What is lent. ``chains`` holds each disk's files from the point down to its full, relative to ``source``.

    ``name`` is that of the view; ``sizes`` are the disks' virtual sizes in bytes.
    """

    name: str
    repository: str
    repository_uuid: str
    source: str
    chains: Mapping[str, Sequence[str]]
    sizes: Mapping[str, int]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Loan:
        """From a journal."""
        return cls(**value)

    @property
    def view(self) -> str:
        """Where the guest sees it."""
        return views.path_of(self.name)

    def layers(self) -> dict[str, tuple[Layer, ...]]:
        """Each disk's layers as the guest sees them, topmost first."""
        return {
            target: tuple(Layer(os.path.join(self.view, file), "qcow2") for file in files)
            for target, files in self.chains.items()
        }


def plan_loan(repository: Repository, found: Found, targets: Sequence[str], name: str) -> Loan:
    """What has to be lent for ``targets``; raises where an image is not what its point says, or is encrypted."""
    point = found.point
    chains: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for target in targets:
        lineage = found.history.lineage(point, target)
        for holder in lineage:
            _refuse_encrypted(verifying.image_path(repository, holder, target), point.id)
            findings = verifying.check_link(repository, holder, target)
            if findings:
                raise Refused(f"Point {point.id} cannot be restored: {findings[0].problem}")
        chains[target] = [os.path.join(holder.id, f"{target}.qcow2") for holder in lineage]
        disk = point.disk(target)
        sizes[target] = disk.virtual_size if disk is not None else 0
    source = repository.domain_directory(point.domain_uuid)
    return Loan(name, repository.path, repository.uuid, source, chains, sizes)


def _refuse_encrypted(path: str, identifier: str) -> None:
    try:
        encrypted = read_qcow2(path).encrypted
    except (OSError, BadHeader):
        return  # told by the check of the link
    if encrypted:
        raise Unsupported(
            f"Point {identifier} is encrypted, and a guest cannot stand on it as it lies: each layer would need the passphrase as a"
            " libvirt secret for as long as it does",
            advice="Restore it with mode: copy; prove it with level: structure and its passphrase",
        )


def lend(loan: Loan, owner: tuple[int, int]) -> None:
    """Open the view and see that QEMU's user can read all that is lent. Open already: only looked at."""
    _require_repository(loan)
    views.open_view(loan.name, loan.source, owner)
    for layers in loan.layers().values():
        for layer in layers:
            if not places.readable_by(layer.path or "", owner):
                raise Refused(
                    f"QEMU's user (uid {owner[0]}) cannot read {views.origin_of(os.path.realpath(layer.path or ''))} through {loan.view}",
                    advice="The images of a repository belong to root; chown root:root that file",
                )


def _require_repository(loan: Loan) -> None:
    marker = os.path.join(loan.repository, "repository.json")
    try:
        content = places.read_json(marker)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("uuid") != loan.repository_uuid:
        raise Refused(
            f"The repository {loan.repository}, which the guest's disks still stand on, is not there",
            state="What the guest has written is safe in its own images.",
            advice="Mount the repository, then run this again",
        )
