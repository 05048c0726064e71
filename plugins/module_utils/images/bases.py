# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bases of linked disks: made by the first launch of an image, read by all, and of no use when the last of them is gone.

They lie below the directory of the disks.  No definition names that directory any more when the last linked domain is gone, so
it is remembered.  Imports hold its lock shared with each other, and whoever removes a base holds it alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from contextlib import AbstractContextManager
from typing import Any
from xml.etree import ElementTree

from .._errors import Busy
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import explaining, of_every_domain
from ..safety import host_graph, locks, places
from ..safety.host_graph import HostGraph, Reader
from .bundle import lock_key

_DIRECTORY = ".vmkeeper-bases"
_NAME = re.compile(r"[0-9a-f]{64}-[a-z0-9]+\.qcow2")


def directory_below(directory: str) -> str:
    """Where the bases of disks in ``directory`` are."""
    return os.path.join(directory, _DIRECTORY)


def path_of(directory: str, digest: str, target: str) -> str:
    """The base of one disk of the image with that digest, for disks in ``directory``."""
    return os.path.join(directory_below(directory), f"{digest}-{target}.qcow2")


def in_use(directory: str, purpose: str) -> AbstractContextManager[None]:
    """While the block runs, no base of disks in ``directory`` is removed."""
    where = directory_below(directory)
    return locks.hold([(lock_key(where), where)], purpose, shared=True)


def make_directory(directory: str) -> str:
    """Make the directory for the bases of disks in ``directory`` if there is none, and remember it; returns it."""
    where = directory_below(directory)
    link = os.path.join(places.private_directory(places.BASES), lock_key(where))
    with contextlib.suppress(FileExistsError):
        os.symlink(os.path.realpath(where), link)
        places.fsync_directory(places.BASES)
    places.private_directory(where)
    os.chmod(where, 0o711)  # whatever the umask: QEMU's user passes through
    return where


def remove_unused(connection: Any, *, check: bool = False) -> list[dict[str, Any]]:
    """Remove every base that nothing stands on; returns ``{domain, what, action, settled, left}`` of each.

    A directory whose bases are in use by a running import is left for another time.
    """
    findings = []
    for where in _known():
        purpose = "removing bases that nothing stands on"
        with contextlib.ExitStack() as stack:
            if not check:
                try:
                    stack.enter_context(locks.hold([(lock_key(where), where)], purpose, patience=0))
                except Busy:
                    continue
            for path in _unused(connection, where):
                if not check:
                    os.unlink(path)
                findings.append(
                    {
                        "domain": path,
                        "what": "a base of linked disks that nothing stands on any more",
                        "action": "would be removed" if check else "removed",
                        "settled": not check,
                        "left": [path],
                    }
                )
            if not check:
                _forget_if_empty(where)
    return findings


def _known() -> list[str]:
    try:
        names = sorted(os.listdir(places.BASES))
    except OSError:
        return []
    return [os.readlink(os.path.join(places.BASES, name)) for name in names]


def _unused(connection: Any, where: str) -> list[str]:
    """The bases in a directory that no definition, saved state, snapshot, image or process uses."""
    try:
        names = sorted(os.listdir(where))
    except OSError:
        return []
    paths = [os.path.join(where, name) for name in names if _NAME.fullmatch(name)]
    paths = [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]
    if not paths:
        return []
    graph = host_graph.read_graph(connection, [where, os.path.dirname(where)])
    used = {*host_graph.openers(paths, besides=""), *_spelled_out(connection)}
    return [path for path in paths if not users(graph, path) and host_graph.canonical(path) not in used]


def _spelled_out(connection: Any) -> set[str]:
    """Every file that a definition spells out, also below a layer that is not there now, where no header leads to it."""

    def sources(handle: Any) -> set[str]:
        definitions = [ElementTree.fromstring(handle.XMLDesc(flags)) for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE)]
        return {source.get("file", "") for root in definitions for source in root.iter("source")}

    with explaining("Reading the definitions of this host"):
        found = set().union(*of_every_domain(connection, sources))
    return {host_graph.canonical(path) for path in found if path}


def users(graph: HostGraph, path: str) -> tuple[Reader, ...]:
    """Who uses a base: whoever names it, and whatever stands on it, also an image that nobody names. Pure."""
    return (*graph.named_by(path), *graph.readers(path))


def _forget_if_empty(where: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        try:
            os.rmdir(where)
        except OSError:
            return  # not empty
    places.unlink_quietly(os.path.join(places.BASES, lock_key(where)))
