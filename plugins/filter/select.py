# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter ``vmkeeper.libvirt.select``."""

from __future__ import annotations

DOCUMENTATION = r"""
name: select
short_description: Choose domains, snapshots or restore points by a JMESPath expression
version_added: 0.1.0
author: vmkeeper.libvirt contributors
description:
  - Applies a JMESPath expression to the result of an C(_info) module, on the controller.
  - With O(attribute) the answer is always a list of text, such as names for another task's C(domains).
  - A number or text of the expression's own is written between backticks, as in V([?vcpus.configured > `2`]), or between
    single quotes, as in V([?agent.state == 'connected']).
positional: expression, attribute
options:
  _input:
    description: What to choose from, such as RV(vmkeeper.libvirt.domain_info#module:domains).
    type: raw
    required: true
  expression:
    description: A JMESPath expression, see U(https://jmespath.org/specification.html).
    type: str
    required: true
  attribute:
    description: >-
      Take this attribute of each chosen object. The expression may also choose text itself, as in V([?persistent].name).
      Anything else is an error.
    type: str
requirements:
  - jmespath on the controller
seealso:
  - module: vmkeeper.libvirt.domain_info
  - module: vmkeeper.libvirt.backup_info
  - module: vmkeeper.libvirt.snapshot_info
"""

EXAMPLES = r"""
- name: Look at the domains
  vmkeeper.libvirt.domain_info:
  register: found

- name: Back up those that run and have an agent
  vmkeeper.libvirt.backup:
    domain: "{{ item }}"
    repository: /srv/backup
  loop: "{{ found.domains | vmkeeper.libvirt.select('[?state==`running` && agent.configured]', 'name') }}"

- name: Name the restore points of the last change, newest first
  ansible.builtin.debug:
    msg: "{{ points.restore_points | vmkeeper.libvirt.select('reverse([?tags.change==`CHG-4711`].id)') }}"
"""

RETURN = r"""
_value:
  description: What the expression gives; with O(attribute) a list of text.
  type: raw
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

try:
    import jmespath
    from jmespath.exceptions import JMESPathError
except ImportError:
    jmespath = None


def select(found: Any, expression: str, attribute: str | None = None) -> Any:
    """Apply ``expression`` to ``found``; see ``ansible-doc -t filter vmkeeper.libvirt.select``."""
    if jmespath is None:
        raise AnsibleFilterError(
            "The filter vmkeeper.libvirt.select needs the Python library jmespath on the controller, in the "
            "environment that runs ansible (execution environments made with this collection have it)"
        )
    if not isinstance(expression, str) or not expression.strip():
        raise AnsibleFilterError(f"vmkeeper.libvirt.select needs a JMESPath expression, not {expression!r}")
    try:
        chosen = jmespath.search(_plain(expression), _plain(found))
    except JMESPathError as error:
        raise AnsibleFilterError(f"The JMESPath expression {expression!r} does not work: {error}") from error
    return chosen if attribute is None else _attributes(chosen, attribute, expression)


def _attributes(chosen: Any, attribute: str, expression: str) -> list[str]:
    entries = [chosen] if isinstance(chosen, (dict, str)) else chosen
    # Null is what JMESPath makes of a misspelt name; taken for "none of them" it would end somebody's backups in silence.
    if not isinstance(entries, list):
        raise _unfit(expression, attribute, chosen)
    names: list[str] = []
    for entry in entries:
        name = entry.get(attribute) if isinstance(entry, dict) else entry
        if not isinstance(name, str):
            raise _unfit(expression, attribute, entry)
        names.append(name)
    return names


def _unfit(expression: str, attribute: str, chosen: Any) -> AnsibleFilterError:
    return AnsibleFilterError(
        f"The JMESPath expression {expression!r} must choose objects that have {attribute!r}, or text; "
        f"it gave {json.dumps(chosen, default=str):.200}"
    )


def _plain(value: Any) -> Any:
    """The value in the types themselves: JMESPath tells types by their names, and Ansible has types of its own."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    return value


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"select": select}
