# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Guests confined by AppArmor on newer libvirt and QEMU, in whole machines of those Debian releases.

They are emulated, in a machine that may be emulated itself: there is one guest for each release, and the tests follow one
another on it. `tests/generations` does more on the same releases, without AppArmor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from nested import guest, machine, task
from nested.confined import Confined
from nested.image import Recipe
from nested.machine import Machine, MachineError

pytestmark = pytest.mark.timeout(3600)

RELEASES = ("trixie", "sid")
MARK = "/disk/vda/mark"
REPOSITORY = "/srv/backup/newer"
AGAIN = f"{guest.IMAGES}/again"
#: Seconds: a profile is loaded inside the freeze, by an emulated CPU.
DEADLINE = 600
PATIENCE = 3000.0


@dataclass(frozen=True)
class Newer:
    """The guest of one release."""

    guest: Confined
    denies: bool
    """libvirt before 12.1: its profile denies writes to the layers that the guest was started on (docs/apparmor.md)."""

    def task(self, module: str, **arguments: Any) -> dict[str, Any]:
        """What the module answers for this guest."""
        return self.guest.task(module, timeout=PATIENCE, **arguments)

    def write(self, text: str) -> None:
        """Let the guest write its mark to its disk."""
        guest.execute(self.guest.hypervisor, self.guest.name, f"echo {text} >{MARK}; sync")

    def read(self) -> str:
        """The mark as the guest reads it from its disk."""
        return guest.execute(
            self.guest.hypervisor, self.guest.name, f"echo 3 >/proc/sys/vm/drop_caches; cat {MARK}"
        ).strip()

    def wait(self) -> None:
        """Wait until the guest is up."""
        guest.wait_agent(self.guest.hypervisor, self.guest.name)

    def mark_in(self, image: str) -> str:
        """The mark in an image at rest, with all below it; libvirt and the collection have no part in it."""
        return self.guest.hypervisor.run(
            f"qemu-img convert -O raw {image} /tmp/read.raw"
            " && debugfs -R 'cat /mark' /tmp/read.raw 2>/dev/null && rm /tmp/read.raw"
        ).strip()

    def chain(self) -> list[str]:
        """The layers of the guest's disk, the active one first, as the images say."""
        shown = self.guest.hypervisor.run(f"qemu-img info -U --backing-chain --output=json {self.guest.active()}")
        return [layer["filename"] for layer in json.loads(shown)]

    def untouched(self) -> bool:
        """Whether it runs, is not frozen, and nothing of ours is unfinished."""
        asked = self.guest.virsh("qemu-agent-command", '\'{"execute":"guest-fsfreeze-status"}\'')
        journal = self.guest.hypervisor.run("find /var/lib/vmkeeper.libvirt/journal -type f 2>/dev/null || true")
        return self.guest.is_running() and json.loads(asked)["return"] == "thawed" and journal == ""


@pytest.fixture(scope="module", params=RELEASES)
def newer_hypervisor(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine of that release, whose guests are emulated."""
    started = machine.start(request.param, Recipe(suite=request.param), kvm_inside=False)
    yield started
    machine.destroy(started.name)
    assert not started.directory.exists()


@pytest.fixture(scope="module")
def newer(newer_hypervisor: Machine) -> Newer:
    """Its one guest, which is paused before its first instruction: what needs no guest that is up comes first."""
    version = tuple(int(part) for part in newer_hypervisor.run("virsh --version").strip().split("."))
    made = Newer(Confined(newer_hypervisor, "newer", writer=False, start=False), denies=version < (12, 1))
    made.guest.virsh("start --paused")
    return made


def test_an_emulated_guest_is_confined(newer: Newer) -> None:
    confined = newer.guest
    assert guest.acceleration(confined.hypervisor, confined.name) == "qemu"
    label = f"libvirt-{confined.virsh('domuuid')}"
    assert confined.virsh("dumpxml", "--xpath \"//seclabel[@model='apparmor']/label/text()\"") == label
    pid = confined.hypervisor.run(f"cat /run/libvirt/qemu/{confined.name}.pid").strip()
    assert confined.hypervisor.run(f"cat /proc/{pid}/attr/current").strip() == f"{label} (enforce)"


def test_a_layer_that_the_guest_was_started_on_takes_a_commit_on_libvirt_12_only(newer: Newer) -> None:
    confined = newer.guest
    overlay = confined.snapshot(f"{confined.directory}/overlay.qcow2")
    assert confined.denied() == []
    confined.restart("--paused")
    assert confined.denied() == ([confined.base] if newer.denies else [])
    if newer.denies:
        with pytest.raises(MachineError, match="Permission denied"):
            confined.virsh("blockcommit", "vda --active --wait --pivot")
        assert newer.chain() == [overlay, confined.base]
    else:
        confined.virsh("blockcommit", "vda --active --wait --pivot")
        assert newer.chain() == [confined.base]
        overlay = confined.snapshot(f"{confined.directory}/pulled.qcow2")
    confined.virsh("blockpull", "vda --wait")
    assert newer.chain() == [overlay]


def test_the_end_of_a_commit_below_or_of_a_backup_closes_no_layer_on_libvirt_12(newer: Newer) -> None:
    if newer.denies:
        pytest.skip("what older libvirt does then is measured on Debian 12, by test_apparmor.py")
    confined = newer.guest
    first, second, third = (confined.snapshot(f"{confined.directory}/{number}.qcow2") for number in (1, 2, 3))
    assert confined.denied() == []
    confined.virsh("blockcommit", f"vda --base {first} --top {second} --wait")
    assert confined.denied() == []
    confined.virsh("blockpull", "vda --wait")
    assert newer.chain() == [third]
    top = confined.snapshot(f"{confined.directory}/4.qcow2")
    confined.virsh("backup-begin")
    confined.hypervisor.run(
        f"for i in $(seq 300); do virsh backup-dumpxml {confined.name} >/dev/null 2>&1 || exit 0; sleep 1; done; exit 1"
    )
    assert confined.denied() == []
    confined.virsh("blockpull", "vda --wait")
    assert newer.chain() == [top]


def test_snapshots_are_taken_and_gone_back_to_and_the_guest_flattened(newer: Newer) -> None:
    newer.guest.virsh("resume")
    newer.wait()
    newer.write("one")
    taken = newer.task("snapshot", name="one", quiesce="required", deadline=DEADLINE)["snapshot"]
    assert taken["consistency"] == "filesystem", taken
    assert newer.untouched()
    newer.write("two")
    newer.task("snapshot", name="two", memory=True)
    newer.write("three")
    # With its memory, since a boot takes minutes here. The profile is that of a start all the same.
    newer.task("snapshot", name="two", state="reverted")
    newer.wait()
    assert newer.read() == "two"
    newer.write("four")
    active, *lower = newer.chain()
    assert len(lower) == 2
    assert set(newer.guest.denied()) == (set(lower) if newer.denies else set())
    (disk,) = newer.task("blockcommit")["disks"]
    assert disk["method"] == ("pull" if newer.denies else "live"), disk
    assert ("AppArmor" in (disk["why"] or "")) == newer.denies
    assert newer.chain() == [active if newer.denies else lower[-1]]
    assert newer.read() == "four"
    assert newer.untouched()


def test_restore_points_are_made_across_a_snapshot_and_restored(newer: Newer) -> None:
    confined = newer.guest
    confined.hypervisor.run(f"install -d -m 0711 {REPOSITORY} {AGAIN}")
    points = []
    for kind in ("full", "incremental"):
        newer.write(kind)
        made = newer.task("backup", repository=REPOSITORY, quiesce="required", deadline=DEADLINE)["restore_point"]
        assert (made["type"], made["consistency"]) == (kind, "filesystem"), made
        points.append(f"{REPOSITORY}/{made['domain_uuid']}/{made['id']}/vda.qcow2")
        if kind == "full":
            newer.task("snapshot", name="between", quiesce="never")
            newer.write("between")
            newer.task("snapshot", name="between", state="absent")  # this layer was made while the guest runs
            assert len(newer.chain()) == 1
    newer.write("later")
    assert [newer.mark_in(point) for point in points] == ["full", "incremental"]
    arguments = {"repository": REPOSITORY, "id": made["id"], "directory": AGAIN, "state": "defined"}
    task.run(confined.hypervisor, "restore", domain="lab-again", timeout=PATIENCE, **arguments)
    confined.hypervisor.run(f"qemu-img compare {AGAIN}/lab-again.vda.qcow2 {points[1]}")
    assert newer.mark_in(f"{AGAIN}/lab-again.vda.qcow2") == "incremental"
    assert newer.read() == "later"
    assert newer.untouched()
