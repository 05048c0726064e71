# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import AgentSilent, InvalidInput, Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import AgentInfo
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import Domain, DomainState
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import consistency

FREEZER = AgentInfo("7", frozenset({"guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"}))
RUNNING = DomainState("running")


def domain(state=RUNNING, **options):
    return Domain("web", "u", state, True, (), agent_configured=options.pop("agent_configured", True), **options)


@pytest.mark.parametrize(
    ("state", "facts", "level"),
    [
        (RUNNING, {}, "crash"),
        (RUNNING, {"frozen_over_cut": True}, "filesystem"),
        (RUNNING, {"frozen_over_cut": True, "hook_proved": True}, "application"),
        (RUNNING, {"hook_proved": True}, "crash"),
        (RUNNING, {"with_memory": True}, "memory"),
        (DomainState("paused", "user"), {}, "crash"),
        (DomainState("paused", "user"), {"with_memory": True}, "memory"),
        (DomainState("pmsuspended"), {}, "crash"),
        (DomainState("crashed"), {}, "crash"),
        (DomainState("shutoff", "shutdown"), {}, "offline"),
        (DomainState("shutoff", "shutdown"), {"with_memory": True}, "offline"),
        (DomainState("shutoff", "shutdown"), {"managed_save": True}, "crash"),
        (DomainState("shutoff", "saved"), {"managed_save": True}, "crash"),
        (DomainState("shutoff", "destroyed"), {}, "crash"),
        (DomainState("shutoff", "crashed"), {}, "crash"),
        (DomainState("shutoff", "unknown"), {}, "crash"),
    ],
)
def test_a_level_is_claimed_only_when_it_is_true(state, facts, level):
    assert consistency.level(state, **facts) == level


@pytest.mark.parametrize(
    ("one", "agent", "words"),
    [
        (domain(DomainState("shutoff")), FREEZER, "shut off"),
        (domain(DomainState("paused")), FREEZER, "is paused"),
        (domain(agent_configured=False), None, "no guest agent channel"),
        (domain(), None, "does not answer"),
        (domain(), AgentInfo("7", frozenset()), "does not allow"),
        (domain(), FREEZER, None),
    ],
)
def test_what_is_in_the_way_of_a_freeze(one, agent, words):
    obstacle = consistency.agent_obstacle(one, agent)
    assert obstacle is None if words is None else words in obstacle


def test_what_the_agent_itself_said_is_passed_on():
    assert consistency.agent_obstacle(domain(), None, "not connected") == "not connected"


@pytest.mark.parametrize(
    ("policy", "freeze"), [("auto", True), ("required", True), ("never", False), ("shutdown", False)]
)
def test_policies_when_a_freeze_is_possible(policy, freeze):
    assert consistency.decide_freeze(policy, domain(), None, with_memory=False).freeze is freeze


def test_auto_does_without_and_says_why_and_required_refuses():
    decision = consistency.decide_freeze("auto", domain(), "no agent", with_memory=False)
    assert (decision.freeze, decision.why_not) == (False, "no agent")
    with pytest.raises(AgentSilent, match=r"no agent.*quiesce: auto"):
        consistency.decide_freeze("required", domain(), "no agent", with_memory=False)


def test_memory_is_never_taken_of_a_frozen_guest():
    assert not consistency.decide_freeze("auto", domain(), None, with_memory=True).freeze
    with pytest.raises(InvalidInput, match="frozen guest"):
        consistency.decide_freeze("required", domain(), None, with_memory=True)


def test_a_freeze_of_somebody_else_is_respected_and_proves_nothing_unless_it_is_ours_and_whole():
    assert consistency.respect_freeze("required", domain(), whole=True) == consistency.FreezeDecision(False)
    assert "other means" in consistency.respect_freeze("auto", domain(), whole=False).why_not
    with pytest.raises(Refused, match="by other means"):
        consistency.respect_freeze("required", domain(), whole=False)
