# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's secrets: the keys that it hands to QEMU (https://libvirt.org/formatsecret.html)."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from .binding import libvirt
from .connection import code_of, constant, explaining
from .domain_model import Encryption
from .image_node import Passphrase


def value_of(connection: Any, encryption: Encryption) -> Passphrase | None:
    """The passphrase that libvirt opens a disk with; None when it is private, or not there."""
    try:
        if encryption.uuid:
            secret = connection.secretLookupByUUIDString(encryption.uuid)
        else:
            secret = connection.secretLookupByUsage(constant("VIR_SECRET_USAGE_TYPE_VOLUME"), encryption.usage or "")
        return Passphrase(bytes(secret.value(0)))
    except libvirt.libvirtError:
        return None


def define(connection: Any, uuid: str, passphrase: Passphrase, description: str, *, ephemeral: bool) -> None:
    """Define a secret, or give it this value again.

    ``ephemeral`` keeps it in libvirtd's memory only, where nobody reads it back.
    """
    root = ElementTree.Element("secret", ephemeral="yes" if ephemeral else "no", private="yes" if ephemeral else "no")
    ElementTree.SubElement(root, "uuid").text = uuid
    ElementTree.SubElement(root, "description").text = description
    with explaining(
        f"Defining a libvirt secret ({description})", advice="See that libvirt's secret driver is installed"
    ):
        connection.secretDefineXML(ElementTree.tostring(root, encoding="unicode"), 0).setValue(passphrase.value, 0)


def exists(connection: Any, uuid: str) -> bool:
    """Whether libvirt has it; a restarted libvirtd has no ephemeral ones."""
    return _find(connection, uuid) is not None


def forget(connection: Any, uuid: str) -> None:
    """Undefine a secret; one that is gone is passed over."""
    found = _find(connection, uuid)
    if found is not None:
        found.undefine()


def _find(connection: Any, uuid: str) -> Any | None:
    try:
        return connection.secretLookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if code_of(error) == constant("VIR_ERR_NO_SECRET"):
            return None
        raise
