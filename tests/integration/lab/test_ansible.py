# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The three ways of running the collection give the module's own result."""

from __future__ import annotations

import signal

import pytest
from lab.ansible import AnsibleRunError, run_module, run_module_process, run_playbook
from lab.guest import Guest, GuestSpec
from lab.waiting import until


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(GuestSpec("subject", disks=()), start=False)


def test_all_three_ways_give_the_same_result(guest: Guest) -> None:
    through_ansible = run_module("domain_info", domains=[guest.name])
    assert not through_ansible["failed"], through_ansible["msg"]
    directly = run_module_process("domain_info", domains=[guest.name]).result()
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "tasks": [{"name": "Look", "vmkeeper.libvirt.domain_info": {"domains": [guest.name]}}],
    }
    playbook = run_playbook([play])
    assert playbook.rc == 0
    assert [task.task for task in playbook.tasks] == ["Look"]
    names = [result["domains"][0]["name"] for result in (through_ansible, directly, playbook.tasks[0].result)]
    assert names == [guest.name] * 3


def test_a_failure_is_a_result_with_its_message(guest: Guest) -> None:
    for result in (
        run_module("domain_info", domains=["no-such-domain"]),
        run_module_process("domain_info", domains=["no-such-domain"]).result(),
    ):
        assert result["failed"]
        assert "no-such-domain" in result["msg"]
        assert result["changed"] is False


def test_check_and_diff_reach_the_module(tmp_path) -> None:
    file = tmp_path / "file"
    result = run_module("ansible.builtin.copy", content="new\n", dest=str(file), check=True, diff=True)
    assert result["changed"]
    assert not file.exists()
    assert result["diff"][0]["after"] == "new\n"


def test_the_environment_reaches_the_module() -> None:
    result = run_module("ansible.builtin.command", cmd="printenv LAB_WORD", env={"LAB_WORD": "heard"})
    assert result["stdout"] == "heard"


def test_a_killed_module_gives_no_result(guest: Guest) -> None:
    process = run_module_process("domain_info", domains=[guest.name])
    until(process.running, "the module running")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(AnsibleRunError, match="no result"):
        process.result()


def test_what_is_no_module_is_a_failure_not_a_silence() -> None:
    assert run_module("no_such_module")["failed"]
    with pytest.raises(AnsibleRunError, match="no_such_module"):
        run_module_process("no_such_module").result()
