# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vmkeeper.libvirt.words``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: words
short_description: The words of a command, also where a survey sends it as text
version_added: 0.1.0
author: vmkeeper.libvirt contributors
description:
  - Makes a list of text with blanks between the words. There is no quoting; a word that has blanks itself is written as part of a
    JSON list, as in V(["sh", "-c", "systemctl is-system-running || true"]).
  - A list stays what it is, and nothing, or empty text, is an empty list.
options:
  _input:
    description: A list of words; or text, of words or a JSON list; or nothing.
    type: raw
    required: true
seealso:
  - plugin: vmkeeper.libvirt.names
    plugin_type: filter
  - plugin: vmkeeper.libvirt.answer
    plugin_type: filter
  - plugin: vmkeeper.libvirt.structure
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Prove that the last point boots, and that a command of a survey, such as "systemctl is-active postgresql", succeeds in it
  vmkeeper.libvirt.backup_verify:
    repository: /srv/backup
    source_domain: db01
    level: boot
    boot_check: "{{ answer | vmkeeper.libvirt.words }}"
"""

RETURN = r"""
_value:
  description: The words.
  type: list
  elements: str
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.plugin_utils.answers import words


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"words": words}
