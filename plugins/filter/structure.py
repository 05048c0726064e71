# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vmkeeper.libvirt.structure``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: structure
short_description: A list or a dictionary, also where a survey sends it as JSON
version_added: 0.1.0
author: vmkeeper.libvirt contributors
description:
  - Reads text as JSON. A list or a dictionary stays what it is, and nothing, or empty text, gives the default.
  - What is not of the default's kind, a list or a dictionary, is an error that shows it.
positional: default
options:
  _input:
    description: A list or a dictionary; or its JSON; or nothing.
    type: raw
    required: true
  default:
    description: The list or dictionary that holds where nothing is said; its kind is the one that is wanted.
    type: raw
    required: true
seealso:
  - plugin: vmkeeper.libvirt.answer
    plugin_type: filter
  - plugin: vmkeeper.libvirt.names
    plugin_type: filter
  - plugin: vmkeeper.libvirt.words
    plugin_type: filter
"""

EXAMPLES = r"""
- name: 'Enlarge the disks that a survey names, such as [{"target": "vdb", "size": "200G"}]'
  vmkeeper.libvirt.resize_domain:
    domain: db01
    disks: "{{ answer | vmkeeper.libvirt.structure([]) }}"
"""

RETURN = r"""
_value:
  description: The list or dictionary.
  type: raw
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.plugin_utils.answers import structure


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"structure": structure}
