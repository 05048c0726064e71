# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vmkeeper.libvirt.answer``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: answer
short_description: What a survey's answer says, or a default where it says nothing
version_added: 0.1.0
author: vmkeeper.libvirt contributors
description:
  - A question of a survey that is left open arrives as empty text, or as none. Both give the default, as blanks do.
  - Everything else stays what it is, also V(0) and V(false), which the filter P(ansible.builtin.default#filter) with V(true) as
    its second argument takes for nothing.
positional: default
options:
  _input:
    description: The answer.
    type: raw
    required: true
  default:
    description: What holds where it says nothing.
    type: raw
    required: true
seealso:
  - plugin: vmkeeper.libvirt.names
    plugin_type: filter
  - plugin: vmkeeper.libvirt.structure
    plugin_type: filter
  - plugin: vmkeeper.libvirt.words
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Take a snapshot, and restart what cannot be frozen unless a survey says otherwise
  vmkeeper.libvirt.snapshot:
    domains: [web01]
    name: before-upgrade
    allow_restart: "{{ may_restart | vmkeeper.libvirt.answer(true) }}"
"""

RETURN = r"""
_value:
  description: The answer, or the default.
  type: raw
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.plugin_utils.answers import answer


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"answer": answer}
