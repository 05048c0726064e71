# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Take back a snapshot that was just cut: its overlays are committed into their bases and everything it made goes.

Every step looks at what is true first, so it can be repeated after an interruption at any point.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import Refused
from ..hypervisor import apparmor, block_jobs, chain, definition, qemu_img
from ..hypervisor.domain_model import Domain, read_domain
from ..safety import places, processes
from ..safety.host_graph import canonical, read_graph
from .records import forget_snapshot
from .remains import layer_at

#: Ends of the names of an overlay that is being removed, and of one that is being merged.
_ASIDE = ".removed"
_MERGING = ".merging"


class CannotTakeBack(Refused):
    """The running guest may not write its bases: nothing was written, and the cut is as whole as it was."""


def take_back(handle: Any, name: str, overlays: Sequence[Mapping[str, Any]], beside: Sequence[str]) -> None:
    """``overlays`` are ``{target, path, base, base_format}`` as planned; ``name`` is the snapshot's.

    ``beside`` are the other files that it made: memory and UEFI variables.  Raises :class:`CannotTakeBack` before anything is
    written.
    """
    domain = read_domain(handle)
    in_use = [overlay for overlay in overlays if _stands_on(domain.disk(overlay["target"]), overlay["path"])]
    if in_use and domain.managed_save:
        raise Refused(
            f"Domain {domain.name!r} was saved while an interrupted snapshot {name!r} was unsettled; its saved RAM needs the overlays",
            state="Everything was kept.",
            advice="Start it, then run this again",
        )
    _merge_strays(handle, domain, [overlay for overlay in overlays if overlay not in in_use])
    if in_use:
        _refuse_shared(handle, in_use)
        if domain.state.active:
            _commit_live(handle, in_use)
        else:
            _commit_offline(handle, in_use)
    forget_snapshot(handle, name)
    remove_files(handle, [*(overlay["path"] for overlay in overlays), *beside])


def _commit_live(handle: Any, overlays: Sequence[Mapping[str, Any]]) -> None:
    denied = apparmor.read_denied(handle)
    refused = next((overlay["base"] for overlay in overlays if canonical(overlay["base"]) in denied), None)
    problem = f"AppArmor lets the running guest of domain {handle.name()!r} only read {refused}" if refused else None
    for number, overlay in enumerate(overlays):
        try:
            if problem is None:
                block_jobs.commit_active(handle, overlay["target"], overlay["base"])
        except block_jobs.NotBegun as error:
            if number:
                raise
            problem = error.problem
        if problem is not None:
            raise CannotTakeBack(
                f"The layers of an interrupted snapshot cannot be merged back: {problem}",
                state="The guest runs, and stands on its overlays.",
                advice="Shut it down, then run this again",
            )


def _merge_strays(handle: Any, domain: Domain, strays: Sequence[Mapping[str, Any]]) -> None:
    """Bring home what a guest wrote to overlays that libvirt does not know.

    A libvirtd that is killed after QEMU switched to the overlays, and before it wrote that down, comes back believing that
    the guest writes to the bases.  Then the overlays hold all that the guest wrote since; without them it is lost.
    """
    graph = read_graph(handle.connect())
    for overlay in strays:
        path, base = overlay["path"], overlay["base"]
        merging = path + _MERGING
        resumed = os.path.lexists(merging)
        if graph.readers(path) or not (resumed or os.path.lexists(path)):
            continue
        holders = processes.holders_of(path)
        if holders and domain.state.active:
            raise Refused(
                f"QEMU (process {holders[0]}) writes disk {overlay['target']!r} of domain {domain.name!r} to {path},"
                f" and libvirt, which was interrupted while it switched, believes that it writes to {base}",
                state="The guest runs and nothing is lost; the file was kept.",
                advice="Shut the guest down from inside and run this again before it is started: what it wrote is then merged"
                f" into {base}. Started first, it would lose that",
            )
        if holders or not (resumed or chain.holds_data(path)):
            continue
        if domain.state.active or not (resumed or _younger(path, than=base)):
            raise Refused(
                f"{path} holds what the guest of domain {domain.name!r} wrote to disk {overlay['target']!r} while libvirt did"
                f" not know of it, and {base} has been written since",
                state="Both were kept.",
                advice=f"Look into {path} (qemu-img convert), then move it away and run this again",
            )
        _refuse_shared(handle, [overlay])
        if not resumed:
            os.rename(
                path, merging
            )  # the mark of a merge that was begun: it may be repeated, though the base is newer now
        _commit_file(merging, base)
        os.unlink(merging)


def _younger(path: str, *, than: str) -> bool:
    """Whether ``path`` was written last: nothing has written to ``than`` since the guest's writes went elsewhere."""
    return os.stat(path).st_mtime_ns >= os.stat(than).st_mtime_ns


def _commit_file(path: str, base: str) -> None:
    qemu_img.run(["commit", "-q", "-f", "qcow2", "-d", path], doing=f"Committing {path} into {base}")


def _stands_on(disk: Any, path: str) -> bool:
    return disk is not None and any(layer.path == path for layer in disk.chain[:1])


def _commit_offline(handle: Any, overlays: Sequence[Mapping[str, Any]]) -> None:
    for overlay in overlays:
        _commit_file(overlay["path"], overlay["base"])
    layers = {overlay["target"]: layer_at(overlay["base"], overlay["base_format"]) for overlay in overlays}
    definition.define(
        handle.connect(),
        definition.with_disk_layers(definition.persistent_xml(handle), layers),
        doing=f"Putting domain {handle.name()!r} back on its images",
        state="Its overlays are committed and still in its definition; run this again.",
    )


def _refuse_shared(handle: Any, overlays: Sequence[Mapping[str, Any]]) -> None:
    # What is being taken back is not a stranger to its own base, nor is the same under the name that it is merged by.
    own = [overlay["path"] + end for overlay in overlays for end in ("", _MERGING, _ASIDE)]
    graph = read_graph(handle.connect()).without_files(own)
    for overlay in overlays:
        others = graph.strangers(overlay["base"], handle.UUIDString())
        if others:
            raise Refused(
                f"{overlay['base']} is also read by {others[0]} and must not be written",
                state=f"Domain {handle.name()!r} keeps its overlay {overlay['path']}.",
                advice="Give one of the two an image of its own",
            )


def remove_files(handle: Any, paths: Sequence[str]) -> None:
    """Delete files that this operation made, unless anything still mentions or holds them."""
    graph = read_graph(handle.connect())
    for path in paths:
        readers = graph.readers(path)
        if not os.path.lexists(path) and not os.path.lexists(path + _ASIDE):
            continue
        # Renamed first: from then on nobody can open it by its name, and whoever did before is seen.
        aside = path + _ASIDE
        if not readers and os.path.lexists(path):
            os.rename(path, aside)
        holders = processes.holders_of(aside)
        if readers or holders:
            if holders:
                os.rename(aside, path)
            who = readers[0] if readers else f"process {holders[0]}"
            raise Refused(
                f"{path} is still in use by {who}",
                state="It was kept.",
                advice="See domain_info for what uses it, end that, then run this again",
            )
        places.unlink_quietly(aside)
        places.fsync_directory(os.path.dirname(path))
