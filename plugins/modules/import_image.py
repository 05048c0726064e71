#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: launch an image as a new domain."""

from __future__ import annotations

DOCUMENTATION = r"""
module: import_image
short_description: Launch an image as a new domain
version_added: 0.1.0
description:
  - Makes a new domain of an image that M(vmkeeper.libvirt.export_image) made on any host, or M(vmkeeper.libvirt.pull_image) fetched.
  - The image is taken for hostile. Its files are copied, their sums compared, their headers read by a parser that opens nothing
    else, and converted within limits into fresh disks. The definition is built from the manifest's checked numbers. Nothing of the
    exporting host's definition is in an image, so no path, device, script or command line can come along.
  - The domain has a new UUID and new MAC addresses, and this host's machine version and CPU.
options:
  src:
    description: Path of the image's directory on the hypervisor.
    type: path
    required: true
  domain:
    description: Name of the new domain. Letters, digits and C(. _ + @ = -).
    type: str
    required: true
  directory:
    description: An existing directory of the hypervisor for the disks. C(/var/lib/libvirt/images) when neither it nor O(pool) is given.
    type: path
  pool:
    description: A storage pool for the disks that is a directory, instead of O(directory).
    type: str
  mode:
    description:
      - V(copy) gives the domain whole disks of its own.
      - V(linked) gives it overlays on a base that all domains linked to the same image in O(directory) share. The first launch
        makes the base, and every other takes a moment. The base belongs to root and can be read by QEMU, not written.
    type: str
    choices: [copy, linked]
    default: copy
  vcpus:
    description: Number of virtual CPUs, in place of the image's.
    type: int
  memory:
    description: Memory in place of the image's, such as V(4G), or bytes.
    type: str
  network:
    description:
      - A libvirt network of this host to connect the domain's interfaces to.
      - Without it the domain has no interface.
    type: str
  passphrase:
    description:
      - What opens an image whose disks are encrypted. The new domain's disks are not encrypted.
    type: str
  virt_type:
    description: V(auto) takes V(kvm) where C(/dev/kvm) can be used and libvirt offers it, else V(qemu).
    type: str
    choices: [auto, kvm, qemu]
    default: auto
  state:
    description: V(defined) leaves a new domain shut off, and does not stop one that runs. V(running) starts it.
    type: str
    choices: [defined, running]
    default: defined
  wait:
    description:
      - With V(false) the task is checked and answers at once with RV(job), while a worker on the hypervisor does all of it, the
        domain's start included. M(vmkeeper.libvirt.domain_job) shows it, waits for it or cancels it, also before the domain is
        defined.
    type: bool
    default: true
  wait_timeout:
    description:
      - How long to wait, such as V(2h). No limit when left out.
      - When it passes the task fails with RV(job). The import goes on, and the same task waits for it again.
        With O(passphrase) wait for it with
        M(vmkeeper.libvirt.domain_job), since it is kept nowhere to be recognized by.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
attributes:
  idempotent:
    support: full
    details:
      - A domain that was launched from this very image is left alone, and started if it has to run.
        M(vmkeeper.libvirt.resize_domain) may have changed its size since. Another O(vcpus) or O(memory) than it was launched with, or
        has now, is refused.
notes:
  - The host never mounts or parses the guest's filesystems.
  - A base of V(linked) disks lies in C(.vmkeeper-bases) below O(directory). It stays when the last domain on it is gone, until
    M(vmkeeper.libvirt.recover_domain) without O(vmkeeper.libvirt.recover_domain#module:domains) removes it.
seealso:
  - module: vmkeeper.libvirt.export_image
  - module: vmkeeper.libvirt.pull_image
  - module: vmkeeper.libvirt.domain_job
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Launch a copy of an exported machine
  vmkeeper.libvirt.import_image:
    src: /srv/images/web01-golden
    domain: web02
    network: default
    state: running

- name: Launch a larger one on shared disks, in a moment
  vmkeeper.libvirt.import_image:
    src: /srv/images/web01-golden
    domain: web03
    mode: linked
    vcpus: 8
    memory: 16G
    network: default
    state: running
"""

RETURN = r"""
domain:
  description: The domain.
  returned: success, except where a worker goes on
  type: dict
  contains:
    name:
      description: Its name.
      type: str
    uuid:
      description: Its UUID. None in check mode.
      type: str
    state:
      description: Its state, such as V(running) or V(shutoff).
      type: str
    vcpus:
      description: Number of its virtual CPUs.
      type: int
    memory:
      description: Its memory in bytes.
      type: int
    disks:
      description: Its disks, each with C(target) and C(path).
      type: list
      elements: dict
image:
  description: The image that it was launched from, as M(vmkeeper.libvirt.export_image) returns it.
  returned: success, except where a worker goes on
  type: dict
job:
  description: The worker, with its C(id), C(operation), C(domains), C(state) (V(pending)) and C(started).
  returned: O(wait=false), unless there was nothing to do; and when O(wait_timeout) has passed
  type: dict
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import pools
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import passphrase_option
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.importing import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.manifest import LARGEST_MEMORY, MOST_VCPUS
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.workers import import_image
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.long_operation import Waiting

LEAST_MEMORY = 1 << 20

DEFAULT_DIRECTORY = "/var/lib/libvirt/images"


def directory_for(call: _module.Call) -> str:
    """Where the disks go."""
    directory, pool = call.params["directory"], call.params["pool"]
    if directory and pool:
        raise InvalidInput("directory and pool exclude each other", advice="Give one of them")
    if pool:
        return names.check_directory(pools.directory_of(call.connection, pool), "the pool's directory")
    return names.check_directory(directory or DEFAULT_DIRECTORY)


def request_of(call: _module.Call) -> Request:
    """The checked options."""
    params = call.params
    memory = names.parse_size(params["memory"], "memory") if params["memory"] is not None else None
    if memory is not None and not LEAST_MEMORY <= memory <= LARGEST_MEMORY:
        raise InvalidInput(f"memory {params['memory']} is out of range", advice="Give 1M to 16T")
    if params["vcpus"] is not None and not 1 <= params["vcpus"] <= MOST_VCPUS:
        raise InvalidInput(f"vcpus {params['vcpus']} is out of range", advice=f"Give 1 to {MOST_VCPUS}")
    return Request(
        src=params["src"],
        domain=names.check_name(params["domain"], "domain"),
        directory=directory_for(call),
        mode=params["mode"],
        vcpus=params["vcpus"],
        memory=memory // 1024 * 1024 if memory is not None else None,
        network=params["network"],
        passphrase=passphrase_option(params["passphrase"], "passphrase"),
        virt_type=params["virt_type"],
        running=params["state"] == "running",
    )


def handle(call: _module.Call) -> _module.Answer:
    """See that the domain exists."""
    limit = call.params["wait_timeout"]
    waiting = Waiting(call.params["wait"], names.parse_duration(limit, "wait_timeout") if limit else None)
    answer = import_image(call.connection, call.uri, request_of(call), waiting, check=call.check)
    if "job" in answer:
        return _module.Answer(changed=answer["changed"], result={"job": answer["job"]})
    domain = answer["domain"]
    return _module.Answer(
        changed=answer["changed"],
        result={"domain": domain, "image": answer["image"]},
        warnings=answer["warnings"],
        diff=({} if answer["changed"] else {domain["name"]: domain}, {domain["name"]: domain}),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "src": {"type": "path", "required": True},
            "domain": {"type": "str", "required": True},
            "directory": {"type": "path"},
            "pool": {"type": "str"},
            "mode": {"type": "str", "choices": ["copy", "linked"], "default": "copy"},
            "vcpus": {"type": "int"},
            "memory": {"type": "str"},
            "network": {"type": "str"},
            "passphrase": {"type": "str", "no_log": True},
            "virt_type": {"type": "str", "choices": ["auto", "kvm", "qemu"], "default": "auto"},
            "state": {"type": "str", "choices": ["defined", "running"], "default": "defined"},
            "wait": {"type": "bool", "default": True},
            "wait_timeout": {"type": "str"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
