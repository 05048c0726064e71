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
  - The outcome is kept as C(verify.json) beside the manifest, and shown by M(vmkeeper.libvirt.backup_info).
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
    type: str
    choices: [digest, structure]
    default: structure
  passphrase:
    description:
      - Opens an encrypted point, so that its content is proved.
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
      - It proves anew each time and reports no change. Only C(verify.json) is written.
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
not_checked:
  description: Sentences about what could not be looked at without a passphrase.
  returned: success
  type: list
  elements: str
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import listing, verifying
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import open_repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node


def handle(call: _module.Call) -> _module.Answer:
    """Verify one point."""
    params = call.params
    if params["id"] is None and params["source_domain"] is None:
        raise InvalidInput("Neither id nor source_domain is given", advice="Give one of them")
    repository = open_repository(params["repository"])
    found = listing.find_point(repository, identifier=params["id"], source=params["source_domain"])
    passphrase = image_node.passphrase_option(params["passphrase"], "passphrase")
    not_checked = verifying.prove(repository, found, params["level"], passphrase, check=call.check)
    result = {"verified": True, "id": found.point.id, "level": params["level"], "findings": []}
    return _module.Answer(changed=False, result={**result, "not_checked": not_checked}, warnings=not_checked)


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "repository": {"type": "path", "required": True},
            "id": {"type": "str"},
            "source_domain": {"type": "str"},
            "level": {"type": "str", "choices": ["digest", "structure"], "default": "structure"},
            "passphrase": {"type": "str", "no_log": True},
        },
        handle,
    )


if __name__ == "__main__":
    main()
