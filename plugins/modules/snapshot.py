#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: consistent snapshots of one or several domains."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot
short_description: Take consistent snapshots of domains
version_added: 0.1.0
description:
  - Takes a snapshot of a running or stopped domain, or of several domains at one instant.
  - A running guest is frozen through its guest agent, the snapshot is cut, and the guest is thawed, all in one call. Overlays
    are made before, so that the guest stands still for a fraction of a second only. A guard on the hypervisor thaws the guest
    by O(deadline) even if the module is killed.
  - The result tells how consistent the snapshot really is, how long the guest was frozen, and what the snapshot does not hold.
options:
  name:
    description: Name of the snapshot. Letters, digits and C(. _ + @ = -).
    type: str
    required: true
  state:
    description:
      - V(present) sees that every domain has the snapshot. If all have it already nothing is done, except that O(tags) and
        O(description) are brought up to date. If it exists with other content, or only on some of the domains, the task fails.
    type: str
    choices: [present]
    default: present
  mode:
    description:
      - V(external) puts an overlay on each disk, and what was written before stays untouched below it.
      - V(internal) stores the snapshot inside the qcow2 images. It pauses the guest while its memory is written, and is refused
        where it hurts (raw disks, raw UEFI variables, checkpoints, left-out disks).
      - V(auto) chooses and says why in RV(snapshot.mode_reason).
    type: str
    choices: [auto, external, internal]
    default: auto
  memory:
    description:
      - Keep the memory of a running guest too, so that a revert resumes it where it was.
      - Not for several domains at once.
    type: bool
    default: false
  quiesce:
    description:
      - V(auto) freezes the guest if its agent answers, else takes a crash-consistent snapshot with a warning.
      - V(required) fails, before anything is changed, if the guest cannot be frozen.
      - V(never) does not freeze.
      - V(shutdown) shuts the guest down cleanly, takes the snapshot and starts it again.
      - With O(memory) nothing is frozen, since the frozen state would be part of the memory.
    type: str
    choices: [auto, required, never, shutdown]
    default: auto
  disks:
    description:
      - Targets of the only disks to hold, such as V(vda). One that the definition leaves out with C(snapshot='no') is then held.
    type: list
    elements: str
  exclude_disks:
    description: Targets of disks to leave out.
    type: list
    elements: str
  directory:
    description:
      - An existing directory of the hypervisor for overlays and memory. QEMU's user must be able to reach it.
      - By default an overlay lies beside its disk's image, or in C(/var/lib/libvirt/images) if the disk is a block device.
    type: path
  description:
    description: Text to keep with the snapshot.
    type: str
  tags:
    description: Dictionary of texts to keep with the snapshot. A JSON object in a string is accepted.
    type: raw
  deadline:
    description:
      - By when the guest is thawed at the latest, counted from just before the freeze.
      - A duration such as V(90s) or V(2m), or seconds.
    type: str
    default: 60s
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.hypervisor.domains
  - vmkeeper.libvirt.attributes
notes:
  - Several domains are frozen, then all paused for some milliseconds, then cut, so that their snapshots are of one instant. If
    one fails, none has the snapshot.
  - A domain with a managed-save image is refused, since its saved memory would resume on disks that have moved on.
seealso:
  - module: vmkeeper.libvirt.snapshot_info
  - module: vmkeeper.libvirt.fsfreeze
  - module: vmkeeper.libvirt.domain_info
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Take a consistent snapshot before an upgrade
  vmkeeper.libvirt.snapshot:
    domain: web01
    name: before-upgrade
    quiesce: required
    tags:
      change: CHG-1234

- name: Take a snapshot of an application's two machines at one instant
  vmkeeper.libvirt.snapshot:
    domains: [app01, db01]
    name: before-migration

- name: Take a snapshot with memory, leaving out the scratch disk
  vmkeeper.libvirt.snapshot:
    domain: db01
    name: with-memory
    memory: true
    exclude_disks: [vdc]
"""

RETURN = r"""
snapshots:
  description: One snapshot for each domain, in the order asked.
  returned: success
  type: list
  elements: dict
snapshot:
  description: The snapshot, when exactly one domain was asked for.
  returned: one domain
  type: dict
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
      description:
        - V(application) when it was frozen and the guest's freeze hook proved that the applications went along.
        - V(filesystem) when the agent held the filesystems frozen over the whole cut.
        - V(memory) when it holds the memory.
        - V(offline) when the guest had shut down cleanly.
        - V(crash) for everything else.
      type: str
    frozen_ms:
      description: Milliseconds from before the freeze call until after the thaw call. None when nothing was frozen.
      type: int
    paused_ms:
      description: Milliseconds that the guest was paused by a group or an internal memory snapshot. None when it was not.
      type: int
    created:
      description: When it was taken, in ISO 8601. None in check mode.
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
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domains
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.plan import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.taking import take

SHORTEST_DEADLINE = 2.0


def request_of(call: _module.Call) -> Request:
    """The checked options."""
    params = call.params
    deadline = names.parse_duration(params["deadline"], "deadline")
    if deadline < SHORTEST_DEADLINE:
        raise InvalidInput(
            f"deadline {params['deadline']} is too short", advice=f"Give at least {SHORTEST_DEADLINE:.0f} s"
        )
    description = params["description"]
    return Request(
        name=names.check_name(params["name"]),
        mode=params["mode"],
        memory=params["memory"],
        quiesce=params["quiesce"],
        disks=tuple(params["disks"]) if params["disks"] is not None else None,
        exclude=tuple(params["exclude_disks"]) if params["exclude_disks"] is not None else None,
        directory=names.check_directory(params["directory"]) if params["directory"] else None,
        description=names.check_text(description, "description") if description is not None else None,
        tags=names.check_tags(params["tags"]),
        deadline=deadline,
    )


def handle(call: _module.Call) -> _module.Answer:
    """See that the snapshot exists."""
    request = request_of(call)
    handles = find_domains(call.connection, call.params["domains"])
    taken = take(call.connection, call.uri, handles, request, check=call.check)
    return _module.Answer(
        changed=any(one.changed for one in taken),
        result=_module.one_or_all("snapshots", "snapshot", [one.snapshot for one in taken], len(handles)),
        warnings=[warning for one in taken for warning in one.warnings],
        diff=(
            {one.domain: {request.name: one.before} if one.before else {} for one in taken},
            {one.domain: {request.name: one.snapshot} for one in taken},
        ),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domains": {**_module.DOMAINS_OPTION, "required": True},
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present"], "default": "present"},
            "mode": {"type": "str", "choices": ["auto", "external", "internal"], "default": "auto"},
            "memory": {"type": "bool", "default": False},
            "quiesce": {
                "type": "str",
                "choices": ["auto", "required", "never", "shutdown"],
                "default": "auto",
            },
            "disks": {"type": "list", "elements": "str"},
            "exclude_disks": {"type": "list", "elements": "str"},
            "directory": {"type": "path"},
            "description": {"type": "str"},
            "tags": {"type": "raw"},
            "deadline": {"type": "str", "default": "60s"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
