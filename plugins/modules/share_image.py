#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: say who may read an image on this hypervisor."""

from __future__ import annotations

DOCUMENTATION = r"""
module: share_image
short_description: Say who may read an image on this hypervisor
version_added: 0.1.0
description:
  - Gives users and groups of the hypervisor read access to an image, by POSIX ACLs. An image is readable by root only before that.
  - The list is declared whole. Whoever is not in it has no access any more.
  - Keeps C(CATALOGUE.md) beside the images, which lists the shared ones for those with whom any is shared.
options:
  src:
    description: Path of the image's directory.
    type: path
    required: true
  share_with:
    description: Those who may read it, each as C(user:NAME) or C(group:NAME). An empty list makes it private again.
    type: list
    elements: str
    required: true
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
requirements:
  - setfacl and getfacl (package acl), and a filesystem with POSIX ACLs
notes:
  - A file that somebody has opened or copied before stays theirs. Revoking ends new access.
seealso:
  - module: vmkeeper.libvirt.export_image
  - module: vmkeeper.libvirt.push_image
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Share an image with one user and one team
  vmkeeper.libvirt.share_image:
    src: /srv/images/web01-golden
    share_with: ["user:alice", "group:ops"]

- name: Make it private again
  vmkeeper.libvirt.share_image:
    src: /srv/images/web01-golden
    share_with: []
"""

RETURN = r"""
share_with:
  description: Those who may read it now.
  returned: success
  type: list
  elements: str
image:
  description: The image, as M(vmkeeper.libvirt.export_image) returns it.
  returned: success
  type: dict
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.access import parse_principals, share


def handle(call: _module.Call) -> _module.Answer:
    """See that exactly these may read the image."""
    params = call.params
    done = share(params["src"], parse_principals(params["share_with"]), check=call.check)
    return _module.Answer(
        changed=done.changed,
        result={"share_with": done.after, "image": done.image},
        warnings=done.warnings,
        diff=({params["src"]: done.before}, {params["src"]: done.after}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "src": {"type": "path", "required": True},
            "share_with": {"type": "list", "elements": "str", "required": True},
        },
        handle,
    )


if __name__ == "__main__":
    main()
