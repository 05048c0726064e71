#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: freeze and thaw guest filesystems."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fsfreeze
short_description: Freeze and thaw the filesystems of guests
version_added: 0.1.0
description:
  - Freezes the filesystems of running guests through their guest agent, and thaws them again.
  - Before anything is frozen, a guard is started on the hypervisor. It thaws the guest when O(deadline) has passed, whatever
    has become of the playbook, the controller or the connection, and goes on until the agent says that the guest is thawed.
  - To take a consistent snapshot, use M(vmkeeper.libvirt.snapshot), which freezes for milliseconds by itself. This module is
    for steps of your own between a freeze and a thaw, such as a snapshot in a storage array.
options:
  state:
    description:
      - V(frozen) sees that the filesystems are frozen and that a guard watches over them. A guest that is frozen under a
        guard already is left alone, with the deadline that it has.
      - A guest that somebody else has frozen gets a guard and O(deadline), with a warning. Which of its filesystems are frozen
        nobody can tell, so no snapshot or backup takes such a freeze for a proof.
      - V(thawed) sees that nothing is frozen. A domain that was saved to disk before its freeze had ended is refused, since it
        comes back frozen. Its guard thaws it when it runs again, at the deadline or, if that has passed, at once.
    type: str
    choices: [frozen, thawed]
    required: true
  mountpoints:
    description:
      - Freeze these mountpoints of the guest only. One that does not exist is an error.
      - A thaw is always for all.
    type: list
    elements: str
  deadline:
    description:
      - How long the freeze may last. Then the hypervisor thaws the guest by itself.
      - A duration such as V(90s) or V(2m), or seconds.
    type: str
    default: 60s
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.hypervisor.domains
  - vmkeeper.libvirt.attributes
seealso:
  - module: vmkeeper.libvirt.snapshot
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Freeze a database host for a snapshot of the storage array
  vmkeeper.libvirt.fsfreeze:
    domain: db01
    state: frozen
    deadline: 30s

- name: Thaw it
  vmkeeper.libvirt.fsfreeze:
    domain: db01
    state: thawed
"""

RETURN = r"""
domains:
  description: One entry for each domain, in the order asked.
  returned: success
  type: list
  elements: dict
  contains:
    domain:
      description: Name of the domain.
      type: str
    frozen:
      description: Whether its filesystems are frozen now.
      type: bool
    filesystems:
      description: Mountpoints in the guest that this concerns, as far as the agent lists them.
      type: list
      elements: str
    deadline_at:
      description: When the guard thaws it, in ISO 8601. None when it is not frozen.
      type: str
frozen:
  description: Whether the filesystems of all domains asked for are frozen now.
  returned: success
  type: bool
filesystems:
  description: As in RV(domains), when exactly one domain was asked for.
  returned: one domain
  type: list
  elements: str
deadline_at:
  description: As in RV(domains), when exactly one domain was asked for.
  returned: one domain
  type: str
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domains
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import standing_freeze
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.names import parse_duration

SHORTEST_DEADLINE = 2.0


def handle(call: _module.Call) -> _module.Answer:
    """Freeze or thaw."""
    deadline = parse_duration(call.params["deadline"], "deadline")
    if deadline < SHORTEST_DEADLINE:
        raise InvalidInput(
            f"deadline {call.params['deadline']} is too short",
            advice=f"Give at least {SHORTEST_DEADLINE:.0f} s",
        )
    handles = find_domains(call.connection, call.params["domains"])
    if call.params["state"] == "frozen":
        conditions = standing_freeze.freeze(
            call.uri, handles, mountpoints=call.params["mountpoints"], deadline=deadline, check=call.check
        )
    else:
        conditions = standing_freeze.thaw(handles, check=call.check)
    entries = [condition.as_result() for condition in conditions]
    result = {"domains": entries, "frozen": all(condition.frozen for condition in conditions)}
    if len(entries) == 1:
        result.update(filesystems=entries[0]["filesystems"], deadline_at=entries[0]["deadline_at"])
    return _module.Answer(
        changed=any(condition.changed for condition in conditions),
        result=result,
        diff=(
            {condition.domain: "frozen" if condition.was_frozen else "thawed" for condition in conditions},
            {condition.domain: "frozen" if condition.frozen else "thawed" for condition in conditions},
        ),
        warnings=[
            f"The guest of domain {condition.domain!r} was frozen by other means, perhaps not wholly: it has a guard now, and no"
            " snapshot or backup takes the freeze for a proof"
            for condition in conditions
            if condition.adopted
        ],
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domains": {**_module.DOMAINS_OPTION, "required": True},
            "state": {"type": "str", "choices": ["frozen", "thawed"], "required": True},
            "mountpoints": {"type": "list", "elements": "str"},
            "deadline": {"type": "str", "default": "60s"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
