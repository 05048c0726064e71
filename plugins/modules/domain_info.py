#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: what there is to know about domains before changing them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: domain_info
short_description: Show chains, sizes, agent, jobs and unfinished operations of domains
version_added: 0.1.0
description:
  - Shows what a person, or a playbook, looks at before changing a virtual machine. What would a snapshot or a backup hold and
    what not, does the guest agent answer and what does it allow, is the guest frozen, is there a saved state, how long are the
    chains, is a job running, was an operation interrupted.
  - Changes nothing. Works for a member of the libvirt group, with what that user may read.
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.domains_optional
  - vmkeeper.libvirt.attributes.info_module
seealso:
  - module: vmkeeper.libvirt.snapshot_info
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Look at one domain
  vmkeeper.libvirt.domain_info:
    domain: web01
  register: web01

- name: Say what a backup would leave out
  ansible.builtin.debug:
    msg: "{{ web01.domain.not_captured | map(attribute='why') | list }}"
"""

RETURN = r"""
domains:
  description: One entry for each domain.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name.
      type: str
    uuid:
      description: UUID.
      type: str
    state:
      description: What it is doing, by libvirt's name, such as V(running), V(paused), V(shutoff).
      type: str
    state_reason:
      description: libvirt's reason for it.
      type: str
    persistent:
      description: Whether it has a definition that outlives its run.
      type: bool
    autostart:
      description: Whether libvirt starts it with the host.
      type: bool
    managed_save:
      description: Whether its RAM is saved and would be resumed at the next start.
      type: bool
    machine:
      description: Machine type.
      type: str
    arch:
      description: Architecture.
      type: str
    virtualization:
      description: V(kvm), V(qemu), ...
      type: str
    firmware:
      description: V(bios) or V(uefi).
      type: str
    nvram:
      description: Path of the UEFI variables.
      type: str
    tpm:
      description: Whether it has a TPM.
      type: bool
    vcpus:
      description: Numbers of vCPUs, V(maximum), V(configured) for the next start, V(live), and V(guest) as the guest counts them.
      type: dict
    memory:
      description: Bytes of memory, V(maximum), V(configured) for the next start, V(live), and V(guest) as the guest counts it.
      type: dict
    disks:
      description: Its disks, each with C(target), C(source), C(format), C(capacity), C(allocation), C(chain) and more.
      type: list
      elements: dict
    agent:
      description: Whether a guest agent is C(configured), C(connected), C(responding), what it allows, and the C(obstacle) to a freeze.
      type: dict
    frozen:
      description: Whether the agent says that filesystems are frozen. None when it cannot say.
      type: bool
    freeze_deadline_at:
      description: When the guard thaws it, in ISO 8601.
      type: str
    filesystems:
      description: Mountpoints in the guest, as far as the agent lists them.
      type: list
      elements: str
    would_capture:
      description: Disks that a snapshot or backup would hold.
      type: list
      elements: str
    not_captured:
      description: What a snapshot or backup would leave out, each with C(kind), C(name), C(reason) and C(why).
      type: list
      elements: dict
    checkpoints:
      description: Names of its checkpoints.
      type: list
      elements: str
    snapshots:
      description: Names of its snapshots.
      type: list
      elements: str
    jobs:
      description: Running jobs, each with C(disk), C(kind) and C(ready).
      type: list
      elements: dict
    unfinished:
      description: An operation of this collection that was interrupted, with C(operation), C(started) and C(last_step).
      type: dict
    locked_by:
      description: The run of this collection that works on it now, with C(pid), C(operation) and C(since).
      type: dict
    warnings:
      description: What could not be read, or deserves attention.
      type: list
      elements: str
domain:
  description: The entry of RV(domains), when exactly one domain was asked for.
  returned: one domain
  type: dict
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import (
    find_domains,
    of_every_domain,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import overview


def handle(call: _module.Call) -> _module.Answer:
    """Describe the domains."""
    wanted = call.params["domains"]
    if wanted:
        entries = [overview.describe(one) for one in find_domains(call.connection, wanted)]
    else:
        entries = of_every_domain(call.connection, overview.describe)
    return _module.Answer(changed=False, result=_module.one_or_all("domains", "domain", entries, len(wanted or ())))


def main() -> None:
    """Entry point."""
    _module.run({"domains": dict(_module.DOMAINS_OPTION)}, handle, info=True)


if __name__ == "__main__":
    main()
