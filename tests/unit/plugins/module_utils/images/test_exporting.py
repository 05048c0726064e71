# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is told of a copy that has just begun."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import LibvirtFailed, NoSpace, VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import DomainState
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import exporting
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.instant import Member, Outcome

MEMBER = Member(
    handle=None, uuid="u", name="web", state=DomainState("running", "booted"), runtime_id=1, freeze=True, required=True
)
CUT = Outcome[None](MEMBER, frozen_over_cut=True)


def test_a_copy_of_a_frozen_guest_goes_on() -> None:
    assert exporting.level_of_cut(CUT) == "filesystem"


@pytest.mark.parametrize("outcome", [replace(CUT, thawed=False), replace(CUT, resumed=False)])
def test_a_thaw_that_is_not_confirmed_is_told_before_anything_is_copied(outcome: Outcome[None]) -> None:
    with pytest.raises(VmkeeperError, match=r"not confirmed that 'web' is thawed.* The guard on this host goes on"):
        exporting.level_of_cut(outcome)
    with pytest.raises(VmkeeperError, match="not confirmed"):  # the guest first, whatever else went wrong
        exporting.level_of_cut(replace(outcome, error=ValueError("x")))


def test_a_copy_that_did_not_begin_or_not_at_a_frozen_instant_does_not_go_on() -> None:
    with pytest.raises(LibvirtFailed, match="could not begin: no"):
        exporting.level_of_cut(replace(CUT, error=ValueError("no")))
    with pytest.raises(NoSpace, match="full"):
        exporting.level_of_cut(replace(CUT, error=NoSpace("full")))
    with pytest.raises(VmkeeperError, match="did not stay frozen"):
        exporting.level_of_cut(replace(CUT, frozen_over_cut=False))
    assert (
        exporting.level_of_cut(replace(CUT, frozen_over_cut=False, member=replace(MEMBER, required=False))) == "crash"
    )
