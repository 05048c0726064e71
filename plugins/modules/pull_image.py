#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: pull an image from an OCI registry."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pull_image
short_description: Pull an image from an OCI registry
version_added: 0.1.0
description:
  - Fetches an image that M(vmkeeper.libvirt.push_image) pushed, for M(vmkeeper.libvirt.import_image) to launch.
  - Layers that an interrupted run has fetched are not fetched again, and the image appears only when everything was compared with
    its sums.
options:
  reference:
    description: The image, as C(registry.example.com/path/name:tag), or with C(@sha256:...) in place of the tag.
    type: str
    required: true
  dest:
    description: An existing directory of the hypervisor, in which the image's own directory is made.
    type: path
    required: true
  name:
    description: Name of that directory. Letters, digits and C(. _ + @ = -).
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
seealso:
  - module: vmkeeper.libvirt.push_image
  - module: vmkeeper.libvirt.import_image
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Fetch an image
  vmkeeper.libvirt.pull_image:
    reference: registry.example.com/images/web01:2026-11
    dest: /srv/images
    name: web01-golden
    username: launcher
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

import os

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.oci import parse_reference
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.registry import Access
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.transfer import pull
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names


def handle(call: _module.Call) -> _module.Answer:
    """See that the image is here."""
    params = call.params
    path = os.path.join(names.check_directory(params["dest"], "dest"), names.check_name(params["name"]))
    access = Access(params["username"], params["password"], params["validate_certs"], params["ca_cert"])
    done = pull(call.uri, parse_reference(params["reference"]), path, access, check=call.check)
    return _module.Answer(
        changed=done.changed,
        result={"reference": done.reference, "digest": done.digest, "image": done.image},
        diff=({} if done.changed else {path: done.digest}, {path: done.digest}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "reference": {"type": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "validate_certs": {"type": "bool", "default": True},
            "ca_cert": {"type": "path"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
