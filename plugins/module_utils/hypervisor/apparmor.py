# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which images the AppArmor profile of a running guest forbids QEMU to write.

libvirt before 12.1 denies writes to every layer below the active one, each time that it writes the profile anew: when the
guest starts, after a backup, after a commit below the active layer or a block pull (docs/apparmor.md).  libvirtd and
qemu-img are not confined, so nothing of this concerns a guest that is shut off.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any
from xml.etree import ElementTree

from .connection import explaining

#: Where libvirt writes the profiles of its guests.
PROFILES = "/etc/apparmor.d/libvirt"

#: A label is ``libvirt-`` and the domain's UUID; it becomes a file name here.
_LABEL = re.compile(r"libvirt-[0-9a-fA-F-]{36}")
_DENY = re.compile(r'^\s*(?:audit\s+)?deny\s+"([^"]+)"\s+([a-z]+)\s*,')


def profile_of(live_xml: str) -> str | None:
    """The label of the profile that confines a running guest, from its live XML; None when AppArmor does not."""
    label = ElementTree.fromstring(live_xml).findtext("seclabel[@model='apparmor']/label")
    return label if label and _LABEL.fullmatch(label) else None


def denied_writes(rules: str) -> frozenset[str]:
    """The paths that these rules (a ``.files`` of libvirt's) deny to write. Pure; what it cannot read it passes over.

    A ``deny`` rule wins over every rule that allows.
    """
    found = set()
    for line in rules.splitlines():
        match = _DENY.match(line)
        if match and "w" in match.group(2):
            found.add(match.group(1))
    return frozenset(found)


def rules_file(handle: Any) -> str | None:
    """The file with the rules of a running guest; None where AppArmor does not confine it."""
    with explaining(f"Reading the security labels of domain {handle.name()!r}"):
        label = profile_of(handle.XMLDesc(0))
    return os.path.join(PROFILES, f"{label}.files") if label else None


def read_denied(handle: Any) -> frozenset[str]:
    """Canonical paths that a running guest may not write; empty where nothing says so."""
    path = rules_file(handle)
    if path is None:
        return frozenset()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            rules = stream.read()
    except OSError:
        return frozenset()  # then QEMU's refusal tells
    return frozenset(os.path.realpath(denied) for denied in denied_writes(rules))


def forget(uuid: str) -> None:
    """Remove the profile that libvirt leaves for every guest it ever started. Only for one that will not come again."""
    label = f"libvirt-{uuid}"
    if not _LABEL.fullmatch(label):
        return
    for name in (label, f"{label}.files"):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(PROFILES, name))
