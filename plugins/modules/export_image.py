#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: export a domain as a launchable image."""

from __future__ import annotations

DOCUMENTATION = r"""
module: export_image
short_description: Export a domain as a launchable image
version_added: 0.1.0
description:
  - Makes an image of a running domain, of a stopped one, or of one of its snapshots. An image is a directory with the
    disks, flattened and sparse, and a manifest that says what they are and what a launch needs.
    M(vmkeeper.libvirt.import_image) launches it on any hypervisor.
  - The disks of a running domain are of one instant. The guest is frozen through its agent for a fraction of a second and goes
    on writing while QEMU copies. Its own images and their chain stay as they are.
  - The image appears whole, by one rename, or not at all.
options:
  domain:
    description: Name or UUID of the domain.
    type: str
    required: true
  dest:
    description: An existing directory of the hypervisor, in which the image's own directory is made.
    type: path
    required: true
  name:
    description: Name of the image, and of its directory. Letters, digits and C(. _ + @ = -).
    type: str
    required: true
  snapshot:
    description:
      - Export the content of this snapshot in place of the domain's present one. An internal one is copied out of the images first.
      - Its memory, if it has one, is not part of an image.
    type: str
  disks:
    description:
      - Targets of the only disks to export, such as V(vda). With one disk the image is a volume as much as a machine.
    type: list
    elements: str
  exclude_disks:
    description: Targets of disks to leave out.
    type: list
    elements: str
  format:
    description: Format of the image's disks.
    type: str
    choices: [qcow2, raw, vmdk, vhdx]
    default: qcow2
  compression:
    description:
      - V(zstd) and V(zlib) for O(format=qcow2), V(zlib) for O(format=vmdk).
      - QEMU reads V(zstd) from version 5.1 on.
    type: str
    choices: [none, zlib, zstd]
    default: none
  quiesce:
    description:
      - V(auto) freezes a running guest if its agent answers, else the image is crash-consistent, with a warning.
      - V(required) fails, before anything is changed, if the image would not be consistent.
      - V(never) does not freeze.
    type: str
    choices: [auto, required, never]
    default: auto
  scratch:
    description:
      - An existing local directory in which a running guest's disks are copied first. QEMU's user must be able to reach it.
      - By default QEMU copies straight to O(dest) if that is a local directory that its user can reach, else to
        C(/var/lib/libvirt/images).
      - Network and cluster filesystems and everything over FUSE, such as mergerfs, count as not local. Where a running guest's disks
        would be copied to one, or to a directory that QEMU's user cannot reach, the task is refused before anything is changed.
      - With O(encryption) never to O(dest). Then copies that are sealed, also of a stopped domain, are made here too.
    type: path
  seal:
    description:
      - Take this out of the image, never out of the domain, so that machines launched from it do not share it and nobody else
        reads it.
      - V(machine-id) empties the machine-id and removes the seeds of random numbers. V(ssh-hostkeys), V(dhcp-leases), V(logs),
        V(histories) of shells and other programs, and V(cloud-init) with its user data, are removed. V(passwords) makes every
        password in C(/etc/shadow) one that nobody can give, and leaves keys alone.
      - It is done by libguestfs in the image's own copy of the disks, so the hypervisor needs C(guestfish), and looked at again
        afterwards. What is removed does not stay in the free space of the filesystems either.
      - The disks must hold one Linux that is not encrypted.
    type: list
    elements: str
    choices: [machine-id, ssh-hostkeys, dhcp-leases, logs, histories, cloud-init, passwords]
    default: []
  encryption:
    description:
      - Encrypt the image's disks with LUKS, so that whoever holds the files cannot read them. O(format=qcow2) without
        O(compression) only.
      - The manifest stays readable. C(sha256) is that of the encrypted file.
    type: dict
    suboptions:
      passphrase:
        description: At least 8 characters. It is kept nowhere; without it the image is lost.
        type: str
        required: true
  tags:
    description: Dictionary of texts to keep with the image. A JSON object in a string is accepted.
    type: raw
  deadline:
    description:
      - By when the guest is thawed at the latest, counted from just before the freeze.
      - A duration such as V(90s) or V(2m), or seconds.
    type: str
    default: 60s
  bandwidth:
    description:
      - Limit of the copy in bytes per second, such as V(100M), for each disk. No limit when left out.
      - What a running guest is about to overwrite is copied at full speed all the same, so that its writes do not wait.
      - Of a running guest the first tenths of a second are copied at full speed, since libvirt takes the limit of a copy only once
        that has begun.
    type: str
  wait:
    description:
      - With V(false) the task is checked and answers at once with RV(job), while a worker on the hypervisor does all of it, from the
        freeze to the manifest. M(vmkeeper.libvirt.domain_job) shows it, waits for it or cancels it, and limits the copy of a
        running guest's disks.
    type: bool
    default: true
  wait_timeout:
    description:
      - How long to wait, such as V(2h). No limit when left out.
      - When it passes the task fails with RV(job). The export goes on, and the same task waits for it again.
        With O(encryption) wait for it with
        M(vmkeeper.libvirt.domain_job), since its passphrase is kept nowhere to be recognized by.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
attributes:
  idempotent:
    support: partial
    details:
      - An image of a stopped domain or of a snapshot is left alone if its content is still the same. It is never overwritten.
      - A running domain changes all the time, so a second export under the same name fails and changes nothing; so does one of a
        sealed and encrypted image, or of an internal snapshot, which are not compared. The failure has RV(image), for those who only
        want to hand over the image that is there.
notes:
  - An image holds whatever is on the disks and was not taken out by O(seal), also secrets such as users' keys. It is readable by
    root only.
  - A machine without SSH host keys needs something that makes new ones at its first boot, as cloud-init does and most
    distributions but Debian do by themselves.
  - libguestfs is used with what the task's environment says in C(LIBGUESTFS_*) and C(SUPERMIN_*), such as
    C(LIBGUESTFS_BACKEND_SETTINGS=force_tcg) where C(/dev/kvm) does not work.
  - Disks that are encrypted in the domain's own images are refused, since an image would hold their data in the clear.
  - A stopped domain's image that is both sealed and encrypted cannot be compared with it, so a second export of that name fails.
  - UEFI variables are part of an image, except of a snapshot's. TPM state is not.
  - While a stopped domain is exported it cannot be started, since its images are locked.
seealso:
  - module: vmkeeper.libvirt.import_image
  - module: vmkeeper.libvirt.push_image
  - module: vmkeeper.libvirt.domain_job
  - module: vmkeeper.libvirt.snapshot
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Export a running machine, consistently, without stopping it
  vmkeeper.libvirt.export_image:
    domain: web01
    dest: /srv/images
    name: web01-golden
    quiesce: required
    compression: zstd

- name: Export a template, without what makes it this machine
  vmkeeper.libvirt.export_image:
    domain: web01
    dest: /srv/images
    name: web-template
    seal: [machine-id, ssh-hostkeys, dhcp-leases, logs, histories, cloud-init, passwords]

- name: Export what a machine was before the upgrade
  vmkeeper.libvirt.export_image:
    domain: web01
    snapshot: before-upgrade
    dest: /srv/images
    name: web01-before-upgrade

- name: Begin a long export
  vmkeeper.libvirt.export_image:
    domain: db01
    dest: /srv/images
    name: db01-2026-11
    compression: zstd
    wait: false

- name: Wait for it
  vmkeeper.libvirt.domain_job:
    domain: db01
    state: finished
    wait_timeout: 6h

- name: Export one data disk for another kind of hypervisor
  vmkeeper.libvirt.export_image:
    domain: db01
    disks: [vdb]
    format: vmdk
    dest: /srv/images
    name: db01-data
"""

RETURN = r"""
image:
  description: The image.
  returned:
    success, except where a worker goes on; also on failure, when an image of that name was made of the domain before with the same
    options and is not compared with it now, since the domain runs, the image is sealed and encrypted, or the snapshot is internal
  type: dict
  contains:
    path:
      description: Its directory.
      type: str
    name:
      description: Its name.
      type: str
    manifest:
      description: Path of its manifest.
      type: str
    digest:
      description: sha256 of the manifest, which names the sha256 of everything else. None in check mode.
      type: str
    created:
      description: When it was exported, in ISO 8601. None in check mode.
      type: str
    consistency:
      description: V(application), V(filesystem), V(offline) or V(crash), as in M(vmkeeper.libvirt.snapshot).
      type: str
    frozen_ms:
      description: Milliseconds that the guest was frozen. None when nothing was frozen.
      type: int
    disks:
      description:
        - Its disks, each with C(target), C(bus), C(file), C(format), C(compression), C(encryption), C(sha256) and its sizes in
          bytes.
      type: list
      elements: dict
    machine:
      description: What a launch gives the guest unless told otherwise; C(memory) in bytes.
      type: dict
    not_captured:
      description: What it does not hold, each with C(kind), C(name), C(reason) and C(why).
      type: list
      elements: dict
    tags:
      description: Its tags.
      type: dict
    sealed:
      description: What was taken out of it.
      type: list
      elements: str
job:
  description: The worker, with its C(id), C(operation), C(domains), C(state) (V(pending)) and C(started).
  returned: O(wait=false), unless there was nothing to do; and when O(wait_timeout) has passed
  type: dict
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domain
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import new_passphrase_option
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.export_plan import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.sealing import OPERATIONS
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.workers import export
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.long_operation import Waiting

SHORTEST_DEADLINE = 2.0


def request_of(call: _module.Call) -> Request:
    """The checked options."""
    params = call.params
    deadline = names.parse_duration(params["deadline"], "deadline")
    if deadline < SHORTEST_DEADLINE:
        raise InvalidInput(
            f"deadline {params['deadline']} is too short", advice=f"Give at least {SHORTEST_DEADLINE:.0f} s"
        )
    return Request(
        dest=names.check_directory(params["dest"], "dest"),
        name=names.check_name(params["name"]),
        snapshot=params["snapshot"],
        disks=tuple(params["disks"]) if params["disks"] is not None else None,
        exclude=tuple(params["exclude_disks"]) if params["exclude_disks"] is not None else None,
        format=params["format"],
        compression=params["compression"],
        quiesce=params["quiesce"],
        scratch=names.check_directory(params["scratch"], "scratch") if params["scratch"] else None,
        tags=names.check_tags(params["tags"]) or {},
        deadline=deadline,
        passphrase=new_passphrase_option((params["encryption"] or {}).get("passphrase"), "encryption.passphrase"),
        seal=tuple(name for name in OPERATIONS if name in params["seal"]),
        bandwidth=names.parse_size(params["bandwidth"], "bandwidth") if params["bandwidth"] else 0,
    )


def handle(call: _module.Call) -> _module.Answer:
    """See that the image exists."""
    request, limit = request_of(call), call.params["wait_timeout"]
    answer = export(
        call.connection,
        call.uri,
        find_domain(call.connection, call.params["domain"]),
        request,
        Waiting(call.params["wait"], names.parse_duration(limit, "wait_timeout") if limit else None),
        check=call.check,
    )
    if "job" in answer:
        return _module.Answer(changed=answer["changed"], result={"job": answer["job"]})
    image = answer["image"]
    return _module.Answer(
        changed=answer["changed"],
        result={"image": image},
        warnings=answer["warnings"],
        diff=({} if answer["changed"] else {request.path: image}, {request.path: image}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domain": {"type": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "snapshot": {"type": "str"},
            "disks": {"type": "list", "elements": "str"},
            "exclude_disks": {"type": "list", "elements": "str"},
            "format": {"type": "str", "choices": ["qcow2", "raw", "vmdk", "vhdx"], "default": "qcow2"},
            "compression": {"type": "str", "choices": ["none", "zlib", "zstd"], "default": "none"},
            "quiesce": {"type": "str", "choices": ["auto", "required", "never"], "default": "auto"},
            "scratch": {"type": "path"},
            "seal": {"type": "list", "elements": "str", "choices": list(OPERATIONS), "default": []},
            "encryption": {
                "type": "dict",
                "no_log": True,  # the log would show it as Python writes it, where a mask for the passphrase may not match
                "options": {"passphrase": {"type": "str", "required": True, "no_log": True}},
            },
            "tags": {"type": "raw"},
            "deadline": {"type": "str", "default": "60s"},
            "bandwidth": {"type": "str"},
            "wait": {"type": "bool", "default": True},
            "wait_timeout": {"type": "str"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
