# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A running domain and what is known of it, for tests of what is decided from that."""

from __future__ import annotations

from dataclasses import replace

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import AgentInfo
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Disk,
    Domain,
    DomainState,
    Layer,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.change_set import compute
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.facts import (
    DiskFacts,
    Facts,
    GuestCpus,
    GuestMemory,
    Host,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import Request

MIB = 1 << 20
GIB = 1 << 30

AGENT = AgentInfo(
    "7.2",
    frozenset(
        [
            "guest-get-vcpus",
            "guest-set-vcpus",
            "guest-get-memory-blocks",
            "guest-set-memory-blocks",
            "guest-get-memory-block-info",
            "guest-get-fsinfo",
            "guest-exec",
            "guest-exec-status",
        ]
    ),
)
DISK = Disk("vda", "disk", "file", "virtio", (Layer("/nowhere/vda.qcow2", "qcow2"),))


def domain(**values) -> Domain:
    base = Domain(
        name="d",
        uuid="1",
        state=DomainState("running"),
        persistent=True,
        disks=(DISK,),
        memory_max=GIB,
        memory_current=GIB,
        vcpus_max=4,
        vcpus_current=2,
        arch="x86_64",
    )
    return replace(base, **values)


def facts(*, live: Domain | None = None, conf: Domain | None = None, **values) -> Facts:
    running = live or domain()
    base = Facts(
        configured=conf or running,
        live=running,
        agent=AGENT,
        cpus=GuestCpus(
            frozenset(range(running.vcpus_current)), frozenset(), frozenset(range(1, running.vcpus_current))
        ),
        memory=GuestMemory(total=GIB, available=GIB // 2, block_size=128 * MIB),
        balloon=running.memory_current,
        disks={"vda": DiskFacts(DISK, GIB, DISK.chain)},
        host=Host(cpus=16, free_memory=64 * GIB),
    )
    return replace(base, **values)


def ways(request: Request, known: Facts) -> dict[str, str]:
    return {change.what: change.how for change in compute(request, known).changes}


def only(request: Request, known: Facts):
    (change,) = compute(request, known).changes
    return change
