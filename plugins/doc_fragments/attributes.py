# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What modules promise, in the words of Ansible's own attributes."""

from __future__ import annotations


class ModuleDocFragment:
    """Attributes of the modules of this collection."""

    DOCUMENTATION = r"""
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target.
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check_mode), when in diff mode.
    support: full
  idempotent:
    description: When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
    support: full
  action_group:
    description: Use C(group/vmkeeper.libvirt.all) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - vmkeeper.libvirt.all
  platform:
    description: Target OS/families that can be operated against.
    platforms: linux
    support: full
"""

    INFO_MODULE = r"""
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target.
    support: full
    details:
      - This module changes nothing.
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check_mode), when in diff mode.
    support: N/A
    details:
      - This module changes nothing.
  idempotent:
    description: When run twice in a row outside check mode, with the same arguments, the second invocation indicates no change.
    support: full
    details:
      - This module changes nothing.
  action_group:
    description: Use C(group/vmkeeper.libvirt.all) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - vmkeeper.libvirt.all
  platform:
    description: Target OS/families that can be operated against.
    platforms: linux
    support: full
"""
