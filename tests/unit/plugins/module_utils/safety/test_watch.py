# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import DomainState
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.ticket import Ward
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.watch import Duty, duty_to

FROZEN = Ward("u", "web", 3, thaw=True, resume=False, agent_timeout=-2)
PAUSED = Ward("u", "web", 3, thaw=False, resume=True, agent_timeout=-2)

RUNS = DomainState("running", "unpaused")
BOOTED = DomainState("running", "booted")
RESTORED = DomainState("running", "restored")
OFF = DomainState("shutoff", "shutdown")
SAVED = DomainState("shutoff", "saved")


def duty(ward, state, run=None, *, managed_save=False, standing=True):
    return duty_to(ward, state, runtime_id=run, managed_save=managed_save, standing=standing)


@pytest.mark.parametrize("state", [RUNS, BOOTED, RESTORED, DomainState("paused", "user")])
def test_the_run_that_was_frozen_is_thawed_whatever_it_is_doing(state):
    assert duty(FROZEN, state, 3) is Duty.THAW
    assert duty(PAUSED, state, 3) is Duty.NOTHING


@pytest.mark.parametrize("state", [RESTORED, RUNS, DomainState("paused", "user"), DomainState("running", "migrated")])
def test_a_later_run_may_have_brought_the_freeze_along_and_is_asked(state):
    assert duty(FROZEN, state, 4) is Duty.ASK
    assert duty(PAUSED, state, 4) is Duty.NOTHING


def test_a_run_that_was_booted_has_brought_nothing_along():
    assert duty(FROZEN, BOOTED, 4) is Duty.NOTHING


def test_what_is_saved_is_waited_for():
    assert duty(FROZEN, OFF, managed_save=True) is Duty.WAIT
    assert duty(FROZEN, SAVED, managed_save=True, standing=False) is Duty.WAIT
    assert duty(FROZEN, SAVED) is Duty.WAIT
    assert duty(PAUSED, SAVED, managed_save=True) is Duty.NOTHING


def test_the_file_of_a_save_is_not_waited_for_when_the_run_that_froze_is_dead():
    assert duty(FROZEN, SAVED, standing=False) is Duty.NOTHING


def test_a_domain_that_is_off_needs_no_guard():
    assert duty(FROZEN, OFF) is Duty.NOTHING
    assert duty(FROZEN, DomainState("shutoff", "unknown")) is Duty.NOTHING
