#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: finish or undo what interrupted runs left."""

from __future__ import annotations

DOCUMENTATION = r"""
module: recover_domain
short_description: Finish or undo what interrupted runs left on domains
version_added: 0.1.0
description:
  - Thaws and resumes guests that a dead run left frozen or paused, and finishes or takes back every operation of this collection
    that was interrupted, by what is true on the hypervisor now.
  - The modules do the same for operations of their own kind before they change a domain. This one knows all of them, and can be
    run after a crash of the hypervisor or from a schedule.
  - Without O(domains) this includes what was left for domains that are not defined here, such as restore points being removed,
    and by pulls and pushes of images. A base of linked disks (M(vmkeeper.libvirt.import_image)) goes when no definition, snapshot
    or saved state on this host, no image in the directory of the disks or in a pool, and no process uses it any more.
  - A domain that was still being made, by M(vmkeeper.libvirt.import_image) or M(vmkeeper.libvirt.restore), can be named in
    O(domains) too.
  - In check mode it only tells what it found.
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.hypervisor.domains_optional
  - vmkeeper.libvirt.attributes
notes:
  - An operation that is still running is left alone. The module waits for it for up to a minute, then fails and names it.
  - The task fails if something could not be settled. RV(findings) then has all that was found, and why it could not.
seealso:
  - module: vmkeeper.libvirt.domain_info
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Settle everything on this hypervisor
  vmkeeper.libvirt.recover_domain:

- name: See what was left on one domain
  vmkeeper.libvirt.recover_domain:
    domain: web01
  check_mode: true
  register: left
"""

RETURN = r"""
findings:
  description: What was found, an empty list when there was nothing.
  returned: always
  type: list
  elements: dict
  contains:
    domain:
      description: Name of the domain. The path of what belongs to none, such as an image that was being pulled.
      type: str
    what:
      description: What was found.
      type: str
    action:
      description: What was done about it, or would be.
      type: str
    settled:
      description: Whether it is over.
      type: bool
    left:
      description:
        - Files and directories that lay around because of it, where its operation can tell. They are gone when it was taken back.
      type: list
      elements: str
"""

from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import NotFound, Unfinished
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import instant_restore
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import settlers as backup
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domains
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import bases
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import settle as images
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.recovery import (
    recover,
    recover_undefined,
    unfinished_without_domain,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing import settle as sizing
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import settlers
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.leftovers import finish_removals

#: Every trade's; kinds of operations have different names.
SETTLERS = {**settlers.SETTLERS, **backup.SETTLERS, **images.RECOVERERS, **sizing.SETTLERS}

#: Those that may have to wait for a copy.
LONG = (*settlers.LONG, instant_restore.KIND)

#: Those that can say what lies around.
TELLERS = {**images.TELLERS}


def find(call: _module.Call) -> tuple[list[Any], list[str]]:
    """The domains that are meant and defined, and the names of those that something was left for before they were."""
    wanted = call.params["domains"]
    if not wanted:
        return sorted(call.connection.listAllDomains(), key=lambda one: one.name()), []
    undefined = {
        name
        for uuid, its_name, _operation in unfinished_without_domain(call.connection, wanted)
        for name in (uuid, its_name)
    }
    defined = [name for name in wanted if name not in undefined or _is_defined(call.connection, name)]
    return find_domains(call.connection, defined), sorted(undefined.intersection(wanted))


def _is_defined(connection: Any, name: str) -> bool:
    """One that was made again under its name has another UUID, and may have been left something, too."""
    try:
        find_domains(connection, [name])
    except NotFound:
        return False
    return True


def handle(call: _module.Call) -> _module.Answer:
    """Settle what was left."""
    handles, undefined = find(call)
    findings = recover(call.uri, handles, SETTLERS, TELLERS, last=LONG, check=call.check)
    if undefined or not call.params["domains"]:
        names = undefined or None
        findings += recover_undefined(call.uri, call.connection, SETTLERS, TELLERS, names=names, check=call.check)
    if not call.params["domains"]:
        findings += bases.remove_unused(call.connection, check=call.check)
    for one in handles:
        findings += finish_removals(call.uri, one, check=call.check)
    failed = [one for one in findings if not one["settled"]]
    if failed and not call.check:
        raise Unfinished(
            "; ".join(f"{one['domain']}: {one['what']}: {one['action']}" for one in failed),
            state="What else was found is settled.",
            findings=findings,
        )
    return _module.Answer(
        changed=bool(findings),
        result={"findings": findings},
        diff=({"unfinished": [one["what"] for one in findings]}, {"unfinished": []}),
    )


def main() -> None:
    """Entry point."""
    _module.run({"domains": dict(_module.DOMAINS_OPTION)}, handle)


if __name__ == "__main__":
    main()
