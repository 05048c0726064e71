# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Guests confined by AppArmor that stand on a repository: an instant restore and a boot proof."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from lab.spec import DiskSpec, GuestSpec

from nested import guest, task
from nested.machine import Machine

#: Seconds, with the fixtures: on a busy machine a boot alone may take most of it.
pytestmark = pytest.mark.timeout(3600)

REPOSITORY = "/srv/confined"
AGAIN = f"{guest.IMAGES}/again"
VIEWS = "/var/lib/libvirt/vmkeeper/views"


class Lent:
    """A repository with two points of a guest that boots from its own disk, and what its files were before anybody used them."""

    def __init__(self, hypervisor: Machine) -> None:
        self.hypervisor = hypervisor
        disks = (DiskSpec("vda", size=96 << 20, boot=True), DiskSpec("vdb", size=64 << 20, fs=None, writer=False))
        origin = guest.place(hypervisor, GuestSpec("lender", disks=disks), start=False)
        hypervisor.run(
            f"qemu-io -c 'write -q -P 65 0 40M' {guest.IMAGES}/lender/vdb.qcow2 && install -d -m 0711 {REPOSITORY} {AGAIN}"
            f" && virsh --quiet start {origin}"
        )
        guest.wait_agent(hypervisor, origin)
        task.run(hypervisor, "backup", domain=origin, repository=REPOSITORY, quiesce="required", timeout=1800)
        guest.execute(hypervisor, origin, "echo kept >/disk/vda/kept; sync")
        made = task.run(hypervisor, "backup", domain=origin, repository=REPOSITORY, quiesce="required", timeout=1800)
        self.point: dict[str, Any] = made["restore_point"]
        assert self.point["type"] == "incremental"
        self.directory = f"{REPOSITORY}/{self.point['domain_uuid']}/{self.point['id']}"
        hypervisor.run(f"virsh destroy {origin}")
        # The profile no longer allowed this target when its copy ended (docs/apparmor.md): all of it is there.
        hypervisor.run(f"qemu-img compare {guest.IMAGES}/lender/vdb.qcow2 {self.directory}/vdb.qcow2")
        self.before = self.facts()

    def facts(self) -> list[str]:
        """Owner, group, mode, times and content of every file but the outcome of a proof."""
        files = "-type f ! -name verify.json ! -name screenshot.png"
        return self.hypervisor.run(
            f"cd {REPOSITORY} && find . {files} -printf '%p %u %g %m %T@ %C@\\n' | sort"
            f" && find . {files} -print0 | sort -z | xargs -0 sha256sum && getfattr -d -m - -R . 2>/dev/null || true"
        ).splitlines()

    def profile_of(self, domain: str) -> str:
        uuid = self.hypervisor.run(f"virsh domuuid {domain}").strip()
        return self.hypervisor.run(f"cat /etc/apparmor.d/libvirt/libvirt-{uuid}.files")

    def denials_since(self, mark: str) -> list[str]:
        """What the kernel has said since then that AppArmor forbade, to whomever."""
        lines = self.hypervisor.run(f"journalctl --dmesg --no-pager --output=cat --since=@{mark}").splitlines()
        return [line for line in lines if 'apparmor="DENIED"' in line]

    def now(self) -> str:
        return self.hypervisor.run("date +%s").strip()


@pytest.fixture(scope="module")
def lent(hypervisor: Machine) -> Iterator[Lent]:
    with contextlib.ExitStack() as undo:
        undo.callback(hypervisor.run, f"rm -rf {REPOSITORY}")
        undo.callback(guest.clear, hypervisor)
        yield Lent(hypervisor)


def test_an_instant_restore_runs_confined_and_is_pulled_and_the_repository_stays_as_it_was(lent: Lent):
    hypervisor, again = lent.hypervisor, "lab-again"
    since = lent.now()
    answered = task.run(
        hypervisor,
        "restore",
        repository=REPOSITORY,
        id=lent.point["id"],
        domain=again,
        directory=AGAIN,
        mode="instant",
        wait=False,
        bandwidth="512K",
    )
    assert answered["job"]["state"] == "pending"
    label = hypervisor.run(f"virsh dumpxml {again} --xpath \"//seclabel[@model='apparmor']/label/text()\"").strip()
    assert f"{label} (enforce)" in hypervisor.run("cat /sys/kernel/security/apparmor/profiles")
    rules = lent.profile_of(again)
    assert f'deny "{VIEWS}/' in rules
    assert REPOSITORY not in rules
    guest.wait_agent(hypervisor, again)
    shown = task.run(hypervisor, "domain_job", domain=again)
    assert {job["type"] for job in shown["block_jobs"]} == {"pull"}, shown
    assert guest.execute(hypervisor, again, "cat /disk/vda/kept") == "kept\n"
    guest.execute(hypervisor, again, "echo written during the pull >/disk/vda/later; sync")
    assert lent.facts() == lent.before
    task.run(hypervisor, "domain_job", domain=again, bandwidth=0)
    task.run(hypervisor, "domain_job", domain=again, state="finished", timeout=1800)
    chain = json.loads(hypervisor.run(f"qemu-img info -U --output=json --backing-chain {AGAIN}/{again}.vdb.qcow2"))
    assert len(chain) == 1
    assert VIEWS not in hypervisor.run(f"cat /proc/mounts; virsh dumpxml {again}; virsh dumpxml --inactive {again}")
    assert guest.execute(hypervisor, again, "cat /disk/vda/later") == "written during the pull\n"
    hypervisor.run(f"virsh shutdown {again}; until virsh domstate {again} | grep -q 'shut off'; do sleep 1; done")
    hypervisor.run(f"qemu-img compare {AGAIN}/{again}.vdb.qcow2 {lent.directory}/vdb.qcow2")
    hypervisor.run(f"virsh start {again}")  # it needs the repository no more
    guest.wait_agent(hypervisor, again)
    assert guest.execute(hypervisor, again, "cat /disk/vda/kept /disk/vda/later") == "kept\nwritten during the pull\n"
    hypervisor.run(f"virsh destroy {again}; virsh undefine {again}; rm -f {AGAIN}/*")
    assert lent.facts() == lent.before
    assert lent.denials_since(since) == []


def test_a_boot_is_proved_in_a_confined_guest_and_nothing_is_left_of_it(lent: Lent):
    hypervisor = lent.hypervisor
    since = lent.now()
    domains = hypervisor.run("virsh list --all --name")
    profiles = hypervisor.run("ls /etc/apparmor.d/libvirt")
    answer = task.run(
        hypervisor,
        "backup_verify",
        repository=REPOSITORY,
        id=lent.point["id"],
        level="boot",
        boot_check=["/bin/grep", "kept", "/disk/vda/kept"],
        boot_timeout="20m",
        timeout=1800,
    )
    assert (answer["verified"], answer["findings"]) == (True, [])
    assert hypervisor.run(f"head -c 8 {answer['screenshot']} | od -An -tx1").strip() == "89 50 4e 47 0d 0a 1a 0a"
    assert hypervisor.run("virsh list --all --name") == domains
    assert "vmkeeper" not in hypervisor.run("cat /proc/mounts")
    assert (
        hypervisor.run("find /var/lib/libvirt/vmkeeper -mindepth 2; find /var/lib/vmkeeper.libvirt/journal -type f")
        == ""
    )
    assert hypervisor.run("ls /etc/apparmor.d/libvirt") == profiles
    assert lent.facts() == lent.before
    assert lent.denials_since(since) == []
