# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What a guest confined by AppArmor may do: the facts of docs/apparmor.md, and what the collection makes of them."""

from __future__ import annotations

import pytest
from lab.spec import DiskSpec, GuestSpec

from nested import guest, task
from nested.confined import Confined
from nested.machine import Machine, MachineError

#: Seconds, with the fixtures: on a busy machine a boot alone may take most of it.
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def confined(hypervisor: Machine, request: pytest.FixtureRequest):
    name = request.node.name.replace("test_", "").replace("_", "-")[:30].strip("-")
    made = Confined(hypervisor, name)
    yield made
    hypervisor.run(
        f"virsh destroy {made.name}; virsh undefine {made.name} --checkpoints-metadata --snapshots-metadata;"
        f" rm -rf {made.directory}"
    )


def test_a_guest_is_confined(confined: Confined):
    label = confined.virsh("dumpxml", "--xpath \"//seclabel[@model='apparmor']/label/text()\"")
    assert label == f"libvirt-{confined.virsh('domuuid')}"


def test_a_layer_that_the_guest_was_started_on_takes_no_commit_but_can_be_pulled(confined: Confined):
    overlay = confined.snapshot(f"{confined.directory}/overlay.qcow2")
    assert confined.denied() == []
    confined.restart()
    assert confined.denied() == [confined.base]
    with pytest.raises(MachineError, match="Permission denied"):
        confined.virsh("blockcommit", "vda --active --wait --pivot")
    assert confined.is_running()
    confined.virsh("blockpull", "vda --wait")
    assert "backing file:" not in confined.hypervisor.run(f"qemu-img info -U {overlay}")
    assert confined.is_running()


def test_a_layer_made_while_the_guest_runs_takes_a_commit(confined: Confined):
    confined.snapshot(f"{confined.directory}/overlay.qcow2")
    confined.virsh("blockcommit", "vda --active --wait --pivot")
    assert confined.virsh("domblklist").split()[-1] == confined.base


def test_the_end_of_a_backup_closes_all_lower_layers_to_commits(confined: Confined):
    confined.snapshot(f"{confined.directory}/overlay.qcow2")
    assert confined.denied() == []
    confined.virsh("backup-begin")
    confined.hypervisor.run(
        f"for i in $(seq 300); do virsh backup-dumpxml {confined.name} >/dev/null 2>&1 || exit 0; sleep 1; done; exit 1"
    )
    assert confined.denied() == [confined.base]
    with pytest.raises(MachineError, match="Permission denied"):
        confined.virsh("blockcommit", "vda --active --wait --pivot")
    assert confined.is_running()


def test_the_end_of_a_commit_below_the_active_layer_closes_the_others(confined: Confined):
    layers = [confined.snapshot(f"{confined.directory}/{number}.qcow2") for number in (1, 2, 3)]
    confined.virsh("blockcommit", f"vda --base {layers[0]} --top {layers[1]} --wait")
    assert confined.denied() == [layers[0], confined.base]


def test_a_layer_whose_name_the_helper_cannot_read_hides_those_below_it(confined: Confined):
    directory = f"/data/{confined.name}"
    confined.hypervisor.run(f"mkdir -p {directory} && chmod 711 /data {directory}")
    confined.snapshot(f"{directory}/disk0.s1")
    top = confined.snapshot(f"{directory}/top.qcow2")
    confined.restart()  # the definition lists the chain
    xml = confined.virsh("dumpxml", "--inactive")
    before, _start, rest = xml.partition("<backingStore")
    listed = rest.rpartition("</backingStore>")[2]
    confined.virsh("destroy")
    write = "cat >/tmp/unlisted.xml <<'XML'\n" + before + listed + "\nXML\n"
    confined.hypervisor.run(write + "virsh define /tmp/unlisted.xml")
    with pytest.raises(MachineError, match="Permission denied"):
        confined.virsh("start")
    write = "cat >/tmp/listed.xml <<'XML'\n" + xml + "\nXML\n"
    confined.hypervisor.run(write + "virsh define /tmp/listed.xml")
    confined.virsh("start")
    assert confined.virsh("domblklist").split()[-1] == top


def test_snapshot_restart_revert_and_a_flat_chain_by_a_pull(confined: Confined):
    """What a night of an operator is made of, none of which the profile may spoil."""
    confined.task("snapshot", name="one", quiesce="never")
    confined.restart()
    reverted = confined.task("snapshot", name="one", state="reverted")
    assert reverted["snapshot"]["guest"] == "booted"
    assert confined.base in confined.denied()
    with pytest.raises(MachineError, match="Permission denied"):
        confined.virsh("blockcommit", "vda --active --wait --pivot")
    confined.virsh("suspend")  # what the guest does not write now is what the pull must have kept
    active, before = confined.active(), f"{confined.directory}/before.raw"
    confined.hypervisor.run(
        f"qemu-img convert -U -f qcow2 -O raw {active} {before}; sha256sum {confined.base} >/tmp/base"
    )
    foreseen = confined.task("blockcommit", keep=1)  # takes the way that it would foresee
    (disk,) = foreseen["disks"]
    assert disk["method"] == "pull"
    assert "AppArmor" in disk["why"]
    assert disk["chain_after"] == [active]
    assert [ended["name"] for ended in foreseen["snapshots_ended"]] == ["one"]
    confined.virsh("destroy")  # so that QEMU writes its tables out, and nothing else
    assert "backing file:" not in confined.hypervisor.run(f"qemu-img info {active}")
    confined.hypervisor.run(f"qemu-img compare -f qcow2 -F raw {active} {before} && sha256sum --check /tmp/base")
    confined.virsh("start")


def test_a_layer_below_the_active_one_is_merged_at_a_restart_that_is_allowed(confined: Confined):
    for name in ("one", "two"):
        confined.task("snapshot", name=name, quiesce="never")
    confined.restart()
    with pytest.raises(task.TaskFailed, match=r"AppArmor.*allow_restart"):
        confined.task("blockcommit", keep=2)
    guest.wait_agent(confined.hypervisor, confined.name)  # it hears its power button only when it is up
    answer = confined.task("blockcommit", keep=2, allow_restart=True)
    assert [disk["method"] for disk in answer["disks"]] == ["offline"]
    assert [ended["name"] for ended in answer["snapshots_ended"]] == ["one"]
    assert confined.is_running()


def test_commits_below_the_active_layers_of_two_disks_begin_before_one_ends(hypervisor: Machine):
    """The end of the first would deny the second; their layers hold enough that neither is over at once."""
    name = guest.place(hypervisor, GuestSpec("two-disks", disks=(DiskSpec("vda"), DiskSpec("vdb"))), start=False)
    try:
        directory = f"{guest.IMAGES}/two-disks"
        hypervisor.run(f"virsh start --paused {name}")
        task.run(hypervisor, "snapshot", domain=name, name="s1", quiesce="never")
        for target in ("vda", "vdb"):
            # The guest is paused and writes nothing: what its layers hold is written through QEMU.
            device = target_device(hypervisor, name, target)
            hypervisor.run(f"virsh qemu-monitor-command {name} --hmp 'qemu-io -d {device} \"write -P 7 8M 64M\"'")
        for later in ("s2", "s3"):
            task.run(hypervisor, "snapshot", domain=name, name=later, quiesce="never")
        answer = task.run(hypervisor, "blockcommit", domain=name, keep=2)
        assert [disk["method"] for disk in answer["disks"]] == ["live", "live"]
        assert {ended["name"] for ended in answer["snapshots_ended"]} == {"s1", "s2"}
        assert directory in answer["disks"][0]["chain_after"][-1]
    finally:
        hypervisor.run(
            f"virsh destroy {name}; virsh undefine {name} --snapshots-metadata; rm -rf {guest.IMAGES}/two-disks"
        )


def target_device(hypervisor: Machine, name: str, target: str) -> str:
    """QEMU's path of the disk's device, for its monitor."""
    found = hypervisor.run(f"virsh dumpxml --xpath \"//disk[target/@dev='{target}']/alias/@name\" {name}")
    alias = found.split('"')[1]
    return f"/machine/peripheral/{alias}/virtio-backend"
