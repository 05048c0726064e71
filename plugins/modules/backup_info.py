#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: what a repository holds."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_info
short_description: Show the restore points of a repository
version_added: 0.1.0
description:
  - Shows the restore points of a repository, what each stands on and costs, and whether all of its files are there.
  - Changes nothing.
options:
  repository:
    description: The directory of the repository.
    type: path
    required: true
  domains:
    description: Names or UUIDs of domains, as they were backed up; they need not exist any more. All when left out.
    type: list
    elements: str
    aliases: [domain]
  tags:
    description: Show only points that have all these tags.
    type: raw
  before:
    description: Show only points made before this time, in ISO 8601 with a zone.
    type: str
  after:
    description: Show only points made after this time, in ISO 8601 with a zone.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.attributes.info_module
notes:
  - The repository is private to root, so this needs root too.
seealso:
  - module: vmkeeper.libvirt.backup
  - module: vmkeeper.libvirt.restore
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Show what there is of one domain
  vmkeeper.libvirt.backup_info:
    repository: /srv/backup
    domain: web01
  register: web01

- name: Find the points of an application before a change
  vmkeeper.libvirt.backup_info:
    repository: /srv/backup
    tags:
      app: shop
    before: "2026-11-20T20:00:00Z"
"""

RETURN = r"""
restore_points:
  description: The points, by domain and then by age, oldest first.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: Identifier, which sorts by time for people.
      type: str
    sequence:
      description: Number of the point among those of its domain. The highest is the latest, whatever the clock said.
      type: int
    domain:
      description: Name of the domain as it was backed up.
      type: str
    domain_uuid:
      description: UUID of the domain.
      type: str
    created:
      description: When it was made, in ISO 8601.
      type: str
    type:
      description: V(incremental) if any disk is an increment, else V(full).
      type: str
    reason:
      description: Why it is of that type.
      type: str
    parent:
      description: Id of the point that its increments stand on.
      type: str
    consistency:
      description:
        - V(application) when it was frozen and the guest's freeze hook proved that the applications went along.
        - V(filesystem) when the agent held the filesystems frozen until the backup had begun.
        - V(offline) when the guest had shut down cleanly and had no saved state.
        - V(crash) for everything else.
      type: str
    frozen_ms:
      description: Milliseconds that the guest was frozen. None when it was not.
      type: int
    paused_ms:
      description: Milliseconds that the guest was paused for a group. None when it was not.
      type: int
    checkpoint:
      description: Name of the libvirt checkpoint that the next increment starts from.
      type: str
    group:
      description: Ids of all points made at the same instant, when several domains were backed up together.
      type: list
      elements: str
    description:
      description: Its description.
      type: str
    tags:
      description: Its tags.
      type: dict
    protected:
      description: Whether it is protected from removal.
      type: bool
    nvram:
      description: Whether it holds the UEFI variables.
      type: bool
    stored_bytes:
      description: Bytes that its images take in the repository.
      type: int
    changed_bytes:
      description: Bytes of the guest's disks that it holds.
      type: int
    disks:
      description: The disks, each with its C(target), C(type), C(reason), C(parent), C(file) and its sizes in bytes.
      type: list
      elements: dict
    not_captured:
      description: What it does not hold, each with C(kind), C(name), C(reason) and C(why).
      type: list
      elements: dict
    path:
      description: Directory of the point.
      type: str
    chain:
      description: Ids of the points that it is read through, from itself down to a full.
      type: list
      elements: str
    children:
      description: Ids of the points that stand on it.
      type: list
      elements: str
    restorable:
      description: Whether all files that it needs are there. M(vmkeeper.libvirt.backup_verify) proves more.
      type: bool
    problem:
      description: What is missing.
      type: str
    age_seconds:
      description: Seconds since it was made.
      type: int
    gib_months:
      description: What keeping it has cost so far, its GiB times its age in months of 30 days.
      type: float
    verified:
      description: The outcome of the last M(vmkeeper.libvirt.backup_verify), if there was one.
      type: dict
broken:
  description:
    - Points that cannot be read, each also named in a warning. They do not tell which domain they are of by name, so O(tags), O(before)
      and O(after) do not choose among them, and O(domains) does only where another point of the domain can be read.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: The name of its directory.
      type: str
    domain_uuid:
      description: UUID of the domain.
      type: str
    problem:
      description: Why it cannot be read.
      type: str
repository:
  description: The repository. Sums are over the points shown.
  returned: success
  type: dict
  contains:
    path:
      description: Its directory.
      type: str
    uuid:
      description: Its UUID.
      type: str
    points:
      description: How many points are shown.
      type: int
    stored_bytes:
      description: Bytes of their images.
      type: int
    gib_months:
      description: GiB-months of them all.
      type: float
    free_bytes:
      description: Free bytes of its filesystem.
      type: int
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import listing, manifest
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import open_repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.names import check_tags


def handle(call: _module.Call) -> _module.Answer:
    """List points."""
    params = call.params
    filters = listing.Filters(
        domains=tuple(params["domains"] or ()),
        tags=check_tags(params["tags"]),
        before=listing.time_option(params["before"], "before"),
        after=listing.time_option(params["after"], "after"),
    )
    repository = open_repository(params["repository"])
    points, broken = listing.list_points(repository, filters, manifest.now_utc())
    return _module.Answer(
        changed=False,
        result={
            "restore_points": points,
            "broken": broken,
            "repository": listing.describe_repository(repository, points),
        },
        warnings=[f"point {one['id']} of {one['domain_uuid']}: {one['problem']}" for one in broken],
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "repository": {"type": "path", "required": True},
            "domains": dict(_module.DOMAINS_OPTION),
            "tags": {"type": "raw"},
            "before": {"type": "str"},
            "after": {"type": "str"},
        },
        handle,
        info=True,
    )


if __name__ == "__main__":
    main()
