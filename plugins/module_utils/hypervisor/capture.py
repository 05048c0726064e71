# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a snapshot, backup or export of a domain contains, and what it does not.

People lose what they kept on a disk that nobody told them was left out, so every part of a domain is either captured
or listed with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .._errors import InvalidInput, NotFound, Unsupported
from .domain_model import Disk, Domain

#: reason -> the sentence that a person reads
REASONS = {
    "transient": "its writes are discarded when the guest stops",
    "read-only": "the guest cannot write to it",
    "shareable": "other guests may write to it at the same time",
    "cdrom": "removable media",
    "floppy": "removable media",
    "snapshot-no": "the definition says snapshot='no'",
    "passthrough": "a host device is passed through",
    "host-shared": "it lives in the host's filesystem",
    "not-local": "it is not a local file or block device",
    "slice": "it is only a part (slice) of a file or device",
    "thin-lvm": "it is a thin LVM volume, which is not handled yet",
    "zfs": "it is a ZFS volume, which is not handled yet",
    "excluded": "the task left it out",
    "nvram": "UEFI variables are not part of it",
    "tpm": "TPM state is not part of it",
    "nvdimm": "persistent memory is not part of it",
}


@dataclass(frozen=True)
class LeftOut:
    """One part of a domain that is not captured: ``kind`` is disk, nvram, tpm, nvdimm, filesystem or hostdev."""

    kind: str
    name: str
    reason: str

    def as_result(self) -> dict[str, str]:
        """``{kind, name, reason, why}`` with the reason as a sentence."""
        return {**asdict(self), "why": REASONS[self.reason]}


@dataclass(frozen=True)
class Capture:
    """The disks that an operation takes, and everything that it leaves."""

    disks: tuple[Disk, ...]
    left_out: tuple[LeftOut, ...]

    def warning(self, domain: str) -> str | None:
        """One sentence for the user, or None when nothing that holds data was left out."""
        parts = [f"{part.name} ({part.reason})" for part in self.left_out if part.reason not in ("cdrom", "floppy")]
        if not parts:
            return None
        return f"{domain}: not captured: {', '.join(parts)}"


def _own_reason(disk: Disk) -> str | None:
    """Why this disk cannot or should not be captured, whatever the task asks; None when it can."""
    if disk.device in ("cdrom", "floppy"):
        return disk.device
    if disk.device == "lun":
        return "passthrough"
    if disk.transient:
        return "transient"
    if disk.readonly:
        return "read-only"
    if disk.shareable:
        return "shareable"
    if disk.kind not in ("file", "block", "volume") or disk.path is None:
        return "not-local"
    if disk.sliced:
        return "slice"
    return disk.storage


def choose(
    domain: Domain,
    *,
    disks: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    carries_nvram: bool = False,
) -> Capture:
    """Split a domain into what is captured and what is left out.

    ``disks`` names the only targets wanted (one with ``snapshot='no'`` is then taken: the task is more specific than
    the definition); naming one that cannot be captured is an error, not a silent omission.
    """
    existing = [disk.target for disk in domain.disks]
    for target in [*(disks or ()), *(exclude or ())]:
        if target not in existing:
            raise NotFound(
                f"Domain {domain.name!r} has no disk {target!r}",
                advice="Its disks are: " + (", ".join(existing) if existing else "none"),
                existing=existing,
            )
    both = sorted(set(disks or ()) & set(exclude or ()))
    if both:
        raise InvalidInput(
            f"disks and exclude_disks both name {', '.join(both)}", advice="Name each disk in one of them"
        )
    taken: list[Disk] = []
    left: list[LeftOut] = []
    for disk in domain.disks:
        reason = _own_reason(disk)
        if reason is not None and disks is not None and disk.target in disks:
            raise InvalidInput(
                f"Disk {disk.target!r} of domain {domain.name!r} cannot be captured: {REASONS[reason]}",
                advice="Remove it from disks",
                reason=reason,
            )
        if reason is None and disks is not None and disk.target not in disks:
            reason = "excluded"
        if reason is None and exclude is not None and disk.target in exclude:
            reason = "excluded"
        if reason is None and disk.snapshot == "no" and disks is None:
            reason = "snapshot-no"
        if reason is None:
            taken.append(disk)
        else:
            left.append(LeftOut("disk", disk.target, reason))
    if domain.nvram is not None and not carries_nvram:
        left.append(LeftOut("nvram", domain.nvram.path, "nvram"))
    if domain.nvram_elsewhere is not None:
        left.append(LeftOut("nvram", domain.nvram_elsewhere, "nvram"))
    if domain.has_tpm:
        left.append(LeftOut("tpm", "tpm", "tpm"))
    left += [LeftOut("nvdimm", path, "nvdimm") for path in domain.persistent_memory]
    left += [LeftOut("filesystem", share.target or share.source, "host-shared") for share in domain.shares]
    left += [LeftOut("hostdev", name, "passthrough") for name in domain.hostdevs]
    return Capture(tuple(taken), tuple(left))


def require_local_chains(domain: Domain, disks: Sequence[Disk]) -> None:
    """Raise :class:`Unsupported` where a disk, of which no QEMU of the domain is to be asked, stands on what only that reads."""
    for disk in disks:
        if any(layer.path is None for layer in disk.chain):
            raise Unsupported(
                f"Disk {disk.target!r} of domain {domain.name!r} stands on an image that is no local file or device, which only its"
                " QEMU reads, and the domain is not running",
                advice="Start it first, or leave the disk out with exclude_disks",
            )
