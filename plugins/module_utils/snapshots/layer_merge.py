# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One run of layers of one disk becomes one layer: committed or pulled, by the running guest or offline.

Each function looks at what is true first and does what is left to do, so that an interrupted merge is finished by doing it
again.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from .._errors import LibvirtFailed, Refused, VmkeeperError
from ..hypervisor import block_jobs, chain, qemu_img
from ..hypervisor.domain_model import Domain, Layer, read_domain
from ..hypervisor.image_header import BadHeader, read_qcow2
from ..safety.host_graph import canonical, openers
from .merge_plan import Merge
from .model import read_snapshots
from .remains import put_definition_on


@dataclass(frozen=True)
class LiveRun:
    """A run in the chain of a running guest, by the names that libvirt has for its layers."""

    top: str
    base: str
    active: bool


def live_run(handle: Any, merge: Merge) -> LiveRun | None:
    """The run as the running guest has it; None where it does not run on it, or not on all of it any more."""
    disk = read_domain(handle).disk(merge.target)
    if disk is None or not handle.isActive():
        return None
    same = {canonical(layer.path): layer.path for layer in disk.chain if layer.path}
    top, base = same.get(canonical(merge.top)), same.get(canonical(merge.base))
    if top is None or base is None:
        return None
    return LiveRun(top, base, canonical(disk.path or "") == canonical(merge.top))


def commit(handle: Any, merge: Merge, *, bandwidth: int = 0, seconds: float | None = None, done: bool = False) -> None:
    """Merge the run, in whatever way is right now; ``seconds`` limits the wait for a live job, which goes on all the same.

    ``bandwidth`` in bytes per second, 0 for no limit.  ``done``: it is known to have been merged before.

    Raises :class:`Refused` where nobody stands on the run any more, and not on what it would have become either: then it is
    not known to be merged, and its files may be the only copy.
    """
    if merge.pull:
        _pull(handle, merge, bandwidth, seconds)
        return
    found = live_run(handle, merge)
    if found is not None and found.active:
        block_jobs.commit_active(handle, merge.target, found.base, bandwidth=bandwidth, seconds=seconds)
        return
    if found is not None:
        block_jobs.commit_intermediate(
            handle, merge.target, found.base, found.top, bandwidth=bandwidth, seconds=seconds
        )
        return
    if is_merged(handle, merge):
        return  # by QEMU, or by a run that was interrupted
    if _still_refers(handle, merge):
        _commit_offline(merge, bandwidth)
    elif not done:
        raise Refused(
            f"Disk {merge.target!r} of domain {handle.name()!r} stands neither on {merge.top}, which is to be committed, nor on"
            f" {merge.base} below it",
            state=f"{merge.top} was not committed, and all files of this disk are kept.",
            advice="If the disk was detached or given another image, run this again, which leaves that file alone",
        )


def _pull(handle: Any, merge: Merge, bandwidth: int, seconds: float | None) -> None:
    """Copy what the run holds into its top, which then stands on what its base stood on."""
    if handle.isActive():
        below = None
        if merge.below is not None:
            disk = read_domain(handle).disk(merge.target)
            paths = [layer.path for layer in disk.chain if layer.path] if disk is not None else []
            below = next((path for path in paths if canonical(path) == canonical(merge.below)), merge.below)
        block_jobs.pull(handle, merge.target, merge.base, below, bandwidth=bandwidth, seconds=seconds)
        return
    # The guest ended meanwhile. The same offline: content seen through the top is equal at every instant.
    if _backing_of(merge.top) == (canonical(merge.below) if merge.below else None):
        return
    _wait_for_qemu_img(merge.top)
    onto = ["-b", merge.below, "-F", merge.below_format or "raw"] if merge.below else ["-b", ""]
    qemu_img.run(["rebase", "-q", "-f", "qcow2", *onto, merge.top], doing=f"Copying {merge.base} into {merge.top}")


def _still_refers(handle: Any, merge: Merge) -> bool:
    """Whether anybody still reads the run through its top."""
    top = canonical(merge.top)
    if not os.path.exists(top):
        return False
    disks = [model.disk(merge.target) for model in _definitions(handle)]
    named = any(disk is not None and disk.path is not None and canonical(disk.path) == top for disk in disks)
    linked = any(_backing_of(path) == top for path in merge.above)
    held = any(
        part.base is not None and canonical(part.base) == top
        for snapshot in read_snapshots(handle)
        for part in snapshot.captured
    )
    return named or linked or held


def _backing_of(path: str) -> str | None:
    try:
        layers = chain.follow(Layer(path, "qcow2"))
    except VmkeeperError:
        return None
    return canonical(layers[1].path) if len(layers) > 1 and layers[1].path else None


def _commit_offline(merge: Merge, bandwidth: int) -> None:
    doing = f"Committing {merge.top} into {merge.base}"
    for path in (*merge.merged, merge.base):
        _wait_for_qemu_img(path)
    # qemu-img records the commit in enabled bitmaps of the base and loses those that only the overlay has: they are put
    # aside, and what the overlay's had recorded is added to them.
    kept = _merge_bitmaps(merge) if merge.base_format == "qcow2" else {}
    arguments = ["commit", "-q", "-f", "qcow2", "-d"]
    if bandwidth:
        arguments += ["-r", str(bandwidth)]
    qemu_img.run([*arguments, "-b", merge.base, merge.top], doing=doing)
    for name, sources in kept.items():
        for source in sources:
            qemu_img.run(
                ["bitmap", "--merge", name, "-b", source, "-F", "qcow2", "-f", "qcow2", merge.base, name],
                doing=f"Keeping the dirty bitmap {name} of {source}",
            )
        qemu_img.run(
            ["bitmap", "--enable", "-f", "qcow2", merge.base, name], doing=f"Enabling the dirty bitmap {name} again"
        )


def _wait_for_qemu_img(path: str) -> None:
    """A run that was killed may have left the qemu-img that it had started at work on the same image."""
    while any("qemu-img" in reader.name for reader in openers([path], besides="").get(canonical(path), ())):
        time.sleep(0.1)


def _merge_bitmaps(merge: Merge) -> dict[str, list[str]]:
    """Disable, or add disabled, in the base every recording bitmap of the run; returns name -> images that have it."""
    found: dict[str, list[str]] = {}
    for path in merge.merged:
        with contextlib.suppress(OSError, BadHeader):
            for bitmap in read_qcow2(path).bitmaps:
                if bitmap.enabled and not bitmap.in_use:
                    found.setdefault(bitmap.name, []).append(path)
    if not found:
        return {}
    have = {bitmap.name: bitmap for bitmap in read_qcow2(merge.base).bitmaps}
    for name in list(found):
        if name in have and have[name].in_use:
            del found[name]  # broken by an unclean stop: it proves nothing, and merging into it fails
            continue
        arguments = ["--disable"] if name in have else ["--add", "--disable"]
        qemu_img.run(
            ["bitmap", *arguments, "-f", "qcow2", merge.base, name],
            doing=f"Putting the dirty bitmap {name} of {merge.base} aside",
        )
    return found


# --- who stands on it ------------------------------------------------------------------------------------------------


def relink(handle: Any, merge: Merge) -> None:
    """Everything that stood on the top stands on the base: other images, and the definition of the next start."""
    live = {
        canonical(layer.path)
        for disk in read_domain(handle).disks
        for layer in disk.chain
        if layer.path and handle.isActive()
    }
    for path in () if merge.pull else merge.above:
        if canonical(path) in live or not os.path.exists(path):
            continue  # QEMU writes the links of its own chain
        if _backing_of(path) == canonical(merge.top):
            qemu_img.run(
                ["rebase", "-q", "-u", "-f", "qcow2", "-F", merge.base_format, "-b", merge.base, path],
                doing=f"Putting {path} on {merge.base}",
            )
    if handle.isPersistent():
        _redefine(handle, merge)


def _redefine(handle: Any, merge: Merge) -> None:
    """Take the run out of the definition of the next start, which may name it as its image or in a recorded chain.

    A chain recorded there is believed by libvirt at the next start, whatever the headers say.
    """
    disk = read_domain(handle, inactive=True).disk(merge.target)
    gone = {canonical(path) for path in merge.gone}
    if (
        disk is None
        or disk.active is None
        or not any(layer.path and canonical(layer.path) in gone for layer in disk.chain)
    ):
        return
    on_run = canonical(disk.path or "") in gone
    layer = merge.remains if on_run else disk.active
    put_definition_on(handle, {merge.target: layer})


def verify(handle: Any, merge: Merge) -> None:
    """Neither the running guest, nor its next start, nor any header may name what is about to go."""
    gone = {canonical(path) for path in merge.gone}
    for model in _definitions(handle):
        disk = model.disk(merge.target)
        layers = [] if disk is None else [*disk.chain, *(chain.follow(disk.active) if disk.active else ())]
        left = [layer.path for layer in layers if layer.path and canonical(layer.path) in gone]
        if left:
            raise LibvirtFailed(
                f"Disk {merge.target!r} of domain {model.name!r} still stands on {left[0]} after the commit",
                state="No file was removed; the guest's data is whole.",
                advice="Run this again",
            )


def _definitions(handle: Any) -> list[Domain]:
    """The domain as it is, and as it will start next."""
    model = read_domain(handle)
    return [model, read_domain(handle, inactive=True)] if model.persistent else [model]


def commits_below(handle: Any, merge: Merge) -> bool:
    """Whether a commit below the active layer is under way on the disk."""
    job = block_jobs.job_of(handle, merge.target)
    return job is not None and job["type"] == "commit"


def is_merged(handle: Any, merge: Merge) -> bool:
    """Whether the disk stands on what the run became, and no longer on what goes: the live chain says so, or the headers."""
    model = read_domain(handle)
    disk = model.disk(merge.target)
    if disk is None or disk.active is None:
        return False
    try:
        layers = disk.chain if model.state.active else chain.follow(disk.active)
    except VmkeeperError:
        return False  # a chain that cannot be followed proves nothing
    used = {canonical(layer.path) for layer in layers if layer.path}
    return canonical(str(merge.remains.path)) in used and not used & {canonical(path) for path in merge.gone}
