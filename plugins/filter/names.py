# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vmkeeper.libvirt.names``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: names
short_description: A list of names, also where a survey sends it as text
version_added: 0.1.0
author: vmkeeper.libvirt contributors
description:
  - Makes a list of text with commas between the names. Blanks around a name, and commas with nothing between them, are no names.
  - A list stays what it is, and nothing, or empty text, is an empty list.
options:
  _input:
    description: A list of names, such as of domains or targets of disks; or text; or nothing.
    type: raw
    required: true
seealso:
  - plugin: vmkeeper.libvirt.answer
    plugin_type: filter
  - plugin: vmkeeper.libvirt.select
    plugin_type: filter
  - plugin: vmkeeper.libvirt.structure
    plugin_type: filter
  - plugin: vmkeeper.libvirt.words
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Take a snapshot of what a survey names, such as "web01, db01"
  vmkeeper.libvirt.snapshot:
    domains: "{{ answer | vmkeeper.libvirt.names }}"
    name: before-upgrade
"""

RETURN = r"""
_value:
  description: The names.
  type: list
  elements: str
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.plugin_utils.answers import names


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"names": names}
