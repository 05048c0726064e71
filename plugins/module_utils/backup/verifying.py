# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prove that a point restores: every stored byte that it needs is read and compared; its images are whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._errors import InvalidInput, VmkeeperError
from ..hypervisor import image_node, qemu_img
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..hypervisor.image_node import Image, Keys, Passphrase
from ..safety import places
from . import digests, manifest, stored
from .listing import Found, find_again
from .manifest import Point
from .repository import Repository

LEVELS = ("digest", "structure", "boot")

#: In the point's directory: what the guest's screen showed at the last boot proof.
SCREENSHOT = "screenshot.png"


class NotProved(VmkeeperError):
    """A point that does not restore; ``facts['findings']`` say why."""

    kind = "not_proved"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``disk`` and ``point`` say where; None where it concerns the point as a whole."""

    point: str
    disk: str | None
    problem: str

    def as_result(self) -> dict[str, Any]:
        """``{point, disk, problem}``."""
        return {"point": self.point, "disk": self.disk, "problem": self.problem}


@dataclass(frozen=True)
class BootOutcome:
    """How a boot went. ``problem`` is None when it is proved; ``seconds`` from start to proof; ``screenshot`` is PNG."""

    problem: str | None
    seconds: float | None = None
    screenshot: bytes | None = None


def verify(repository: Repository, found: Found, level: str, passphrase: Passphrase | None = None) -> list[Finding]:
    """All findings; none means proved, as far as :func:`not_checked` does not say otherwise.

    Each level includes those before it, and ``boot`` is done elsewhere.  Call it with the points' lock shared.
    Raises :class:`InvalidInput` for a passphrase
    that is wrong, or that alone could prove anything.
    """
    findings = _check_files(repository, found.point)
    for disk in found.point.disks:
        key = _key_of(repository, found, disk.target, passphrase)
        findings += _check_disk(repository, found, disk.target, level, key)
    return findings


def not_checked(found: Found, passphrase: Passphrase | None) -> list[str]:
    """Sentences about what cannot be looked at without a passphrase."""
    return [
        f"disk {disk.target} is encrypted and no passphrase was given: its files are proved to be what was written,"
        " and what they hold was not looked at"
        for disk in found.point.disks
        if disk.encryption is not None and passphrase is None
    ]


def _key_of(repository: Repository, found: Found, target: str, passphrase: Passphrase | None) -> Passphrase | None:
    """The passphrase, if the disk needs one."""
    try:
        lineage = found.history.lineage(found.point, target)
    except VmkeeperError:
        return None
    if not stored.is_encrypted(lineage, target):
        return None
    if passphrase is not None:
        if not any(check_link(repository, holder, target) for holder in lineage):
            stored.require_opening(
                repository, found.point, [target], passphrase, advice="Give the one that it was backed up with"
            )
        return passphrase
    folded = [point.id for point in lineage if (disk := point.disk(target)) is not None and disk.metadata is None]
    if folded:
        raise InvalidInput(
            f"Disk {target!r} of point {found.point.id} is encrypted, and point {folded[0]} below it was folded: only its"
            " content can prove it",
            advice="Give passphrase",
        )
    return None


def _check_files(repository: Repository, point: Point) -> list[Finding]:
    findings = []
    for name, digest in point.files.items():
        path = os.path.join(repository.point_directory(point.domain_uuid, point.id), os.path.basename(name))
        try:
            if digests.file_digest(path) != digest:
                findings.append(Finding(point.id, None, f"{path} is not what was written"))
        except OSError as error:
            findings.append(Finding(point.id, None, f"{path} cannot be read: {error.strerror}"))
    return findings


def _check_disk(
    repository: Repository, found: Found, target: str, level: str, passphrase: Passphrase | None
) -> list[Finding]:
    point = found.point
    try:
        lineage = found.history.lineage(point, target)
    except VmkeeperError as error:
        return [Finding(point.id, target, error.problem)]
    findings: list[Finding] = []
    for holder in lineage:
        findings += check_link(repository, holder, target)
    if findings:
        return findings  # what stands on a broken link cannot be read any further
    if level != "digest":
        for holder in lineage:
            findings += _check_structure(repository, holder, target, passphrase)
    try:
        return findings + _check_content(repository, lineage, target, passphrase)
    except (VmkeeperError, OSError, ValueError) as error:
        problem = error.problem if isinstance(error, VmkeeperError) else str(error)
        return [*findings, Finding(point.id, target, problem)]


image_path = stored.image_path


def check_link(repository: Repository, point: Point, target: str) -> list[Finding]:
    """The header, read by our own parser before any tool follows what it says."""
    path = image_path(repository, point, target)
    disk = point.disk(target)
    if disk is None:
        return [Finding(point.id, target, f"point {point.id} does not hold it")]
    try:
        header = read_qcow2(path)
    except FileNotFoundError:
        return [Finding(point.id, target, f"{path} is missing")]
    except (OSError, BadHeader) as error:
        return [Finding(point.id, target, f"{path}: {error}")]
    expected = disk.link(disk.parent)
    problems = []
    if header.backing_file != expected:
        problems.append(f"it stands on {header.backing_file!r} and not on {expected!r}")
    if header.has_data_file:
        problems.append("it names a data file that it should not have")
    if header.encrypted != (disk.encryption is not None):
        problems.append("it is encrypted" if header.encrypted else "it is not encrypted as the manifest says")
    if header.virtual_size != disk.virtual_size:
        problems.append(f"its size is {header.virtual_size} and not {disk.virtual_size}")
    if header.corrupt:
        problems.append("QEMU marked it corrupt")
    return [Finding(point.id, target, f"{path}: {problem}") for problem in problems]


def _check_structure(repository: Repository, point: Point, target: str, passphrase: Passphrase | None) -> list[Finding]:
    disk = point.disk(target)
    if disk is not None and disk.encryption is not None and passphrase is None:
        return []
    image = stored.image_of(repository, point, target, passphrase)
    try:
        with Keys() as keys:
            name = image_node.as_name(image_node.node([image], keys))
            qemu_img.run(["check", "-q", name], doing=f"Checking {image.path}", keys=keys)
    except qemu_img.ImageToolFailed as error:
        return [Finding(point.id, target, error.problem)]
    return []


def _check_content(
    repository: Repository, lineage: list[Point], target: str, passphrase: Passphrase | None
) -> list[Finding]:
    point = lineage[0]
    findings = []
    for holder in lineage:
        disk, path = holder.disk(target), image_path(repository, holder, target)
        if disk is not None and disk.metadata is not None:
            plain = () if disk.coded else digests.extents_of([Image(path)])
            if digests.metadata_digest(path, plain) != disk.metadata:
                what = "it is" if disk.coded else "its tables are"
                findings.append(Finding(holder.id, target, f"{path}: {what} not what was written"))
    if findings or (passphrase is None and stored.is_encrypted(lineage, target)):
        return findings
    layers = stored.images_of(repository, lineage, target, passphrase)
    wrong = _differences(layers, chain_sums(repository, lineage, target))
    if wrong:
        findings.append(
            Finding(
                point.id,
                target,
                f"{layers[0].path}: the content of {len(wrong)}{'+' if len(wrong) == 16 else ''} MiB differs from what was"
                f" backed up, first at offset {wrong[0]} MiB",
            )
        )
    return findings


def _differences(layers: list[Image], sums: digests.Sums) -> list[int]:
    extents = digests.extents_of(layers)
    with digests.content_of(layers, extents) as content:
        return digests.differences(sums, content, extents)


def chain_sums(repository: Repository, lineage: list[Point], target: str) -> digests.Sums:
    """The digests of a disk at ``lineage[0]``: those of its layers laid over each other."""

    def read(point: Point) -> digests.Sums:
        directory = repository.point_directory(point.domain_uuid, point.id)
        return digests.read_sums(os.path.join(directory, f"{target}.sums"))

    sums = read(lineage[-1])
    for point in reversed(lineage[:-1]):
        sums = read(point).over(sums)
    return sums


def check_restored(image: Image, sums: digests.Sums) -> list[int]:
    """Indexes of chunks of a flattened image that are not what was backed up."""
    return _differences([image], sums)


def record(
    repository: Repository,
    found: Found,
    level: str,
    findings: list[Finding],
    unseen: list[str],
    boot: BootOutcome | None = None,
) -> dict[str, Any]:
    """Keep the outcome beside the manifest, and return it. Raises OSError where the repository cannot be written."""
    directory = repository.point_directory(found.point.domain_uuid, found.point.id)
    outcome: dict[str, Any] = {
        "format": 1,
        "at": manifest.now_utc().isoformat(timespec="seconds"),
        "level": level,
        "verified": not findings,
        "findings": [finding.as_result() for finding in findings],
        "not_checked": unseen,
    }
    if boot is not None:
        screenshot = os.path.join(directory, SCREENSHOT)
        if boot.screenshot is not None:
            places.write_file(screenshot, boot.screenshot)
        else:
            places.unlink_quietly(screenshot)
        outcome["boot_seconds"] = boot.seconds
        outcome["screenshot"] = SCREENSHOT if boot.screenshot is not None else None
    places.write_json(os.path.join(directory, "verify.json"), outcome)
    return outcome


@dataclass(frozen=True)
class Proof:
    """A point that is proved. ``boot_seconds`` and ``screenshot`` (a path) are None below level ``boot``.

    ``not_checked`` are sentences about what could not be looked at; ``not_kept`` says why there is no record of it.
    """

    verified: bool | None
    boot_seconds: float | None = None
    screenshot: str | None = None
    not_checked: tuple[str, ...] = ()
    not_kept: str | None = None


def prove(
    repository: Repository,
    found: Found,
    level: str,
    passphrase: Passphrase | None = None,
    *,
    boot: Callable[..., BootOutcome | None] | None = None,
    check: bool = False,
) -> Proof:
    """Verify a point, keep the outcome, and raise :class:`NotProved` on any finding.

    ``boot`` boots it, and is asked only for a point whose images are whole; it takes the point as it was found under the lock, and
    ``check``.  With that nothing is kept and nothing booted, so that ``verified`` is None at level ``boot``.
    """
    booted, kept, not_kept = None, None, None
    with repository.locked(found.point.domain_uuid, f"verifying {found.point.id}", shared=True):
        found = find_again(repository, found)
        findings = verify(repository, found, level, passphrase)
        unseen = not_checked(found, passphrase)
        if boot is not None and not findings:
            booted = boot(found, check=check)
            if booted is not None and booted.problem is not None:
                findings = [Finding(found.point.id, None, booted.problem)]
        if not check:
            try:
                kept = record(repository, found, level, findings, unseen, booted)
            except OSError as error:
                # Hours of reading may lie behind; a full or read-only repository takes nothing from what they have shown.
                not_kept = f"the outcome of this proof could not be kept in {repository.path}, which still shows the one before: {error}"
    directory = repository.point_directory(found.point.domain_uuid, found.point.id)
    screenshot = os.path.join(directory, SCREENSHOT) if kept and kept.get("screenshot") else None
    if findings:
        raise NotProved(
            f"Point {found.point.id} of domain {found.point.domain!r} is not proved: "
            + "; ".join(finding.problem for finding in findings[:4]),
            state="Nothing of the point was changed." + (f" {not_kept[0].upper()}{not_kept[1:]}" if not_kept else ""),
            advice="Look at the storage below the repository, and make a new full; other points may still be good"
            if booted is None
            else "Look at the screenshot; its images are what was backed up, so see whether the guest itself still boots",
            verified=False,
            id=found.point.id,
            level=level,
            findings=[finding.as_result() for finding in findings],
            boot_seconds=None,
            screenshot=screenshot,
        )
    return Proof(
        verified=None if check and boot is not None else True,
        boot_seconds=booted.seconds if booted is not None else None,
        screenshot=screenshot,
        not_checked=tuple(unseen),
        not_kept=not_kept,
    )
