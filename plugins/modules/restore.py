#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: restore domains or single disks from a repository."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restore
short_description: Restore a domain or single disks from a repository
version_added: 0.1.0
description:
  - Restores a point that M(vmkeeper.libvirt.backup) made, as a new domain, in place of the original, or single disks.
  - All disks are copied beside their places and compared with the digests of the point. Only when all are complete is anything
    put in place, so that an interrupted restore changes nothing or is finished by the same task.
  - With O(mode=instant) a new domain runs within seconds, whatever its size. It stands on the images of the repository, which stay
    as they are, and everything is then copied into its own images in the background.
  - What this host lacks of the definition (machine type, CPU, networks, paths) is mapped, and each change is told as a warning.
options:
  repository:
    description: The directory of the repository.
    type: path
    required: true
  id:
    description: The restore point. The latest one of O(source_domain) when left out.
    type: str
  source_domain:
    description: Name or UUID of the domain as it was backed up. Needed when O(id) is left out.
    type: str
  latest:
    description:
      - Restore the latest point of O(source_domain). That is what happens without O(id) and O(before); V(true) says so, and refuses
        those two beside it.
    type: bool
  before:
    description: Restore the latest point made before this time, in ISO 8601 with a zone. Only with O(source_domain).
    type: str
  mode:
    description:
      - V(copy) copies and compares all disks before the domain is defined.
      - V(instant) starts a new domain at once, on overlays over the point in the repository, and then pulls all content local. Its
        content is not compared with the digests of the point. Prove the point with M(vmkeeper.libvirt.backup_verify) first.
      - While it is pulled the domain needs the repository. When the host was rebooted or QEMU has crashed meanwhile, the same task
        starts the domain again and goes on. Nothing that the guest has written is lost.
      - V(instant) needs Linux 5.12 and a repository on a local filesystem such as ext4, XFS or Btrfs. It does not go together with
        O(in_place) or O(attach_to).
      - For V(instant) of an encrypted point libvirt keeps the passphrase in its memory until all is local. When libvirtd was restarted
        before the domain stopped, or the guest was shut down meanwhile, the same task with O(passphrase) goes on.
    type: str
    choices: [copy, instant]
    default: copy
  bandwidth:
    description:
      - Limit in bytes per second, such as V(100M). No limit when left out.
      - With O(mode=copy) of the copying, one disk after another, which needs QEMU 5.2. With O(mode=instant) of the pull of each disk.
    type: str
  wait:
    description:
      - With V(false) the task is checked and answers with RV(job), while a worker on the hypervisor goes on.
        M(vmkeeper.libvirt.domain_job) shows it, waits for it or cancels it.
      - With O(mode=copy) it answers at once, and the worker does the whole restore. With O(mode=instant) it answers as soon as the guest
        runs, and the worker pulls it local.
    type: bool
    default: true
  wait_timeout:
    description:
      - How long to wait for the restore, or with O(mode=instant) for the pull of each disk, such as V(2h). No limit when left out.
      - When it passes the task fails with the job's state. The job goes on, and the same task takes it up. With O(mode=copy) and a
        O(passphrase) wait for it with M(vmkeeper.libvirt.domain_job) instead, since no passphrase is kept that two tasks could be
        compared by.
    type: str
  domain:
    description:
      - Name of the restored domain. Its original name when left out.
      - It has its original identity (UUID and MAC addresses) when it keeps its name and the original is not defined on this
        host, else a new one.
      - With a new one it has no disk that is not in the point, unless that is read-only. One that is shareable may be in use by the
        original.
    type: str
  disks:
    description: Targets of single disks to restore, with O(in_place) or O(attach_to).
    type: list
    elements: str
  attach_to:
    description: Name or UUID of an existing domain, running or not, to attach the restored O(disks) to.
    type: str
  directory:
    description:
      - An existing directory for the disks. By default each goes to the directory that it came from, if that exists, else to
        C(/var/lib/libvirt/images).
    type: path
  pool:
    description: A storage pool for the disks that is a directory, instead of O(directory).
    type: str
  network:
    description:
      - V(keep) leaves network interfaces as they were; one whose network or bridge this host lacks is disconnected.
      - V(disconnected) takes the link of all interfaces down.
      - Any other value is the name of the network to connect all interfaces to.
    type: str
    default: keep
  in_place:
    description:
      - Replace the disks of the original domain, which must be shut off. The original images are kept aside until everything is
        restored, and are then removed.
      - Without O(disks), its definition is restored too.
    type: bool
    default: false
  confirm:
    description: The name of the domain whose disks are replaced. Required by O(in_place).
    type: str
  passphrase:
    description:
      - Opens an encrypted point. It reaches QEMU's programs through memory only and is kept nowhere by us.
      - A disk that was encrypted in the guest's own image is restored encrypted, with this passphrase, and a libvirt secret is defined
        that opens it. Any other is restored as it was, not encrypted.
      - Where O(in_place) puts single O(disks) back, those keep the passphrase and the libvirt secret that they have now.
    type: str
  state:
    description:
      - V(running) starts the restored domain.
      - The default is V(defined), and V(running) with O(mode=instant), which allows nothing else.
    type: str
    choices: [defined, running]
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
attributes:
  idempotent:
    support: none
    details:
      - A restore always acts. A domain or file that exists already is not overwritten, except with O(in_place).
notes:
  - A restored image has no bitmaps, so that the next backup of a domain restored in place is a full.
  - When a file cannot be put in place, or not all O(disks) can be attached, everything is taken back. A running guest of O(attach_to) that
    does not let go of a disk within half a minute keeps it, and the error says so.
  - When the domain of an O(mode=instant) is undefined before it is pulled local, the restore is given up and fails. What the guest had
    written stays in its images, which the error names, and which the next restore does not overwrite.
seealso:
  - module: vmkeeper.libvirt.backup
  - module: vmkeeper.libvirt.backup_info
  - module: vmkeeper.libvirt.backup_verify
  - module: vmkeeper.libvirt.domain_job
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Restore the latest point beside the original, without network
  vmkeeper.libvirt.restore:
    repository: /srv/backup
    source_domain: web01
    latest: true
    domain: web01-restored
    network: disconnected

- name: Put yesterday's data disk back
  vmkeeper.libvirt.restore:
    repository: /srv/backup
    source_domain: db01
    before: "2026-11-20T00:00:00Z"
    disks: [vdb]
    in_place: true
    confirm: db01

- name: Have it running again in seconds, and pull it local in the background
  vmkeeper.libvirt.restore:
    repository: /srv/backup
    source_domain: web01
    mode: instant
    bandwidth: 100M
    wait: false

- name: Look at a lost file on another domain
  vmkeeper.libvirt.restore:
    repository: /srv/backup
    id: 20261120T201500Z-7f3a
    disks: [vda]
    attach_to: rescue
"""

RETURN = r"""
domain:
  description: The domain that was made or changed.
  returned: success, except with O(mode=copy) and O(wait=false)
  type: dict
  contains:
    name:
      description: Its name.
      type: str
    uuid:
      description: Its UUID.
      type: str
    in_place:
      description: Whether it is the original.
      type: bool
    attached:
      description: For O(attach_to), the stored disk's target and the target that it got.
      type: dict
    mapped:
      description: What was changed in the definition, as sentences.
      type: list
      elements: str
restored:
  description:
    - The files, each with C(target), C(path), C(format), C(attached_as) and C(secret), the UUID of the libvirt secret that was defined
      to open it, or None.
  returned: success, except with O(mode=copy) and O(wait=false)
  type: list
  elements: dict
id:
  description: The restore point.
  returned: success, except with O(mode=copy) and O(wait=false)
  type: str
job:
  description:
    - The worker that goes on, as M(vmkeeper.libvirt.domain_job) shows it, with C(state) V(pending).
    - With O(mode=copy) it has the other values in C(job.result) when it has finished.
  returned: O(wait=false), and when O(wait_timeout) has passed
  type: dict
"""

from collections.abc import Mapping
from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import workers
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.restore_plan import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names


def _check_choice(params: Mapping[str, Any]) -> None:
    """The point is named in one way."""
    if params["before"] is not None and (params["source_domain"] is None or params["id"] is not None):
        raise InvalidInput("before goes with source_domain and without id", advice="Give source_domain and before")
    if params["latest"] and (
        params["source_domain"] is None or params["id"] is not None or params["before"] is not None
    ):
        raise InvalidInput(
            "latest goes with source_domain, and without id and before", advice="Give source_domain and latest"
        )
    if params["latest"] is False and params["id"] is None and params["before"] is None:
        raise InvalidInput("Without latest the point must be named", advice="Give id, or before, or leave latest out")


def request_of(call: _module.Call) -> Request:
    """The checked options."""
    params = call.params
    _check_choice(params)
    instant = params["mode"] == "instant"
    return Request(
        repository=params["repository"],
        id=params["id"],
        source_domain=params["source_domain"],
        before=params["before"],
        domain=params["domain"],
        disks=None if params["disks"] is None else tuple(params["disks"]),
        directory=params["directory"],
        pool=params["pool"],
        network=params["network"],
        in_place=params["in_place"],
        confirm=params["confirm"],
        attach_to=params["attach_to"],
        running=params["state"] == "running" or (instant and params["state"] is None),
        instant=instant,
        bandwidth=names.parse_size(params["bandwidth"], "bandwidth") if params["bandwidth"] else 0,
        wait=params["wait"],
        wait_seconds=names.parse_duration(params["wait_timeout"], "wait_timeout") if params["wait_timeout"] else None,
        passphrase=image_node.passphrase_option(params["passphrase"], "passphrase"),
    )


def handle(call: _module.Call) -> _module.Answer:
    """Restore."""
    answer = workers.restore(call.connection, call.uri, request_of(call), check=call.check)
    result: dict[str, Any] = {key: answer[key] for key in ("domain", "restored", "id", "job") if key in answer}
    return _module.Answer(
        changed=answer["changed"],
        result=result,
        warnings=answer["warnings"],
        diff=({"restored": []}, {key: result[key] for key in ("domain", "restored") if key in result}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "repository": {"type": "path", "required": True},
            "id": {"type": "str"},
            "source_domain": {"type": "str"},
            "latest": {"type": "bool"},
            "before": {"type": "str"},
            "domain": {"type": "str"},
            "disks": {"type": "list", "elements": "str"},
            "attach_to": {"type": "str"},
            "directory": {"type": "path"},
            "pool": {"type": "str"},
            "network": {"type": "str", "default": "keep"},
            "in_place": {"type": "bool", "default": False},
            "confirm": {"type": "str"},
            "state": {"type": "str", "choices": ["defined", "running"]},
            "mode": {"type": "str", "choices": ["copy", "instant"], "default": "copy"},
            "bandwidth": {"type": "str"},
            "wait": {"type": "bool", "default": True},
            "wait_timeout": {"type": "str"},
            "passphrase": {"type": "str", "no_log": True},
        },
        handle,
    )


if __name__ == "__main__":
    main()
