#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: full and incremental restore points of domains."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup
short_description: Back up domains into a repository
version_added: 0.1.0
description:
  - Makes a restore point of a running or stopped domain, or of several domains at one instant, in a repository, which is a
    directory of the hypervisor.
  - A running guest is frozen through its agent only while the backup begins, which takes a fraction of a second. QEMU then
    copies the disks as they were at that instant while the guest writes on.
  - An increment holds what changed since the last point. It is made only where libvirt's bitmaps, the chain of images and
    what was recorded at the last point prove together that no change is missing. Otherwise the disk gets a full, and
    RV(restore_point.reason) says why.
  - A restore point exists whole or not at all.
options:
  repository:
    description:
      - An existing directory of the hypervisor. An empty one becomes a repository.
      - Where it is on a local filesystem and the points are neither compressed nor encrypted, QEMU writes straight into it, and
        its user must be able to reach it. Otherwise QEMU writes into O(scratch).
    type: path
    required: true
  state:
    description:
      - V(present) makes a restore point, always, unless O(min_age) finds one that is young enough.
      - V(absent) removes the point O(id), whichever others stand on it. What those need of it is merged into them.
        Where they are encrypted, that needs O(encryption.passphrase).
    type: str
    choices: [present, absent]
    default: present
  id:
    description: The restore point to remove. Required with, and only for, O(state=absent).
    type: str
  type:
    description:
      - V(auto) makes an increment of each disk where that is proved to hold every change, else a full.
      - V(full) makes a full.
      - V(incremental) fails, before anything is changed, if no disk can have an increment. Disks that can never have one, such
        as raw images, get a full along with the others.
    type: str
    choices: [auto, full, incremental]
    default: auto
  min_age:
    description:
      - Do nothing if the latest point of every domain is younger than this. A duration such as V(20h), or seconds.
    type: str
  quiesce:
    description:
      - V(auto) freezes the guest if its agent answers, else makes a crash-consistent point with a warning.
      - V(required) fails, before anything is changed, if the guest cannot be frozen, or is off and was not shut down cleanly.
      - V(never) does not freeze.
    type: str
    choices: [auto, required, never]
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
  compression:
    description:
      - How to compress the point. It costs processor time after the guest has been thawed, and takes nothing from later increments,
        each of which may be compressed otherwise.
      - V(zstd) needs QEMU 5.1 or later wherever the point is read.
    type: str
    choices: [none, zlib, zstd]
    default: none
  encryption:
    description:
      - Encrypt the point's disks with LUKS (AES-256 in XTS mode). Excludes O(compression), since qcow2 cannot compress what it encrypts.
      - The manifest, the definition, the UEFI variables and the digests of the disks' content are not encrypted.
      - All points of a chain have one passphrase. An increment is refused if its passphrase does not open what it would stand on;
        O(type=full) begins a new chain with a new one. Where O(encryption) comes or goes, the disks get a full.
      - With O(state=absent) it is needed where encrypted points that stay must be merged with the one that goes.
      - A disk whose own image is encrypted is always stored encrypted, and not compressed. Without this option its passphrase is that
        of its libvirt secret, which must not be private. That is taken as it is, with a line break at its end if it has one.
      - Without the passphrase the data is lost. It is kept nowhere.
    type: dict
    suboptions:
      passphrase:
        description:
          - At least 8 characters in one line. It should be a random one, such as from C(openssl rand -base64 24), for a copy of the
            repository gives whoever tries all the time there is.
          - It reaches QEMU's programs through memory only, and is in no command line, environment, journal or log.
        type: str
        required: true
  scratch:
    description:
      - A directory of the hypervisor on a local filesystem, reachable by QEMU's user, into which QEMU writes before the point is stored
        in the repository. While the backup runs it needs as much room as the uncompressed point.
      - It is used when the repository is not on a local filesystem, when O(compression) or O(encryption) are asked for, and when this
        option is given. The default is C(/var/lib/vmkeeper.libvirt/scratch).
      - With O(encryption) what lies there is encrypted with a random key that only memory holds.
    type: path
  protected:
    description: Protect the point from removal.
    type: bool
    default: false
  description:
    description: Text to keep with the point.
    type: str
  tags:
    description: Dictionary of texts to keep with the point. A JSON object in a string is accepted.
    type: raw
  deadline:
    description:
      - By when the guest is thawed at the latest, counted from just before the freeze. It does not limit the copy.
      - A duration such as V(90s) or V(2m), or seconds.
    type: str
    default: 60s
  bandwidth:
    description:
      - Limit of the copy in bytes per second, such as V(100M), for each disk. No limit when left out.
      - What the guest is about to overwrite is copied at full speed all the same, so that its writes do not wait. The limit holds for
        the way from O(scratch) into the repository too.
      - Of a running guest the first tenths of a second are copied at full speed, since libvirt takes the limit of a backup only once
        that has begun.
    type: str
  wait:
    description:
      - With V(false) the task is checked and answers at once with RV(job), while a worker on the hypervisor makes the points, from the
        freeze to the manifest. M(vmkeeper.libvirt.domain_job) shows it, waits for it, limits or cancels it.
      - The instant that the points hold is then some seconds after the answer, and that the guest could not be frozen is the
        worker's failure and not the task's.
      - Only with O(state=present).
    type: bool
    default: true
  wait_timeout:
    description:
      - How long to wait for the points, such as V(2h). No limit when left out.
      - When it passes the task fails with RV(job). The backup goes on, and the same task waits for it again. With O(encryption) wait for
        it with M(vmkeeper.libvirt.domain_job) instead, since no passphrase is kept that two tasks could be compared by.
      - Only with O(state=present).
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.hypervisor.domains
  - vmkeeper.libvirt.attributes
attributes:
  idempotent:
    support: partial
    details:
      - O(state=present) makes a new point each time, except with O(min_age).
notes:
  - Several domains are frozen, then all paused for some milliseconds, then the backups begin. If one fails, none has the point.
  - While a backup runs, a process on the hypervisor aborts it before the repository's filesystem is full, and when the module
    is killed, since a target that cannot take a copy would fail the guest's own write.
  - A repository that stalls, as on NFS, makes the backup wait and not the guest.
  - A stopped domain is copied in full, straight into the repository, and cannot be started until its disks are copied. Together with
    running ones it is copied after them. When it was started and stopped in between, or its images were otherwise written to, none has the
    point.
  - Increments go on over external snapshots and over active commits of them.
  - Every other point restores to the same content while and after a point is removed. With the newest point goes its checkpoint,
    and the next backup is a full.
seealso:
  - module: vmkeeper.libvirt.backup_retention
  - module: vmkeeper.libvirt.restore
  - module: vmkeeper.libvirt.backup_info
  - module: vmkeeper.libvirt.backup_verify
  - module: vmkeeper.libvirt.domain_job
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Back up a domain, incrementally where possible
  vmkeeper.libvirt.backup:
    domain: web01
    repository: /srv/backup

- name: Back up two machines of one application at one instant, once a day at most
  vmkeeper.libvirt.backup:
    domains: [app01, db01]
    repository: /srv/backup
    quiesce: required
    min_age: 20h
    tags:
      app: shop

- name: Back up, encrypted, to a repository on NFS
  vmkeeper.libvirt.backup:
    domain: web01
    repository: /mnt/backup
    scratch: /var/tmp/backup-scratch
    encryption:
      passphrase: "{{ vault_backup_passphrase }}"

- name: Back up a large machine in the background, gently
  vmkeeper.libvirt.backup:
    domain: files01
    repository: /srv/backup
    bandwidth: 50M
    wait: false

- name: Wait for it
  vmkeeper.libvirt.domain_job:
    domain: files01
    state: finished
    wait_timeout: 12h

- name: Remove a point
  vmkeeper.libvirt.backup:
    domain: web01
    repository: /srv/backup
    state: absent
    id: 20261120T201500Z-7f3a
"""

RETURN = r"""
restore_points:
  description: One restore point for each domain, in the order asked. Empty when a point was removed.
  returned: success, unless RV(job) is
  type: list
  elements: dict
restore_point:
  description: The restore point, when exactly one domain was asked for.
  returned: one domain, and O(state=present)
  type: dict
  contains:
    id:
      description: Identifier, which sorts by time for people. None in check mode.
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
      description: When it was made, in ISO 8601. None in check mode.
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
      description: Bytes that its images take in the repository. In check mode, the most that they may take.
      type: int
    changed_bytes:
      description: Bytes of the guest's disks that it holds.
      type: int
    disks:
      description:
        - The disks, each with its C(target), C(type), C(reason), C(parent), C(file), its C(compression) and C(encryption), which are
          None when there is none, and its sizes in bytes.
      type: list
      elements: dict
    not_captured:
      description: What it does not hold, each with C(kind), C(name), C(reason) and C(why).
      type: list
      elements: dict
    verified:
      description:
        - With O(min_age), what the last proof of a point that is there already has found, as M(vmkeeper.libvirt.backup_info) shows it.
          None for a new point, and for one that was never proved.
      type: dict
job:
  description:
    - The worker, as M(vmkeeper.libvirt.domain_job) shows it, with C(state) V(pending). That has RV(restore_points) in C(job.result)
      when it has finished.
  returned: O(wait=false), unless O(min_age) found points that are young enough; and when O(wait_timeout) has passed
  type: dict
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import removal, workers
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.plan import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domains
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names

SHORTEST_DEADLINE = 2.0


def request_of(call: _module.Call) -> Request:
    """The checked options."""
    params = call.params
    deadline = names.parse_duration(params["deadline"], "deadline")
    if deadline < SHORTEST_DEADLINE:
        raise InvalidInput(
            f"deadline {params['deadline']!r} is too short", advice=f"Use {SHORTEST_DEADLINE:.0f} s or more"
        )
    description = params["description"]
    return Request(
        type=params["type"],
        quiesce=params["quiesce"],
        disks=None if params["disks"] is None else tuple(params["disks"]),
        exclude=None if params["exclude_disks"] is None else tuple(params["exclude_disks"]),
        min_age=None if params["min_age"] is None else names.parse_duration(params["min_age"], "min_age"),
        description=None if description is None else names.check_text(description, "description"),
        tags=names.check_tags(params["tags"]),
        protected=params["protected"],
        deadline=deadline,
        compression=None if params["compression"] == "none" else params["compression"],
        passphrase=image_node.new_passphrase_option(
            (params["encryption"] or {}).get("passphrase"), "encryption.passphrase"
        ),
        scratch=None if params["scratch"] is None else names.check_directory(params["scratch"], "scratch"),
        bandwidth=names.parse_size(params["bandwidth"], "bandwidth") if params["bandwidth"] else 0,
    )


def handle(call: _module.Call) -> _module.Answer:
    """Make points, or remove one."""
    params = call.params
    if params["state"] == "absent":
        return _remove(call)
    if params["id"] is not None:
        raise InvalidInput("id is given by the backup itself", advice="Leave it out, or use state: absent")
    request = request_of(call)
    handles = find_domains(call.connection, params["domains"])
    answer = workers.backup(
        call.connection,
        call.uri,
        handles,
        params["repository"],
        request,
        check=call.check,
        wait=params["wait"],
        seconds=names.parse_duration(params["wait_timeout"], "wait_timeout") if params["wait_timeout"] else None,
    )
    if "job" in answer:
        return _module.Answer(changed=True, result={"job": answer["job"]})
    points = answer["restore_points"]
    return _module.Answer(
        changed=answer["changed"],
        result=_module.one_or_all("restore_points", "restore_point", points, len(params["domains"])),
        warnings=answer["warnings"],
        diff=({"restore_points": []}, {"restore_points": points if answer["changed"] else []}),
    )


def _remove(call: _module.Call) -> _module.Answer:
    params = call.params
    if params["id"] is None or len(params["domains"]) != 1:
        raise InvalidInput("state: absent needs one domain and an id", advice="Give both")
    for option in ("bandwidth", "wait_timeout"):
        if params[option] is not None or not params["wait"]:
            named = option if params[option] is not None else "wait: false"
            raise InvalidInput(f"{named} goes with state: present", advice="Leave it out")
    removed = removal.remove_by_id(
        call.connection,
        call.uri,
        params["repository"],
        params["domains"][0],
        params["id"],
        passphrase=image_node.passphrase_option(
            (params["encryption"] or {}).get("passphrase"), "encryption.passphrase"
        ),
        check=call.check,
    )
    return _module.Answer(
        changed=removed is not None,
        result={"restore_points": []},
        diff=({"restore_points": [removed] if removed else []}, {"restore_points": []}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domains": dict(_module.DOMAINS_OPTION, required=True),
            "repository": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "id": {"type": "str"},
            "type": {"type": "str", "choices": ["auto", "full", "incremental"], "default": "auto"},
            "min_age": {"type": "str"},
            "quiesce": {"type": "str", "choices": ["auto", "required", "never"], "default": "auto"},
            "disks": {"type": "list", "elements": "str"},
            "exclude_disks": {"type": "list", "elements": "str"},
            "compression": {"type": "str", "choices": ["none", "zlib", "zstd"], "default": "none"},
            "encryption": {
                "type": "dict",
                "no_log": True,  # the log would show it as Python writes it, where a mask for the passphrase may not match
                "options": {"passphrase": {"type": "str", "required": True, "no_log": True}},
            },
            "scratch": {"type": "path"},
            "protected": {"type": "bool", "default": False},
            "description": {"type": "str"},
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
