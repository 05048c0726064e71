# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Storage pools, as places for files."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from .._errors import Unsupported
from .connection import explaining


def directory_of(connection: Any, pool: str) -> str:
    """The directory that a pool is. Raises :class:`Unsupported` for one of another kind, such as a volume group."""
    with explaining(f"Looking up storage pool {pool!r}"):
        root = ElementTree.fromstring(connection.storagePoolLookupByName(pool).XMLDesc(0))
    path = root.findtext("target/path")
    if root.get("type") not in ("dir", "fs", "netfs") or not path:
        raise Unsupported(f"Storage pool {pool!r} is not a directory", advice="Use a pool of type dir, or directory")
    return path
