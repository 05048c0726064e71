#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: push an image to an OCI registry."""

from __future__ import annotations

DOCUMENTATION = r"""
module: push_image
short_description: Push an image to an OCI registry
version_added: 0.1.0
description:
  - Shares an image that M(vmkeeper.libvirt.export_image) made through any OCI registry, from where
    M(vmkeeper.libvirt.pull_image) fetches it.
  - The same reference is a containerDisk for KubeVirt, with the disks in C(/disk).
  - Layers that the registry has already are not sent again, and the tag appears only when everything is there.
options:
  src:
    description: Path of the image's directory on the hypervisor. Its disks must be qcow2 or raw.
    type: path
    required: true
  reference:
    description: Where to push it, as C(registry.example.com/path/name:tag). The tag is C(latest) when left out.
    type: str
    required: true
  username:
    description: User of the registry. Without it nobody is logged in.
    type: str
  password:
    description:
      - Password or token of O(username).
      - It is handed over in a private file in memory, and is on no command line.
    type: str
  validate_certs:
    description: Whether the registry has to prove with a certificate who it is.
    type: bool
    default: true
  ca_cert:
    description: Path of a PEM file on the hypervisor with the authority that issued the registry's certificate.
    type: path
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
requirements:
  - skopeo 1.6 or later on the hypervisor
notes:
  - It needs room beside the image for a second copy of it while it runs.
seealso:
  - module: vmkeeper.libvirt.pull_image
  - module: vmkeeper.libvirt.export_image
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Share an image with other sites
  vmkeeper.libvirt.push_image:
    src: /srv/images/web01-golden
    reference: registry.example.com/images/web01:2026-11
    username: builder
    password: "{{ registry_password }}"
"""

RETURN = r"""
reference:
  description: The reference that was used.
  returned: success
  type: str
digest:
  description: sha256 of the image in the registry, which names it whatever becomes of its tag.
  returned: success
  type: str
image:
  description: The image, as M(vmkeeper.libvirt.export_image) returns it. None in check mode when it is not here yet.
  returned: success
  type: dict
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.oci import parse_reference
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.registry import Access
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.transfer import push


def handle(call: _module.Call) -> _module.Answer:
    """See that the registry has the image."""
    params = call.params
    reference = parse_reference(params["reference"])
    if reference.digest is not None:
        raise InvalidInput(
            "An image is pushed to a tag, and its digest follows from its content", advice="Leave out @sha256"
        )
    access = Access(params["username"], params["password"], params["validate_certs"], params["ca_cert"])
    done = push(call.uri, params["src"], reference, access, check=call.check)
    return _module.Answer(
        changed=done.changed,
        result={"reference": done.reference, "digest": done.digest, "image": done.image},
        diff=({} if done.changed else {done.reference: done.digest}, {done.reference: done.digest}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "src": {"type": "path", "required": True},
            "reference": {"type": "str", "required": True},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "validate_certs": {"type": "bool", "default": True},
            "ca_cert": {"type": "path"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
