# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import AgentSilent
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import agent
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import AgentInfo


class Domain:
    def name(self):
        return "web"


@pytest.fixture
def answering(monkeypatch):
    def answer(reply):
        class Binding:
            @staticmethod
            def qemuAgentCommand(_domain, _command, _seconds, _flags):
                return reply if isinstance(reply, str) else json.dumps(reply)

        class Libvirt:
            class libvirtError(Exception):
                pass

        monkeypatch.setattr(agent, "libvirt_qemu", Binding)
        monkeypatch.setattr(agent, "libvirt", Libvirt)
        return Domain()

    return answer


@pytest.mark.parametrize(
    "reply", ["", "no json", "[]", "{}", '{"error": {}}', "[" * 100_000, '{"return": "' + "x" * (2 << 20) + '"}']
)
def test_a_reply_that_makes_no_sense_is_silence(answering, reply):
    with pytest.raises(AgentSilent):
        agent.command(answering(reply), "guest-ping")


@pytest.mark.parametrize("value", [None, 1, "", "FROZEN", {"frozen": True}, ["frozen"]])
def test_a_freeze_status_is_one_of_two_words(answering, value):
    with pytest.raises(AgentSilent):
        agent.is_frozen(answering({"return": value}))


def test_freeze_status(answering):
    assert agent.is_frozen(answering({"return": "frozen"}))
    assert not agent.is_frozen(answering({"return": "thawed"}))


def test_only_commands_that_are_enabled_and_well_named_count(answering):
    commands = [
        {"name": "guest-fsfreeze-freeze", "enabled": True},
        {"name": "guest-fsfreeze-thaw", "enabled": True},
        {"name": "guest-fsfreeze-status", "enabled": True},
        {"name": "guest-exec", "enabled": False},
        {"name": "guest-exec-status", "enabled": "yes"},
        {"name": "bad name; rm", "enabled": True},
        {"name": 7, "enabled": True},
        "guest-file-open",
        None,
    ]
    info = agent.ask_info(answering({"return": {"version": "7.2\n<x>", "supported_commands": commands}}))
    assert info.commands == {"guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"}
    assert info.version == "7.2??x?"
    assert info.can_freeze
    assert not info.can_execute
    assert not info.can_use_files


@pytest.mark.parametrize("value", [None, [], "x", {"supported_commands": {"name": "guest-exec"}}])
def test_an_agent_that_tells_nothing_can_nothing(answering, value):
    assert agent.ask_info(answering({"return": value})).commands == frozenset()


def test_freezing_needs_all_three_commands():
    assert not AgentInfo("1", frozenset({"guest-fsfreeze-freeze", "guest-fsfreeze-thaw"})).can_freeze


def test_the_response_timeout_is_read_from_the_status_file(tmp_path):
    (tmp_path / "web.xml").write_text("<domstatus><agentTimeout>-1</agentTimeout></domstatus>")
    assert agent.response_timeout(Domain(), status_directory=str(tmp_path)) == -1
    (tmp_path / "web.xml").write_text("<domstatus/>")
    assert agent.response_timeout(Domain(), status_directory=str(tmp_path)) == agent.BLOCK
    assert agent.response_timeout(Domain(), status_directory=str(tmp_path / "none")) == agent.BLOCK


def test_a_frozen_guest_is_seen_though_its_agent_has_the_freeze_switched_off(monkeypatch):
    info = AgentInfo("7", frozenset({"guest-fsfreeze-status", "guest-fsfreeze-thaw"}))
    monkeypatch.setattr(agent, "ask_info", lambda domain: info)
    monkeypatch.setattr(agent, "is_frozen", lambda domain: True)
    assert agent.ask(Domain()) == (info, None, True)


def test_an_agent_that_does_not_tell_is_not_frozen_and_says_why(answering):
    info, problem, frozen = agent.ask(answering("nonsense"))
    assert (info, frozen) == (None, False)
    assert "not JSON" in problem
