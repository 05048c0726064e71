# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ``domain_info`` shows: everything that a person, or a module, looks at before changing a domain."""

from __future__ import annotations

import os
from typing import Any

from .._errors import AgentSilent, VmkeeperError
from ..hypervisor import agent, chain
from ..hypervisor.binding import libvirt
from ..hypervisor.block_jobs import running_job
from ..hypervisor.capture import choose
from ..hypervisor.domain_model import Disk, Domain, read_domain
from . import consistency, journal, locks
from .ticket import tickets_of


def describe(handle: Any) -> dict[str, Any]:
    """One entry of ``domains``."""
    live = read_domain(handle)
    configured = read_domain(handle, inactive=True) if live.persistent else live
    info, problem = _ask_agent(handle, live)
    warnings: list[str] = []
    disks = [_disk(handle, live, disk, warnings) for disk in live.disks]
    nvram = live.nvram
    capture = choose(live, carries_nvram=nvram is not None and nvram.format == "raw" and os.path.exists(nvram.path))
    return {
        "name": live.name,
        "uuid": live.uuid,
        "state": live.state.name,
        "state_reason": live.state.reason,
        "persistent": live.persistent,
        "autostart": live.autostart,
        "managed_save": live.managed_save,
        "machine": live.machine,
        "arch": live.arch,
        "virtualization": live.domain_type,
        "firmware": live.firmware,
        "nvram": live.nvram.path if live.nvram else None,
        "tpm": live.has_tpm,
        "vcpus": _vcpus(handle, live, configured, info),
        "memory": _memory(handle, live, configured),
        "disks": disks,
        "agent": _agent(live, info, problem),
        "frozen": _frozen(handle, info),
        "freeze_deadline_at": next(
            (ticket.deadline_at() for ticket in tickets_of(live.uuid) if ticket.watched()), None
        ),
        "filesystems": list(agent.mountpoints(handle)) if info is not None else [],
        "would_capture": [disk.target for disk in capture.disks],
        "not_captured": [part.as_result() for part in capture.left_out],
        "checkpoints": list(live.checkpoints),
        "snapshots": _snapshot_names(handle),
        "jobs": _jobs(handle, live),
        "unfinished": _unfinished(live),
        "locked_by": _holder(live.uuid),
        "warnings": warnings,
    }


def _ask_agent(handle: Any, domain: Domain) -> tuple[agent.AgentInfo | None, str | None]:
    if not (domain.state.running and domain.agent_configured):
        return None, None
    try:
        return agent.ask_info(handle), None
    except AgentSilent as error:
        return None, str(error.facts.get("libvirt") or error.problem)


def _agent(domain: Domain, info: agent.AgentInfo | None, problem: str | None) -> dict[str, Any]:
    return {
        "configured": domain.agent_configured,
        "connected": domain.agent_connected,
        "responding": info is not None,
        "version": info.version if info else None,
        "can_freeze": info.can_freeze if info else False,
        "can_execute": info.can_execute if info else False,
        "can_use_files": info.can_use_files if info else False,
        "obstacle": consistency.agent_obstacle(domain, info, problem),
    }


def _frozen(handle: Any, info: agent.AgentInfo | None) -> bool | None:
    if info is None or not info.can_tell_frozen:
        return None
    try:
        return agent.is_frozen(handle)
    except AgentSilent:
        return None


def _vcpus(handle: Any, live: Domain, configured: Domain, info: agent.AgentInfo | None) -> dict[str, Any]:
    guest = None
    if info is not None and "guest-get-vcpus" in info.commands:
        try:
            reply = agent.command(handle, "guest-get-vcpus")
            if isinstance(reply, list):
                guest = sum(1 for vcpu in reply[:4096] if isinstance(vcpu, dict) and vcpu.get("online") is True)
        except AgentSilent:
            guest = None
    return {
        "maximum": configured.vcpus_max,
        "configured": configured.vcpus_current,
        "live": live.vcpus_current if live.state.active else None,
        "guest": guest,
    }


def _memory(handle: Any, live: Domain, configured: Domain) -> dict[str, Any]:
    statistics: dict[str, int] = {}
    if live.state.active:
        try:
            statistics = handle.memoryStats()
        except libvirt.libvirtError:
            statistics = {}
    available = statistics.get("available")
    return {
        "maximum": configured.memory_max,
        "configured": configured.memory_current,
        "live": statistics["actual"] * 1024 if "actual" in statistics else None,
        "guest": available * 1024 if available else None,
    }


def _disk(handle: Any, domain: Domain, disk: Disk, warnings: list[str]) -> dict[str, Any]:
    layers = disk.chain
    try:
        layers = chain.chain_of(disk)
    except VmkeeperError as error:
        warnings.append(f"disk {disk.target}: {error.problem}")
    capacity, allocation = None, None
    if disk.active is not None:
        try:
            capacity, allocation, _physical = handle.blockInfo(disk.target)
        except libvirt.libvirtError:
            capacity = chain.virtual_size(disk.active)
    return {
        "target": disk.target,
        "device": disk.device,
        "type": disk.kind,
        "bus": disk.bus,
        "serial": disk.serial,
        "source": disk.path,
        "format": disk.format,
        "capacity": capacity,
        "allocation": allocation,
        "chain": [{"path": layer.path, "format": layer.format} for layer in layers],
        "chain_length": len(layers),
        "readonly": disk.readonly,
        "shareable": disk.shareable,
        "transient": disk.transient,
        "encrypted": disk.encrypted,
    }


def _snapshot_names(handle: Any) -> list[str]:
    try:
        return sorted(snapshot.getName() for snapshot in handle.listAllSnapshots())
    except libvirt.libvirtError:
        return []


def _jobs(handle: Any, domain: Domain) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = [
        {"disk": disk.target, "kind": disk.job.job, "ready": disk.job.ready}
        for disk in domain.disks
        if disk.job is not None
    ]
    try:
        whole = running_job(handle)
    except VmkeeperError:
        whole = None
    if whole:
        jobs.append({"disk": None, "kind": whole, "ready": None})
    return jobs


def _unfinished(domain: Domain) -> dict[str, Any] | None:
    operation = journal.peek(domain.uuid)
    if operation is None:
        return None
    return {
        "operation": operation.kind,
        "started": operation.started,
        "last_step": operation.steps[-1]["name"] if operation.steps else None,
    }


def _holder(uuid: str) -> dict[str, Any] | None:
    return locks.holder(uuid)
