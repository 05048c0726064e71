# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""LVM volumes as disks: a plain one goes through everything, a thin one is refused in a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from lab.spec import DiskSpec, GuestSpec

from nested import guest, task
from nested.machine import Machine

#: Seconds, with the fixtures: on a busy machine a boot alone may take most of it.
pytestmark = pytest.mark.timeout(3600)

REPOSITORY = "/srv/lvm-backup"
LIBRARY = "/srv/lvm-images"
AGAIN = f"{guest.IMAGES}/lvm-again"
FIRST_4M = "dd if={} bs=1M count=4 iflag=direct 2>/dev/null | sha256sum"


@pytest.fixture(scope="module")
def volumes(hypervisor: Machine) -> Iterator[str]:
    """The name of a guest with ``vdb`` on a plain volume and ``vdc`` on a thin one."""
    with contextlib.ExitStack() as undo:
        undo.callback(
            hypervisor.run,
            "vgchange -q -an lab; losetup -j /srv/volumes | cut -d: -f1 | xargs -r losetup -d;"
            f" rm -rf /srv/volumes {REPOSITORY} {LIBRARY}",
        )
        undo.callback(guest.clear, hypervisor)
        hypervisor.run(
            "modprobe -a dm_mod dm_thin_pool loop"
            " && truncate -s 512M /srv/volumes && vgcreate -q lab $(losetup --find --show /srv/volumes)"
            " && lvcreate -q -L 32M -n plain lab && lvcreate -q -L 64M --thinpool pool lab"
            " && lvcreate -q -V 32M --thin -n thin lab/pool"
            f" && install -d -m 0711 {REPOSITORY} {LIBRARY} {AGAIN}"
        )
        name = guest.place(hypervisor, GuestSpec("lvm", disks=(DiskSpec("vda", writer=False),)), start=False)
        for target, volume in (("vdb", "plain"), ("vdc", "thin")):
            hypervisor.run(
                f"virsh attach-disk {name} /dev/lab/{volume} {target} --sourcetype block --subdriver raw --cache none --config"
            )
        hypervisor.run(f"virsh start {name}")
        guest.wait_agent(hypervisor, name)
        yield name


def fill(hypervisor: Machine, name: str, letter: str) -> str:
    """Have the guest write a megabyte of the letter to its second disk; the digest that the disk then has in the guest."""
    write = f"head -c 1048576 /dev/zero | tr '\\0' {letter} | dd of=/dev/vdb bs=64k seek=16 conv=fsync 2>/dev/null"
    return guest.execute(hypervisor, name, f"{write}; echo 3 >/proc/sys/vm/drop_caches; {FIRST_4M.format('/dev/vdb')}")


def test_a_plain_volume_is_snapshot_reverted_flattened_backed_up_restored_and_grown(hypervisor: Machine, volumes: str):
    before = fill(hypervisor, volumes, "a")
    taken = task.run(hypervisor, "snapshot", domain=volumes, name="one", quiesce="required", deadline=300)["snapshot"]
    assert [disk["target"] for disk in taken["disks"]] == ["vda", "vdb"]
    fill(hypervisor, volumes, "b")
    task.run(hypervisor, "snapshot", domain=volumes, name="one", state="reverted", allow_restart=True)
    guest.wait_agent(hypervisor, volumes)
    hypervisor.run(f"virsh shutdown {volumes}; until virsh domstate {volumes} | grep -q 'shut off'; do sleep 1; done")
    task.run(hypervisor, "snapshot", domain=volumes, name="one", state="absent")
    assert "/dev/lab/plain" in hypervisor.run(f"virsh domblklist {volumes} --inactive")
    assert hypervisor.run(FIRST_4M.format("/dev/lab/plain")) == before
    hypervisor.run(f"virsh start {volumes}")
    guest.wait_agent(hypervisor, volumes)

    kept = fill(hypervisor, volumes, "c")
    made = task.run(hypervisor, "backup", domain=volumes, repository=REPOSITORY, quiesce="required")["restore_point"]
    fill(hypervisor, volumes, "d")
    task.run(
        hypervisor,
        "restore",
        repository=REPOSITORY,
        id=made["id"],
        domain="lab-lvm-again",
        directory=AGAIN,
        state="defined",
    )
    hypervisor.run(f"qemu-img convert -O raw {AGAIN}/*.vdb.* {AGAIN}/vdb.raw")
    assert hypervisor.run(FIRST_4M.format(f"{AGAIN}/vdb.raw")) == kept

    hypervisor.run("lvextend -q -L 64M lab/plain")
    task.run(hypervisor, "resize_domain", domain=volumes, disks=[{"target": "vdb", "size": "64M"}])
    assert guest.execute(hypervisor, volumes, "cat /sys/block/vdb/size").strip() == str((64 << 20) // 512)


def test_a_plain_volume_is_exported_and_imported_as_a_file(hypervisor: Machine, volumes: str):
    kept = fill(hypervisor, volumes, "e")
    export = {"domain": volumes, "dest": LIBRARY, "name": "lvm", "disks": ["vdb"]}
    made = task.run(hypervisor, "export_image", **export, quiesce="required", deadline=300)["image"]
    assert made["consistency"] == "filesystem", made
    fill(hypervisor, volumes, "f")
    launched = {"domain": "lab-lvm-launched", "directory": AGAIN, "state": "defined"}
    task.run(hypervisor, "import_image", src=f"{LIBRARY}/lvm", **launched)
    hypervisor.run(f"qemu-img convert -O raw {AGAIN}/lab-lvm-launched.vdb.* {AGAIN}/launched.raw")
    assert hypervisor.run(FIRST_4M.format(f"{AGAIN}/launched.raw")) == kept


def test_a_thin_volume_is_left_out_with_its_reason_and_refused_by_name(hypervisor: Machine, volumes: str):
    taken = task.run(hypervisor, "snapshot", domain=volumes, name="two", quiesce="never")["snapshot"]
    assert [(part["name"], part["reason"]) for part in taken["not_captured"]] == [("vdc", "thin-lvm")]
    task.run(hypervisor, "snapshot", domain=volumes, name="two", state="absent", allow_restart=True)
    for module, options in (
        ("snapshot", {"name": "three", "disks": ["vdc"]}),
        ("backup", {"repository": REPOSITORY, "disks": ["vdc"]}),
        ("resize_domain", {"disks": [{"target": "vdc", "size": "64M"}]}),
    ):
        with pytest.raises(task.TaskFailed, match="thin LVM volume, which is not handled yet"):
            task.run(hypervisor, module, domain=volumes, **options)
