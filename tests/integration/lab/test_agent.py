# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Each way in which a guest agent can misbehave is really there."""

from __future__ import annotations

import json
import time

import libvirt
import libvirt_qemu
import pytest
from lab.guest import Guest, GuestSpec
from lab.waiting import until


@pytest.fixture(scope="module")
def shared(module_guest_factory) -> Guest:
    return module_guest_factory(GuestSpec("agent"))


@pytest.fixture
def with_agent(shared: Guest):
    """Puts this agent into the guest; libvirt waits 5 s for its answers, so that a hang shows soon."""

    def make(agent: str) -> Guest:
        shared.replace_agent(agent)
        shared.domain().agentSetResponseTimeout(5)
        return shared

    yield make
    shared.thaw_inside()


def frozen(guest: Guest) -> bool:
    return guest.frozen_filesystems() == ["/disk/vda"]


def test_a_normal_fake_agent_freezes_and_thaws(with_agent) -> None:
    guest = with_agent("fake:normal")
    assert guest.domain().fsFreeze() == 1
    assert frozen(guest)
    assert guest.agent_command("guest-fsfreeze-status") == "frozen"
    assert guest.domain().fsThaw() == 1
    assert not frozen(guest)


def test_hang_answers_nothing(with_agent) -> None:
    guest = with_agent("fake:hang")
    with pytest.raises(libvirt.libvirtError):
        guest.domain().fsFreeze()
    assert not frozen(guest)


def test_hang_freeze_answers_the_sync_and_then_never_again(with_agent) -> None:
    guest = with_agent("fake:hang-freeze")
    guest.agent_command("guest-ping")
    with pytest.raises(libvirt.libvirtError):
        guest.domain().fsFreeze()
    assert not frozen(guest)
    with pytest.raises(libvirt.libvirtError):
        guest.agent_command("guest-ping", timeout=3)


def test_freeze_no_reply_freezes_and_can_be_thawed(with_agent) -> None:
    guest = with_agent("fake:freeze-no-reply")
    with pytest.raises(libvirt.libvirtError):
        guest.domain().fsFreeze()
    assert frozen(guest)
    until(lambda: _thaws(guest), "a thaw getting through")
    assert not frozen(guest)


def _thaws(guest: Guest) -> bool:
    try:
        guest.domain().fsThaw()
    except libvirt.libvirtError:
        return False
    return True


def test_freeze_then_dead_leaves_a_frozen_guest(with_agent) -> None:
    guest = with_agent("fake:freeze-then-dead")
    with pytest.raises(libvirt.libvirtError):
        guest.domain().fsFreeze()
    assert frozen(guest)
    with pytest.raises(libvirt.libvirtError):
        guest.domain().fsThaw()
    assert frozen(guest)


def test_late_answers_late_but_freezes_at_once(with_agent) -> None:
    guest = with_agent("fake:late:12")
    began = time.monotonic()
    with pytest.raises(libvirt.libvirtError):  # libvirt has given up after 5 s
        guest.domain().fsFreeze()
    assert frozen(guest)
    until(lambda: _thaws(guest), "a thaw getting through")
    assert time.monotonic() - began > 10
    assert not frozen(guest)


def test_late_all_delays_every_command(with_agent) -> None:
    guest = with_agent("fake:late-all:2")
    began = time.monotonic()
    guest.agent_command("guest-ping", timeout=60)
    assert time.monotonic() - began > 1.9


def test_garbage_is_not_json(with_agent) -> None:
    guest = with_agent("fake:garbage")
    with pytest.raises(libvirt.libvirtError):
        guest.agent_command("guest-ping", timeout=5)


def test_huge_sends_more_than_libvirt_takes(with_agent) -> None:
    guest = with_agent("fake:huge")
    with pytest.raises(libvirt.libvirtError):
        guest.agent_command("guest-info", timeout=20)
    assert guest.is_running()


def test_thaw_fails_as_often_as_asked(with_agent) -> None:
    guest = with_agent("fake:thaw-fails:2")
    guest.domain().fsFreeze()
    for _attempt in range(2):
        with pytest.raises(libvirt.libvirtError):
            guest.domain().fsThaw()
    assert frozen(guest)
    guest.domain().fsThaw()
    assert not frozen(guest)


def test_freeze_fails_leaves_one_filesystem_frozen(with_agent) -> None:
    guest = with_agent("fake:freeze-fails")
    with pytest.raises(libvirt.libvirtError):
        guest.domain().fsFreeze()
    assert frozen(guest)
    guest.domain().fsThaw()
    assert not frozen(guest)


def test_an_agent_with_commands_disabled_says_so(with_agent) -> None:
    guest = with_agent("real:guest-exec guest-exec-status guest-file-open guest-file-read guest-file-write")
    commands = {
        command["name"]: command["enabled"] for command in guest.agent_command("guest-info")["supported_commands"]
    }
    assert not commands["guest-exec"]
    assert not commands["guest-file-open"]
    assert commands["guest-fsfreeze-freeze"]
    request = {"execute": "guest-exec", "arguments": {"path": "/bin/true"}}
    with pytest.raises(libvirt.libvirtError, match="disabled"):
        libvirt_qemu.qemuAgentCommand(guest.domain(), json.dumps(request), 10, 0)
    guest.domain().fsFreeze()
    guest.domain().fsThaw()


def test_without_an_agent_libvirt_says_that_it_is_not_connected(with_agent) -> None:
    guest = with_agent("none")
    assert not guest.agent_connected()
    with pytest.raises(libvirt.libvirtError) as caught:
        guest.domain().fsFreeze()
    assert caught.value.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE
    assert guest.exec("echo still reachable").text == "still reachable"


def test_the_agent_of_the_spec_is_the_one_that_runs(guest_factory) -> None:
    guest = guest_factory(GuestSpec("spec-agent", agent="fake:hang-freeze"))
    assert "labagent" in guest.exec("ps").text
    assert guest.agent_connected()


def test_without_a_channel_libvirt_says_that_none_is_configured(guest_factory) -> None:
    guest = guest_factory(GuestSpec("no-channel", agent="absent"))
    with pytest.raises(libvirt.libvirtError) as caught:
        guest.domain().fsFreeze()
    assert caught.value.get_error_code() == libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED
