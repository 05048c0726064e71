# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints of a domain that is shut off, out of libvirt's sight for the length of one call.

libvirt 9.0 refuses to take, and even to redefine, a snapshot of a shut-off domain that has checkpoints ("cannot perform block
operations while checkpoint exists"): it does not know then what its QEMU can do.  What libvirt remembers of them is
written down, removed and defined again.  The bitmaps in the images, which are what counts, are not touched.  What a run that
is killed in between leaves, the next one defines again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, constant, explaining, open_connection
from . import places

DIRECTORY = "/var/lib/vmkeeper.libvirt/checkpoints"


@contextlib.contextmanager
def set_aside(handle: Any) -> Iterator[None]:
    """While the block runs, libvirt knows no checkpoint of the domain, if that is shut off. Needs the domain's lock."""
    if handle.isActive():
        yield
        return
    put_back(handle)  # libvirt may have gone while they were aside: what is written now must be all of them
    with explaining(f"Reading the checkpoints of domain {handle.name()!r}"):
        found = handle.listAllCheckpoints(constant("VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL") or 0)
        texts = [one.getXMLDesc(constant("VIR_DOMAIN_CHECKPOINT_XML_SECURE") or 0) for one in found]
    if not found:
        yield
        return
    places.private_directory(DIRECTORY)
    places.write_json(_path(handle), texts)
    try:
        with explaining(f"Putting the checkpoints of domain {handle.name()!r} aside"):
            for one in reversed(found):
                one.delete(constant("VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY") or 0)
        yield
    finally:
        put_back(handle)


def put_back(handle: Any) -> None:
    """Define again what was put aside; nothing happens when nothing was. Needs the domain's lock."""
    texts = places.read_json(_path(handle))
    if texts is None:
        return
    with explaining(
        f"Defining the checkpoints of domain {handle.name()!r} again",
        state=f"They are kept in {_path(handle)}.",
        advice="Run this again, or recover_domain; without them the next backup is a full one",
    ):
        present = {one.getName() for one in handle.listAllCheckpoints()}
        for text in texts:  # parents first
            if ElementTree.fromstring(text).findtext("name") not in present:
                handle.checkpointCreateXML(text, constant("VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE") or 0)
    places.unlink_quietly(_path(handle))


def settle(uri: str, uuid: str) -> bool:
    """:func:`put_back` for what a run that was killed has left; False when it left nothing."""
    path = os.path.join(DIRECTORY, f"{uuid}.json")
    if not os.path.exists(path):
        return False
    try:
        put_back(open_connection(uri).lookupByUUIDString(uuid))
    except libvirt.libvirtError as error:
        if code_of(error) != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        places.unlink_quietly(path)  # with the domain went its checkpoints
    return True


def _path(handle: Any) -> str:
    return os.path.join(DIRECTORY, f"{handle.UUIDString()}.json")
