#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: the tree of snapshots and the chains of the disks."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_info
short_description: Show the snapshots of domains and the chains of their disks
version_added: 0.1.0
description:
  - Shows the tree of snapshots of each domain, with what each stands on and who needs it, and the chain of every disk.
  - Warns when a chain is longer than 8 layers. Each layer costs reads, and hosts with libvirt 10.8 to 11.10 cannot start a
    guest with more than about 25.
  - Changes nothing. Works for a member of the libvirt group, with what that user may read.
options:
  name:
    description: Show only snapshots with this name.
    type: str
  tags:
    description: Show only snapshots that have all these tags.
    type: raw
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.domains_optional
  - vmkeeper.libvirt.attributes.info_module
seealso:
  - module: vmkeeper.libvirt.snapshot
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Show the snapshots of one domain
  vmkeeper.libvirt.snapshot_info:
    domain: web01
  register: web01

- name: Find what was taken for a change
  vmkeeper.libvirt.snapshot_info:
    tags:
      change: CHG-1234
"""

RETURN = r"""
snapshots:
  description: The snapshots, parents before their children.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name.
      type: str
    domain:
      description: Name of the domain.
      type: str
    mode:
      description: V(external) or V(internal).
      type: str
    mode_reason:
      description: Why that mode was chosen.
      type: str
    consistency:
      description: V(application), V(filesystem), V(memory), V(offline) or V(crash).
      type: str
    frozen_ms:
      description: How long the guest was frozen for it. None when nothing was frozen.
      type: int
    paused_ms:
      description: How long the guest was paused for it. None when it was not paused.
      type: int
    created:
      description: When it was taken, in ISO 8601.
      type: str
    description:
      description: Its description.
      type: str
    tags:
      description: Its tags.
      type: dict
    protected:
      description: Whether it is protected from removal.
      type: bool
    disks:
      description: The disks that it holds, each with C(target), C(mode), C(base) (its content) and C(overlay) (what came after).
      type: list
      elements: dict
    memory:
      description: Path of the memory image, V(true) for memory inside an image, or None.
      type: raw
    nvram:
      description: Path of the copy of the UEFI variables, or None.
      type: str
    not_captured:
      description: What it does not hold, each with C(kind), C(name), C(reason) and C(why).
      type: list
      elements: dict
    parent:
      description: Name of the snapshot before it.
      type: str
    current:
      description: Whether the domain's present state descends from it.
      type: bool
    children:
      description: Names of the snapshots after it.
      type: list
      elements: str
    depth:
      description: How many snapshots lie before it in the tree.
      type: int
    bootable:
      description: Whether everything that it is read from is there.
      type: bool
    depends_on:
      description: The files that it is read from.
      type: list
      elements: str
    needed_by:
      description: What stands on its layers, each with C(kind) (V(snapshot) or V(domain)) and C(name).
      type: list
      elements: dict
    bytes:
      description: Bytes on disk of the files that exist because of it, its overlays, its memory and UEFI variables.
      type: int
snapshot:
  description: The snapshot, when exactly one domain and a O(name) were asked for.
  returned: one domain and a name, if it exists
  type: dict
chains:
  description: Domain name, then disk target, then the layers from the active one down to the base.
  returned: success
  type: dict
"""

from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import (
    find_domains,
    of_every_domain,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.names import check_tags
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.listing import list_domain


def handle(call: _module.Call) -> _module.Answer:
    """List snapshots and chains."""
    wanted = call.params["domains"]
    name = call.params["name"]
    tags = check_tags(call.params["tags"])

    def listing_of(domain: Any) -> tuple[str, dict[str, Any]]:
        return domain.name(), list_domain(domain, name=name, tags=tags)

    if wanted:
        listings = dict(map(listing_of, find_domains(call.connection, wanted)))
    else:
        listings = dict(of_every_domain(call.connection, listing_of))
    snapshots = [snapshot for listing in listings.values() for snapshot in listing["snapshots"]]
    result = _module.one_or_all("snapshots", "snapshot", snapshots, len(wanted or ()) if name else 0)
    result["chains"] = {domain: listing["chains"] for domain, listing in listings.items()}
    return _module.Answer(
        changed=False,
        result=result,
        warnings=[warning for listing in listings.values() for warning in listing["warnings"]],
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {"domains": dict(_module.DOMAINS_OPTION), "name": {"type": "str"}, "tags": {"type": "raw"}},
        handle,
        info=True,
    )


if __name__ == "__main__":
    main()
