# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every module has in common: it runs on the hypervisor, on named domains."""

from __future__ import annotations


class ModuleDocFragment:
    """Options and requirements of modules that talk to libvirt."""

    DOCUMENTATION = r"""
options:
  uri:
    description:
      - The libvirt connection to use. It must lead to the hypervisor that the module runs on, since image files are local to it.
      - For another hypervisor run the task there, or use C(delegate_to).
    type: str
    default: qemu:///system
requirements:
  - libvirt 7.6.0 or later and QEMU 6.1 or later on the hypervisor
  - python3-libvirt on the hypervisor
"""

    CHANGING = r"""
options: {}
requirements:
  - root on the hypervisor (C(become))
  - qemu-img on the hypervisor
notes:
  - One run at a time works on a domain. A second one waits for up to a minute, then fails and names the first.
  - A run that finds an operation of the same kind unfinished on the domain finishes or undoes it first.
"""

    DOMAINS = r"""
options:
  domains:
    description: Names or UUIDs of the domains.
    type: list
    elements: str
    required: true
    aliases: [domain]
"""

    DOMAINS_OPTIONAL = r"""
options:
  domains:
    description: Names or UUIDs of the domains. All domains of the hypervisor when left out.
    type: list
    elements: str
    aliases: [domain]
"""
