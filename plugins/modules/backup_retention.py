#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: apply a retention policy to a repository."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_retention
short_description: Remove old restore points by a retention policy
version_added: 0.1.0
description:
  - Keeps the restore points that the options name and removes the others, each domain by itself. Every point that stays restores
    to the same content as before, at every instant of the removal and after an interruption.
  - The options mean what they mean in Proxmox Backup Server. They are worked through in the order last, hourly, daily, weekly,
    monthly, yearly, from the newest point to the oldest. An option keeps the newest point of each of its periods until it has
    kept as many as it may. Periods without points do not count, and periods of which an option before has kept a point are
    passed over.
  - Periods are those of the hypervisor's local time zone, and weeks are those of ISO 8601.
  - Protected points stay, and do not count. So do points that cannot be restored, with a warning.
options:
  repository:
    description: The directory of the repository.
    type: path
    required: true
  domains:
    description:
      - Names or UUIDs of the domains, which need not exist any more. All domains of the repository when left out.
      - A name that a domain here has means that domain. The points of an earlier one of that name are found by its UUID.
    type: list
    elements: str
    aliases: [domain]
  keep_last:
    description: How many points to keep, the newest ones.
    type: int
  keep_hourly:
    description: Of how many hours to keep the newest point.
    type: int
  keep_daily:
    description: Of how many days to keep the newest point.
    type: int
  keep_weekly:
    description: Of how many weeks, Monday to Sunday, to keep the newest point.
    type: int
  keep_monthly:
    description: Of how many months to keep the newest point.
    type: int
  keep_yearly:
    description: Of how many years to keep the newest point.
    type: int
  fold:
    description:
      - V(commit) merges a point that others stand on into them. This costs as many bytes as the increments hold, however large
        the full is and however long the chain.
      - V(never) leaves written images as they are. A point goes only when no point that stays stands on it, so whole chains go.
        Use it for a repository that is copied elsewhere by its changed files, and make a full from time to time.
    type: str
    choices: [commit, never]
    default: commit
  passphrase:
    description:
      - Opens encrypted points where some that stay must be merged with some that go. It is written nowhere.
      - Not needed with O(fold=never), nor where nothing is merged.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.attributes
attributes:
  idempotent:
    support: full
notes:
  - At least one of the keep options is needed, and more than 0.
  - Nothing is removed or merged under a restore or a verification, which are waited for, nor under a domain that still runs on the
    repository after an instant restore. That one is named, and the task fails.
  - With the newest point goes its checkpoint. The next backup is then a full.
  - Each point of several domains that were backed up together is kept or removed by itself.
  - After an interruption, the same task finishes the removal.
  - The locks are those of this host. Where several hosts use one repository, as over NFS, each names its own domains in O(domains), and no
    domain's points are removed from two hosts at the same time.
seealso:
  - module: vmkeeper.libvirt.backup
  - module: vmkeeper.libvirt.backup_info
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Two weeks of days, two months of weeks, a year of months
  vmkeeper.libvirt.backup_retention:
    repository: /srv/backup
    keep_last: 3
    keep_daily: 14
    keep_weekly: 8
    keep_monthly: 12

- name: See what would go
  vmkeeper.libvirt.backup_retention:
    repository: /srv/backup
    domain: web01
    keep_daily: 7
  check_mode: true
  register: plan
"""

RETURN = r"""
kept:
  description: The points that stay, newest first, by domain.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: The point.
      type: str
    domain:
      description: Name of the domain as it was backed up.
      type: str
    why:
      description: Which option keeps it for which period, or what else does.
      type: str
removed:
  description:
    - The points that were removed, newest first, by domain, with the same keys as C(restore_points) of M(vmkeeper.libvirt.backup).
    - Includes those whose removal an earlier run had begun.
  returned: success
  type: list
  elements: dict
freed_bytes:
  description: Bytes that the repository takes less. In check mode, the most that this may be.
  returned: success
  type: int
"""

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.retention import prune
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.retention_plan import Keep
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node

PERIODS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def keep_of(call: _module.Call) -> Keep:
    """The checked policy."""
    counts = {period: call.params[f"keep_{period}"] for period in PERIODS}
    for period, count in counts.items():
        if count is not None and count < 0:
            raise InvalidInput(f"keep_{period} is {count}", advice="Use 0 or more")
    return Keep(**{period: count or 0 for period, count in counts.items()})


def handle(call: _module.Call) -> _module.Answer:
    """Prune the repository."""
    params = call.params
    pruned = prune(
        call.connection,
        call.uri,
        params["repository"],
        params["domains"],
        keep_of(call),
        fold=params["fold"] == "commit",
        passphrase=image_node.passphrase_option(params["passphrase"], "passphrase"),
        check=call.check,
    )
    staying = [one.point.id for one in pruned.kept]
    return _module.Answer(
        changed=bool(pruned.removed),
        result=pruned.as_result(),
        warnings=pruned.warnings,
        diff=(
            {"restore_points": sorted([*staying, *(one["id"] for one in pruned.removed)])},
            {"restore_points": sorted(staying)},
        ),
    )


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "repository": {"type": "path", "required": True},
            "domains": dict(_module.DOMAINS_OPTION),
            **{f"keep_{period}": {"type": "int"} for period in PERIODS},
            "fold": {"type": "str", "choices": ["commit", "never"], "default": "commit"},
            "passphrase": {"type": "str", "no_log": True},
        },
        handle,
    )


if __name__ == "__main__":
    main()
