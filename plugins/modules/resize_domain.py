#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: more or fewer vCPUs, memory and disk for a domain."""

from __future__ import annotations

DOCUMENTATION = r"""
module: resize_domain
short_description: Give domains more or fewer vCPUs, memory and disk
version_added: 0.1.0
description:
  - Brings a domain to another size, live where libvirt and the guest can, else at a restart if the task allows one, else at its
    next boot. What the guest sees decides whether a change has succeeded.
  - The definition is changed too, so that the next start has the same size.
  - A domain that is restarted and is not well afterwards gets its old definition back and is started again. The task fails then.
options:
  vcpus:
    description:
      - Number of vCPUs that the guest shall have online.
      - A running domain takes as many as it was started with room for, see O(max_vcpus). vCPUs that cannot be unplugged are
        taken offline in the guest, and QEMU gives them up at its next start.
    type: int
  max_vcpus:
    description:
      - Number of vCPUs that the domain has room for after a start, which O(allow_restart) brings about. CPU topology and NUMA
        cells are kept consistent.
      - Raised to O(vcpus) by itself where needed.
    type: int
  memory:
    description:
      - Memory of the guest, such as V(4G), in whole MiB.
      - A running guest gets more from its balloon, from a virtio-mem device or by a plugged DIMM, in this order. It gives back
        to virtio-mem, by unplugged DIMMs and to its balloon, in this order, if its agent or its balloon's statistics tell that it
        can spare as much. Where nobody tells, it gives back at its next start.
    type: str
  max_memory:
    description:
      - Memory that the domain has room for after a start, which O(allow_restart) brings about, so that memory can be plugged
        while it runs.
    type: str
  disks:
    description: Disks to change.
    type: list
    elements: dict
    suboptions:
      target:
        description: Target of the disk, such as V(vda).
        type: str
        required: true
      size:
        description:
          - Virtual size, such as V(40G). Left out to grow only what lies on the disk.
          - A size below the present one needs O(allow_shrink).
        type: str
      grow_filesystem:
        description:
          - Grow the last partition of the disk and its mounted filesystem (ext3, ext4, XFS) inside the guest, through the agent's
            C(guest-exec).
          - Where the agent does not allow that, or another partition lies behind, the entry in RV(changes) says so, and nothing is
            done to it. Neither is with O(apply=next_boot).
        type: bool
        default: true
  apply:
    description:
      - V(auto) applies each change live, else at a restart if O(allow_restart), else at the next boot.
      - V(live) fails, before anything is changed, if one of them cannot be applied live. If the guest does not take a disk's or a
        filesystem's new size after all, it fails when the others are made.
      - V(next_boot) changes the definition only.
    type: str
    choices: [auto, live, next_boot]
    default: auto
  allow_restart:
    description: Shut the guest down cleanly and start it again for what cannot be changed live.
    type: bool
    default: false
  allow_shrink:
    description:
      - Make disks smaller. It needs O(allow_restart) and O(rollback), since the domain is shut down for it, or started for a moment
        if it is off, and C(guestfish) on the hypervisor.
      - The last filesystem of the disk has to be an ext2, ext3 or ext4, on the whole disk or on its last partition, primary or GPT.
        It says itself whether it fits. If not, nothing is changed. A guest whose agent allows C(guest-exec) tells it while it runs.
        Of others it is known only once they are shut down; they are started again then, and checkpoints of this collection have ended.
        XFS cannot be made smaller.
      - A copy is shrunk inside libguestfs, checked, and put in the image's place. The image itself stays beside it, as
        C(<image>.vmk-<id>.original), until the domain was well with the copy, and comes back if it was not.
      - A disk with overlays, snapshots, foreign checkpoints, or images that stand on it, is refused. Checkpoints of this collection
        end, so the next backup is a full one.
    type: bool
    default: false
  overcommit:
    description: Promise more memory, CPUs or space than the host has left for all disks and domains of the task together.
    type: bool
    default: false
  rollback:
    description:
      - Return to the old definition if the domain is not well after a restart.
      - With V(false) it keeps the new one, unless it cannot be started with it at all.
    type: bool
    default: true
  health_command:
    description:
      - A program in the guest with its arguments, run through the agent without a shell after a restart. The domain is well when
        it ends with status 0. It is tried again until O(health_timeout).
      - By default the domain is well when its agent answers.
    type: list
    elements: str
  health_timeout:
    description: How long the domain may take to be well after it was started.
    type: str
    default: 5m
  shutdown_timeout:
    description: How long the guest may take to shut down. After that the task fails and leaves it running.
    type: str
    default: 5m
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.hypervisor.domains
  - vmkeeper.libvirt.attributes
notes:
  - A domain with a managed-save image is refused, since its saved memory would resume on other hardware.
  - A disk that has overlays and checkpoints loses the checkpoints of this collection when it grows, since increments would miss
    data. The next backup is a full one. If other tools have checkpoints there, the task fails before anything is changed.
  - The guest does not notice that a SATA or IDE disk has grown before its next start.
  - A disk that has grown stays so when the definition is rolled back. A larger disk does no harm.
seealso:
  - module: vmkeeper.libvirt.domain_info
  - module: vmkeeper.libvirt.snapshot
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Four vCPUs and 8 GiB, without a restart if possible
  vmkeeper.libvirt.resize_domain:
    domain: web01
    vcpus: 4
    memory: 8G

- name: The same, with a restart if needed, and back if the application does not come up
  vmkeeper.libvirt.resize_domain:
    domain: web01
    vcpus: 4
    memory: 8G
    allow_restart: true
    health_command: [systemctl, is-active, nginx]
    health_timeout: 3m

- name: A larger data disk, with its partition and its filesystem
  vmkeeper.libvirt.resize_domain:
    domain: db01
    disks:
      - target: vdb
        size: 200G

- name: A data disk that was made too large
  vmkeeper.libvirt.resize_domain:
    domain: db01
    disks:
      - target: vdb
        size: 80G
    allow_shrink: true
    allow_restart: true

- name: Make room for more at the next restart
  vmkeeper.libvirt.resize_domain:
    domain: db01
    max_vcpus: 16
    max_memory: 64G
    apply: next_boot

- name: Tell somebody when a domain got its old size back
  block:
    - name: More memory for all web servers of this host
      vmkeeper.libvirt.resize_domain:
        domains: [web01, web02]
        memory: 8G
        allow_restart: true
  rescue:
    - name: What came of it
      ansible.builtin.fail:
        msg: >-
          {{ ansible_failed_result.rolled_back | ternary('Old size', 'Failed') }}: {{ ansible_failed_result.msg }}
          Done before: {{ ansible_failed_result.resized | map(attribute='domain') | join(', ') }}
"""

RETURN = r"""
resized:
  description:
    - One entry for each domain, with the keys below and C(domain).
    - On failure, those of the domains that were done before the one that failed. They keep what was done.
  returned: always
  type: list
  elements: dict
changes:
  description: What was changed, or would be, each with the reason for the way in which it was.
  returned: one domain
  type: list
  elements: dict
  contains:
    what:
      description: V(vcpus), V(memory), V(max_vcpus), V(max_memory), C(disk TARGET) or C(filesystem TARGET).
      type: str
    before:
      description: Number of vCPUs, or bytes, before.
      type: int
    after:
      description: Number of vCPUs, or bytes, that were asked for.
      type: int
    guest_sees:
      description: What the guest itself says. None when it does not tell, RV(changes[].why) says why.
      type: int
    applied:
      description:
        - V(live), V(restart) or V(next_boot). V(offline) for an image of a stopped domain, which has changed already.
        - V(none) when nothing was done.
      type: str
    why:
      description: The reason.
      type: str
    ends_checkpoints:
      description: Names of checkpoints that the change has ended.
      type: list
      elements: str
restarted:
  description: Whether the domain was restarted.
  returned: one domain
  type: bool
downtime_ms:
  description: Milliseconds from the request to shut down until the guest was well again. 0 without a restart, None in check mode.
  returned: one domain
  type: int
restart_required:
  description: Whether the domain must be restarted to have all that was asked for.
  returned: one domain
  type: bool
restart_reasons:
  description: Why.
  returned: one domain
  type: list
  elements: str
rolled_back:
  description:
    - Whether a domain has its old definition back, because it could not be started, or was not well, with the new one. Then the task
      has failed.
    - V(false) in all other results and failures, also if the way back itself failed. Of several domains, it is about the one that failed.
  returned: always, unless Ansible itself refuses the options
  type: bool
"""

from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domains
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import check_request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.scaling import resize


def handle(call: _module.Call) -> _module.Answer:
    """Bring the domains to the asked size."""
    request = check_request(call.params)
    handles = find_domains(call.connection, call.params["domains"])
    resized = resize(call.connection, call.uri, handles, request, check=call.check)
    result: dict[str, Any] = {"resized": [one.result for one in resized], "rolled_back": False}  # else it has failed
    if len(resized) == 1:
        result.update({key: value for key, value in resized[0].result.items() if key != "domain"})
    return _module.Answer(
        changed=any(one.changed for one in resized),
        result=result,
        warnings=[warning for one in resized for warning in one.warnings],
        diff=({one.domain: one.before for one in resized}, {one.domain: one.after for one in resized}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domains": {**_module.DOMAINS_OPTION, "required": True},
            "vcpus": {"type": "int"},
            "max_vcpus": {"type": "int"},
            "memory": {"type": "str"},
            "max_memory": {"type": "str"},
            "disks": {
                "type": "list",
                "elements": "dict",
                "options": {
                    "target": {"type": "str", "required": True},
                    "size": {"type": "str"},
                    "grow_filesystem": {"type": "bool", "default": True},
                },
            },
            "apply": {"type": "str", "choices": ["auto", "live", "next_boot"], "default": "auto"},
            "allow_restart": {"type": "bool", "default": False},
            "allow_shrink": {"type": "bool", "default": False},
            "overcommit": {"type": "bool", "default": False},
            "rollback": {"type": "bool", "default": True},
            "health_command": {"type": "list", "elements": "str"},
            "health_timeout": {"type": "str", "default": "5m"},
            "shutdown_timeout": {"type": "str", "default": "5m"},
        },
        handle,
        failure={"resized": [], "rolled_back": False},
    )


if __name__ == "__main__":
    main()
