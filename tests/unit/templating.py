# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values of roles and playbooks as Ansible makes them of their templates, with this collection's own filters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import filter_loader
from ansible.template import Templar, trust_as_template

OMIT = "omitted"
"""What stands for an argument that is left out."""

# Ansible's finder of collections would have to be there before the first import of this one; a directory of plugins may come late.
filter_loader.add_directory(str(Path(__file__).resolve().parents[2] / "plugins/filter"))


def templates(value: Any) -> Any:
    """The value, its texts templates."""
    if isinstance(value, dict):
        return {name: templates(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [templates(entry) for entry in value]
    return trust_as_template(value.replace("vmkeeper.libvirt.", "")) if isinstance(value, str) else value


def templated(value: Any, variables: Mapping[str, Any]) -> Any:
    """What Ansible makes of a value with these variables; see :func:`templates` for such as are templates themselves."""
    return Templar(loader=DataLoader(), variables={"omit": OMIT, **variables}).template(templates(value))
