#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: prove that a restore point restores."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_verify
short_description: Prove that a restore point can be restored
version_added: 0.1.0
description:
  - Reads every stored byte that a restore of the point needs, through its whole chain, and compares it with the digests that
    were written when it was made. A failed proof fails the task.
  - With O(level=boot) a guest of its own is booted from the point, asked whether it is well, and thrown away. It has a fresh name,
    UUID and firmware variables of its own, no disk but the point's, no network and no device of the host, and nothing is written to
    the point's images.
  - The outcome is kept as C(verify.json) beside the manifest, and shown by M(vmkeeper.libvirt.backup_info). Where the repository is
    full or read-only it is only returned, with a warning.
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
  level:
    description:
      - V(digest) checks that the manifest, the links between the images and all content are what was written.
      - V(structure) also has each image of the chain checked by C(qemu-img check).
      - V(boot) then also boots it. Only the guest's agent, or O(boot_check), proves that it has booted, never that something runs. A
        domain without a guest agent channel is refused.
      - V(boot) needs Linux 5.12, a repository on a local filesystem such as ext4, XFS or Btrfs, the guest's memory on this host, and
        O(passphrase) for an encrypted point. A guest that boots from a kernel of its host needs that kernel here.
    type: str
    choices: [digest, structure, boot]
    default: structure
  boot_check:
    description:
      - A program in the guest with its arguments, run through the agent without a shell. The point is proved when it ends with status
        V(0). It is tried again until O(boot_timeout).
      - By default the point is proved when the agent answers.
    type: list
    elements: str
  boot_timeout:
    description: How long the guest may take from its start to the proof.
    type: str
    default: 5m
  passphrase:
    description:
      - Opens an encrypted point, so that its content is proved, and for O(level=boot) the guest. What that guest writes is encrypted,
        too.
      - Without it, the files of an encrypted point are proved to be what was written, and RV(not_checked) says what that leaves open.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
attributes:
  idempotent:
    support: N/A
    details:
      - It proves anew each time and reports no change. Only C(verify.json) and C(screenshot.png) beside the manifest are written.
notes:
  - In check mode nothing is booted, and RV(verified) is null at O(level=boot).
  - When a proof was interrupted, the guest is destroyed at once by libvirt. The next proof of the domain, or
    M(vmkeeper.libvirt.recover_domain), removes what else is left.
seealso:
  - module: vmkeeper.libvirt.backup
  - module: vmkeeper.libvirt.backup_info
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Prove the latest point of a domain
  vmkeeper.libvirt.backup_verify:
    repository: /srv/backup
    source_domain: web01

- name: Prove that its database comes up
  vmkeeper.libvirt.backup_verify:
    repository: /srv/backup
    source_domain: db01
    level: boot
    boot_check: [systemctl, is-active, postgresql]
    boot_timeout: 10m
"""

RETURN = r"""
verified:
  description: Whether the point is proved.
  returned: success, and failure of the proof
  type: bool
id:
  description: The point.
  returned: success, and failure of the proof
  type: str
level:
  description: How it was proved.
  returned: success, and failure of the proof
  type: str
findings:
  description: What is wrong, each with C(point), C(disk) and C(problem).
  returned: success, and failure of the proof
  type: list
  elements: dict
boot_seconds:
  description: Time from the guest's start to the proof.
  returned: O(level=boot)
  type: float
screenshot:
  description: Path of the picture of the guest's screen when it was proved, or given up. Null when none could be taken.
  returned: O(level=boot)
  type: str
not_checked:
  description: Sentences about what could not be looked at without a passphrase.
  returned: success
  type: list
  elements: str
"""

from functools import partial

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import boot_proof, listing, verifying
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import open_repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names


def handle(call: _module.Call) -> _module.Answer:
    """Verify one point."""
    params = call.params
    if params["id"] is None and params["source_domain"] is None:
        raise InvalidInput("Neither id nor source_domain is given", advice="Give one of them")
    repository = open_repository(params["repository"])
    found = listing.find_point(repository, identifier=params["id"], source=params["source_domain"])
    passphrase = image_node.passphrase_option(params["passphrase"], "passphrase")
    boot = None
    if params["level"] == "boot":
        request = boot_proof.Request(
            tuple(params["boot_check"]) if params["boot_check"] else None,
            names.parse_duration(params["boot_timeout"], "boot_timeout"),
        )
        boot = partial(boot_proof.boot, call.connection, call.uri, repository, request=request, passphrase=passphrase)
    elif params["boot_check"]:
        raise InvalidInput("boot_check goes with level: boot", advice="Leave it out, or give level: boot")
    proof = verifying.prove(repository, found, params["level"], passphrase, boot=boot, check=call.check)
    result = {
        "verified": proof.verified,
        "id": found.point.id,
        "level": params["level"],
        "findings": [],
        "not_checked": list(proof.not_checked),
    }
    if boot is not None:
        result.update(boot_seconds=proof.boot_seconds, screenshot=proof.screenshot)
    warnings = [*proof.not_checked, *([proof.not_kept] if proof.not_kept else [])]
    return _module.Answer(changed=False, result=result, warnings=warnings)


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "repository": {"type": "path", "required": True},
            "id": {"type": "str"},
            "source_domain": {"type": "str"},
            "level": {"type": "str", "choices": ["digest", "structure", "boot"], "default": "structure"},
            "boot_check": {"type": "list", "elements": "str"},
            "boot_timeout": {"type": "str", "default": "5m"},
            "passphrase": {"type": "str", "no_log": True},
        },
        handle,
    )


if __name__ == "__main__":
    main()
