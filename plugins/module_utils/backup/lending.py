# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let a guest stand on a point's images as they lie in the repository, which stays as it is: :mod:`..safety.views`."""

from __future__ import annotations

import os
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import Refused
from ..hypervisor import libvirt_secret
from ..hypervisor.domain_model import Layer
from ..hypervisor.image_node import Passphrase
from ..safety import places, views
from . import stored, verifying
from .listing import Found
from .repository import Repository, is_there


@dataclass(frozen=True)
class Loan:
    """What is lent. ``chains`` holds each disk's files from the point down to its full, relative to ``source``.

    ``name`` is that of the view; ``sizes`` are the disks' virtual sizes in bytes.  ``secret`` is the UUID of the libvirt secret
    that opens the ``encrypted`` ones of these files, None where there are none.
    """

    name: str
    repository: str
    repository_uuid: str
    source: str
    chains: Mapping[str, Sequence[str]]
    sizes: Mapping[str, int]
    encrypted: Sequence[str] = ()
    secret: str | None = None

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

    def secrets(self) -> dict[str, str]:
        """The secret of each encrypted layer, by its path as the guest sees it."""
        return {os.path.join(self.view, file): self.secret for file in self.encrypted} if self.secret else {}


def plan_loan(repository: Repository, found: Found, targets: Sequence[str], name: str) -> Loan:
    """What has to be lent for ``targets``; raises where an image is not what its point says."""
    point = found.point
    chains: dict[str, list[str]] = {}
    encrypted: list[str] = []
    sizes: dict[str, int] = {}
    for target in targets:
        lineage = found.history.lineage(point, target)
        for holder in lineage:
            findings = verifying.check_link(repository, holder, target)
            if findings:
                raise Refused(f"Point {point.id} cannot be restored: {findings[0].problem}")
        chains[target] = [os.path.join(holder.id, f"{target}.qcow2") for holder in lineage]
        encrypted += [file for file, holder in zip(chains[target], lineage) if stored.is_encrypted([holder], target)]
        disk = point.disk(target)
        sizes[target] = disk.virtual_size if disk is not None else 0
    source = repository.domain_directory(point.domain_uuid)
    secret = str(uuids.uuid4()) if encrypted else None
    return Loan(name, repository.path, repository.uuid, source, chains, sizes, encrypted, secret)


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


def let_open(connection: Any, loan: Loan, passphrase: Passphrase | None, purpose: str) -> None:
    """Let libvirt open what is encrypted, by its memory only. Without the ``passphrase`` it must know it already.

    Raises :class:`Refused` where it does not.
    """
    if loan.secret is None:
        return
    if passphrase is not None:
        libvirt_secret.define(connection, loan.secret, passphrase, f"vmkeeper.libvirt: {purpose}", ephemeral=True)
    elif not libvirt_secret.exists(connection, loan.secret):
        raise Refused(
            "What the guest's disks still stand on in the repository is encrypted, and libvirt does not know the passphrase any more",
            state="What the guest has written is safe in its own images.",
            advice="Run the restore again with its passphrase",
        )


def _require_repository(loan: Loan) -> None:
    if not is_there(loan.repository, loan.repository_uuid):
        raise Refused(
            f"The repository {loan.repository}, which the guest's disks still stand on, is not there",
            state="What the guest has written is safe in its own images.",
            advice="Mount the repository, then run this again",
        )
