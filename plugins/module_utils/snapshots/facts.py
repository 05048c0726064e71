# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read what the decisions about one domain's snapshots need, once."""

from __future__ import annotations

from typing import Any

from ..hypervisor import agent, chain
from ..hypervisor.binding import libvirt
from ..hypervisor.block_jobs import running_job
from ..hypervisor.connection import version_triple
from ..hypervisor.domain_model import Disk, Domain, read_domain
from ..safety import standing_freeze
from .model import read_snapshots
from .plan import Facts


def read_facts(handle: Any, *, ask_agent: bool = True) -> Facts:
    """The facts of one domain; the agent is asked only where it could answer."""
    domain = read_domain(handle)
    info, problem, frozen = None, None, False
    if ask_agent and domain.state.running and domain.agent_configured:
        info, problem, frozen = agent.ask(handle)
    return Facts(
        domain=domain,
        snapshots=read_snapshots(handle),
        sizes={disk.target: size for disk in domain.disks if (size := virtual_size(handle, domain, disk)) is not None},
        agent=info,
        agent_problem=problem,
        job=running_job(handle),
        frozen=frozen,
        frozen_whole=frozen and standing_freeze.is_whole(domain.uuid),
        next_start=read_domain(handle, inactive=True) if domain.state.active and domain.persistent else None,
        layers={disk.target: chain.depth(disk) for disk in domain.disks if disk.active is not None},
        longest_startable=chain.longest_startable(version_triple(handle.connect().getLibVersion())),
    )


def virtual_size(handle: Any, domain: Domain, disk: Disk) -> int | None:
    """Virtual size of a disk in bytes: by QEMU where it runs (it may have been resized), else from the image."""
    if disk.active is None or disk.device in ("cdrom", "floppy"):
        return None
    if domain.state.active:
        try:
            return int(handle.blockInfo(disk.target)[0])
        except libvirt.libvirtError:
            return None
    return chain.virtual_size(disk.active)
