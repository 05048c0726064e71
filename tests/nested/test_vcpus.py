# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""vCPUs go as they came: QEMU unplugs them under KVM only, which a nested hypervisor has also where this machine has none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.spec import GuestSpec

from nested import guest, task
from nested.machine import Machine

#: Seconds, with the fixtures: on a busy machine a boot alone may take most of it.
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def roomy(hypervisor: Machine) -> Iterator[str]:
    """One vCPU of two."""
    name = guest.place(hypervisor, GuestSpec("vcpus", vcpus=1, max_vcpus=2))
    try:
        guest.wait_agent(hypervisor, name)
        yield name
    finally:
        hypervisor.run(f"virsh destroy {name}; virsh undefine {name}; rm -rf {guest.IMAGES}/vcpus")


def test_a_vcpu_is_plugged_and_unplugged_again(hypervisor: Machine, roomy: str) -> None:
    if guest.acceleration(hypervisor, roomy) != "kvm":
        pytest.skip("the nested hypervisor has no KVM")
    for wanted in (2, 1):
        made = task.run(hypervisor, "resize_domain", domain=roomy, vcpus=wanted)
        assert [(one["applied"], one["guest_sees"]) for one in made["changes"]] == [("live", wanted)], made
        assert not made["restart_required"], made
        # What libvirt and the guest say without us.
        assert hypervisor.run(f"virsh vcpucount {roomy} --live --current").split() == [str(wanted)]
        assert hypervisor.run(f"virsh vcpucount {roomy} --config --current").split() == [str(wanted)]
        online = hypervisor.run(f"virsh --quiet guestvcpus {roomy} | grep ^online").split(":")[1].strip()
        assert online == {2: "0-1", 1: "0"}[wanted]
        assert not task.run(hypervisor, "resize_domain", domain=roomy, vcpus=wanted)["changed"]
