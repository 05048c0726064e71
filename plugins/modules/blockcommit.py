#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: shorten the chains of a domain's disks."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockcommit
short_description: Shorten the chains of images that domains stand on
version_added: 0.1.0
description:
  - Commits upper layers of a chain into lower ones, while the guest runs or when it is shut off. What the guest sees stays the
    same at every instant.
  - A layer's file is deleted only when the domain's live and inactive definitions, not an event, say that it is no longer used,
    and nobody else on the host names it or has it open.
  - Snapshots whose content lies in a layer that is written or goes end with it. They are named in RV(snapshots_ended).
  - A layer that anybody else on this host reads is never written. Other domains, running, defined or saved, snapshots, images
    that stand on it and foreign processes are looked at under the lock.
  - A block job that already runs for the same commit is taken up.
  - Where AppArmor lets the running guest only read the lower layers (libvirt before 12.1, see the notes), their content is pulled
    up into the active layer, or, with O(allow_restart), committed while the guest is shut off. RV(disks) says which way was taken.
options:
  disks:
    description: Targets of the only disks to work on, such as V(vda). All disks when left out.
    type: list
    elements: str
  top:
    description:
      - Path of the uppermost layer to commit. The active layer when left out.
      - Needs exactly one disk in O(disks).
    type: path
  base:
    description:
      - Path of the layer to commit into. The lowest layer when left out.
      - Needs exactly one disk in O(disks).
    type: path
  keep:
    description:
      - How many layers of each chain may remain, the lowest included. The oldest layers are merged first, so the newest snapshots
        stay. V(1) leaves a flat chain.
      - A lowest layer that others read, such as the base of linked clones, stays as it is and counts.
      - The default is V(1). Not together with O(top) or O(base).
    type: int
  remove_committed:
    description:
      - Delete the files of the layers that were committed.
      - A file that is left still names its old backing file. Move it away before the next commit, which would otherwise refuse to
        write under it.
    type: bool
    default: true
  allow_restart:
    description:
      - Where layers can be merged neither by commit nor by pull while the guest runs, shut it down cleanly, merge them, and start it
        again. With V(false) the task refuses instead.
      - Nothing is shut down where there is a way without.
    type: bool
    default: false
  bandwidth:
    description: Limit of the commit in bytes per second, such as V(100M). No limit when left out.
    type: str
  wait:
    description:
      - With V(false) the task is checked and answers at once with RV(job), while a worker on the hypervisor does the work.
        M(vmkeeper.libvirt.domain_job) shows it, waits for it, limits or cancels it.
      - Where nothing is to be done there is no worker, and the task answers as one that waits. The same task again, while its worker is
        at work, answers with that worker.
    type: bool
    default: true
  wait_timeout:
    description:
      - How long to wait for each running job, such as V(2h). No limit when left out.
      - When it passes the task fails with the job's state. The job goes on, and the same task takes it up.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.hypervisor.domains
  - vmkeeper.libvirt.attributes
notes:
  - It refuses, before anything is changed, a layer that others read or have open, a snapshot that is protected, a managed-save
    image, a broken chain, a layer smaller than the one below it, internal snapshots in a layer that would go, an encrypted disk
    of a stopped domain, another job on the domain or the disk, a layer that is not a local file or block device, and a restart
    (O(allow_restart)) at which a disk would be another one.
  - A commit of a stopped domain keeps what its dirty bitmaps have recorded, where the lower layer is qcow2.
  - Before libvirt 12.1 AppArmor lets a running guest write only to layers that were made since it was started, since its last backup and
    since its last commit below the active layer. Its profile is read before anything is changed. Where it denies a layer of a run
    that reaches the active layer, the run is pulled into that, if the filesystem has room for it. Then the file names change
    (RV(disks)), the checkpoints of this collection end, and an image that stood on nothing is left where it lies, with a warning,
    unless an overlay of this collection had become that by an earlier pull. A run below the active layer cannot be pulled, nor can
    one where other tools have checkpoints.
seealso:
  - module: vmkeeper.libvirt.snapshot
  - module: vmkeeper.libvirt.snapshot_info
  - module: vmkeeper.libvirt.domain_job
  - module: vmkeeper.libvirt.recover_domain
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Make the chains of a running guest flat
  vmkeeper.libvirt.blockcommit:
    domain: web01

- name: Make them flat tonight, also where that needs the guest to be off for a while
  vmkeeper.libvirt.blockcommit:
    domain: web01
    allow_restart: true

- name: Merge the oldest layers until four remain, gently
  vmkeeper.libvirt.blockcommit:
    domain: db01
    keep: 4
    bandwidth: 50M
"""

RETURN = r"""
disks:
  description: One entry for each disk, domains in the order asked.
  returned: success
  type: list
  elements: dict
  contains:
    domain:
      description: Name of the domain.
      type: str
    disk:
      description: Target of the disk.
      type: str
    chain_before:
      description: The layers before, from the active one down.
      type: list
      elements: str
    chain_after:
      description: The layers after.
      type: list
      elements: str
    method:
      description:
        - V(live) for a commit by the running guest, V(pull) when the content of the lower layers was copied into the active one,
          V(offline) for a commit while the guest was off. None where nothing was merged.
      type: str
    why:
      description: Why it was not committed live although the guest runs. Empty otherwise.
      type: str
    committed_bytes:
      description: Bytes on disk of the layers that were committed or pulled. None in check mode and with O(wait=false).
      type: int
    removed:
      description: The files that were deleted.
      type: list
      elements: str
snapshots_ended:
  description: The snapshots that ended, each with C(domain) and C(name).
  returned: success
  type: list
  elements: dict
job:
  description: The worker, with its C(id), C(operation), C(domains), C(state) (V(pending)) and C(started).
  returned: O(wait=false), where there is something to do
  type: dict
"""

from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domains
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.commit_plan import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.committing import as_result, commit, start


def request_of(call: _module.Call) -> Request:
    """The checked options."""
    params = call.params
    return Request(
        disks=tuple(params["disks"]) if params["disks"] is not None else None,
        top=params["top"],
        base=params["base"],
        keep=params["keep"],
        remove=params["remove_committed"],
        bandwidth=names.parse_size(params["bandwidth"], "bandwidth") if params["bandwidth"] else 0,
        allow_restart=params["allow_restart"],
    )


def handle(call: _module.Call) -> _module.Answer:
    """Shorten the chains."""
    request = request_of(call)
    limit = call.params["wait_timeout"]
    seconds = names.parse_duration(limit, "wait_timeout") if limit else None
    handles = find_domains(call.connection, call.params["domains"])
    if not call.params["wait"] and not call.check:
        answer = start(call.uri, handles, request)
        if "job" in answer:
            return _module.Answer(changed=True, result={"job": answer["job"]})
    else:
        answer = as_result(commit(call.uri, handles, request, check=call.check, seconds=seconds))
    return _module.Answer(
        changed=answer["changed"],
        result={"disks": answer["disks"], "snapshots_ended": answer["snapshots_ended"]},
        warnings=answer["warnings"],
        diff=(
            _chains(answer["disks"], "chain_before"),
            _chains(answer["disks"], "chain_after"),
        ),
    )


def _chains(disks: list[dict[str, Any]], key: str) -> dict[str, dict[str, list[str]]]:
    """One side of the diff: domain -> disk -> chain."""
    chains: dict[str, dict[str, list[str]]] = {}
    for disk in disks:
        chains.setdefault(disk["domain"], {})[disk["disk"]] = disk[key]
    return chains


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domains": {**_module.DOMAINS_OPTION, "required": True},
            "disks": {"type": "list", "elements": "str"},
            "top": {"type": "path"},
            "base": {"type": "path"},
            "keep": {"type": "int"},
            "remove_committed": {"type": "bool", "default": True},
            "allow_restart": {"type": "bool", "default": False},
            "bandwidth": {"type": "str"},
            "wait": {"type": "bool", "default": True},
            "wait_timeout": {"type": "str"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
