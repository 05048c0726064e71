# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which vCPUs a domain gets or gives up, and how: pure."""

from __future__ import annotations

from dataclasses import replace

from .change import LIVE, NONE, Change, VcpuAction, decide
from .facts import Facts
from .request import Request


def vcpu_changes(request: Request, facts: Facts) -> tuple[list[Change], list[str]]:
    """The change of the vCPUs, if one is due, and what of it waits for the next start."""
    wanted = request.vcpus
    if wanted is None:
        return [], []
    conf, live = facts.configured, facts.live
    configured = conf.vcpus_current == wanted and conf.vcpus_max >= wanted
    started_so = configured and live is not None and live.vcpus_current == wanted
    online = len(facts.cpus.online) if facts.cpus else None
    effective = online if online is not None else (live.vcpus_current if live else conf.vcpus_current)
    action, obstacle, why = _live(wanted, facts) if live else (None, "", "")
    in_force = live is not None and effective == wanted and live.vcpus_current >= wanted
    if started_so and not in_force and action is None:
        # Another start would bring the same.
        return [Change("vcpus", effective, wanted, NONE, obstacle, warn=True)], []
    decision = decide(
        request,
        facts,
        "The vCPUs",
        in_force=in_force,
        configured=configured,
        live=action is not None,
        obstacle=obstacle,
        why=why,
    )
    kept = live is not None and live.vcpus_current > wanted
    pending = []
    if decision.pending:
        pending.append(f"vcpus: {decision.why}")
    elif kept and (in_force or decision.how == LIVE) and not (action and action.plug_to is not None):
        pending.append("vcpus: QEMU gives up the vCPUs that are offline in the guest at its next start")
    if decision.how == NONE:
        return [], pending
    before = conf.vcpus_current if in_force else effective
    change = Change("vcpus", before, wanted, decision.how, decision.why)
    if decision.how == LIVE:
        change = replace(change, action=action, completes_at_restart=bool(pending), restart_helps=not started_so)
    return [change], pending


def _live(wanted: int, facts: Facts) -> tuple[VcpuAction | None, str, str]:
    """Live steps, or the obstacle; and why it is done so."""
    live = facts.live
    if live is None:
        return None, "the domain is shut off", ""
    have = live.vcpus_current
    if wanted > live.vcpus_max:
        return None, f"it was started with room for {live.vcpus_max} vCPUs", ""
    if wanted > have:
        return VcpuAction(wanted, wanted), "", f"it has room for {live.vcpus_max} vCPUs"
    if wanted == have and facts.cpus is not None:
        seen, online = len(facts.cpus.online | facts.cpus.offline), len(facts.cpus.online)
        if seen < wanted:
            return (
                None,
                f"QEMU has given the guest {wanted} vCPUs, and it sees {seen} (its kernel may be limited to these)",
                "",
            )
        if not facts.can("guest-set-vcpus"):
            return None, f"the guest has {online} of its {wanted} vCPUs online, and its agent may not change that", ""
    removable = sum(1 for vcpu in live.vcpus if vcpu.enabled and vcpu.hotpluggable)
    # QEMU's own emulation (TCG) takes an unplugged vCPU from the guest but never reports it gone, and the next memory that
    # is plugged ends QEMU (seen with 7.2). Under KVM it is sound.
    if wanted < have and live.domain_type == "kvm" and have - removable <= wanted:
        return VcpuAction(wanted, wanted), "", "the vCPUs to go are hot-pluggable"
    reason = (
        "QEMU's emulation (TCG) cannot unplug vCPUs safely"
        if live.domain_type != "kvm"
        else "vCPUs that it was started with cannot be unplugged"
    )
    if facts.cpus is None or not facts.can("guest-set-vcpus", "guest-get-vcpus"):
        return None, f"{reason}, and the guest agent cannot take them offline", ""
    if len(facts.cpus.online) > wanted and len(facts.cpus.online - facts.cpus.can_offline) > wanted:
        return None, f"{reason}, and the guest cannot take so many offline", ""
    if len(facts.cpus.online) < wanted:
        return VcpuAction(None, wanted), "", "QEMU has them; the guest brings them online"
    return VcpuAction(None, wanted), "", f"{reason}: the guest takes them offline"
