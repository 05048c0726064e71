#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: see, wait for, limit or cancel a running operation."""

from __future__ import annotations

DOCUMENTATION = r"""
module: domain_job
short_description: See, wait for, limit or cancel a running operation of a domain
version_added: 0.1.0
description:
  - Shows the operation that a worker does for a domain since its task was run with C(wait) V(false) or a C(wait_timeout), and the
    block jobs of its disks, whoever started them.
options:
  domain:
    description: Name or UUID of the domain, also of one that a restore or an import has yet to define.
    type: str
    required: true
  state:
    description:
      - V(finished) waits until the operation is over, and fails if it failed. Its result is in RV(job.result).
      - V(absent) cancels it, on all its domains. What can be left as it is at once is left so, with every chain whole; what cannot is
        finished.
      - Of a backup, restore, export or import that is cancelled nothing is left, unless everything was copied and checked already.
        Then it is finished.
      - Left out, nothing is waited for or cancelled.
    type: str
    choices: [finished, absent]
  bandwidth:
    description:
      - Limit the running block jobs, and those that a worker has yet to begin, to this many bytes per second, such as V(100M). V(0) takes
        a limit away.
      - A backup of a running guest is one, but not while it is moved on from a scratch directory. The copy that an export makes of a
        running guest is one, but not what is made of that copy. A restore or an import is none.
      - What an instant restore has yet to pull is limited too.
    type: str
  wait_timeout:
    description:
      - How long O(state=finished) waits, such as V(2h). No limit when left out.
      - When it passes the task fails with RV(job). The operation goes on.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
seealso:
  - module: vmkeeper.libvirt.backup
  - module: vmkeeper.libvirt.blockcommit
  - module: vmkeeper.libvirt.restore
  - module: vmkeeper.libvirt.recover_domain
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Wait for a commit that runs in the background
  vmkeeper.libvirt.domain_job:
    domain: db01
    state: finished
    wait_timeout: 2h

- name: Slow it down for the working day
  vmkeeper.libvirt.domain_job:
    domain: db01
    bandwidth: 20M
"""

RETURN = r"""
job:
  description: The newest operation of a worker for this domain, None when there is none.
  returned: always
  type: dict
  contains:
    id:
      description: Its name.
      type: str
    operation:
      description: What it does, such as V(blockcommit).
      type: str
    domains:
      description: The domains it works on.
      type: list
      elements: str
    state:
      description:
        - V(pending) while the worker is on its way, then V(running), and at last V(finished), V(failed) or V(cancelled).
        - V(interrupted) when the worker died, or never came up, since its task was killed or the host lost power while that started it.
          Run the task again.
      type: str
    started:
      description: When it was started, in ISO 8601.
      type: str
    ended:
      description: When it ended. None while it runs.
      type: str
    result:
      description: What its task would have answered, when it has finished.
      type: dict
    error:
      description: Why it failed.
      type: dict
block_jobs:
  description: The running block jobs, each with C(disk), C(type), C(bandwidth), C(done), C(total) (bytes) and C(ready).
  returned: always
  type: list
  elements: dict
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import settle
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import settle as images
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.domain_jobs import (
    block_jobs_of,
    cancel,
    limit_all,
    newest,
    subject_of,
    wait_for,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import merging

#: Kind of an operation in the journal -> how it is cancelled once nobody works on it.
CANCELLERS = {
    merging.COMMIT: merging.abandon,
    merging.REMOVAL: merging.abandon,
    settle.BACKUP: settle.settle_backup,
    settle.RESTORE: settle.settle_restore,
    images.EXPORT: images.settle_export,
    images.IMPORT: images.settle_import,
}


def handle(call: _module.Call) -> _module.Answer:
    """Show, wait, limit, cancel."""
    params = call.params
    domain = subject_of(call.connection, params["domain"])
    bandwidth = names.parse_size(params["bandwidth"], "bandwidth") if params["bandwidth"] is not None else None
    seconds = names.parse_duration(params["wait_timeout"], "wait_timeout") if params["wait_timeout"] else None
    before = block_jobs_of(domain.handle)
    changed = False
    if bandwidth is not None:
        changed = limit_all(domain, bandwidth, check=call.check)
    if params["state"] == "absent":
        changed = cancel(call.uri, domain, CANCELLERS, check=call.check) or changed
    job = newest(domain.uuid)
    if params["state"] == "finished" and job is not None and not call.check:
        job = wait_for(job, seconds=seconds)
    running = block_jobs_of(domain.handle)
    return _module.Answer(
        changed=changed,
        result={"job": job.as_result() if job else None, "block_jobs": running},
        diff=({"block_jobs": before}, {"block_jobs": running}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domain": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["finished", "absent"]},
            "bandwidth": {"type": "str"},
            "wait_timeout": {"type": "str"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
