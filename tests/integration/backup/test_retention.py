# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Points of a living guest go in every position while it is backed up on; killed at every step, the same task finishes."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import libvirt
import pytest
import yaml
from lab.ansible import CHECKOUT, run_module_process
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import Passphrase
from ansible_collections.vmkeeper.libvirt.tests.docs_examples import examples_in
from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.built import UUID, Built
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import ok, point, task

CYCLES = 6 * points.SCALE


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(
        GuestSpec("aging", disks=tuple(DiskSpec(name, size=8 * MIB, fs=None, writer=False) for name in ("vda", "vdb")))
    )


@pytest.fixture(scope="module")
def repository(make_repository) -> Path:
    return make_repository()


def ids(repository: Path) -> list[str]:
    """The points that exist."""
    return sorted(path.parent.name for path in repository.glob("*/[0-9]*/manifest.json"))


def assert_exact(repository: Path, expected: dict[str, dict[str, str]], story: object) -> None:
    """Each point, read by qemu-img alone, is what the guest read from its own devices then."""
    assert ids(repository) == sorted(expected), story
    for identifier, hashes in expected.items():
        for target, content in hashes.items():
            image = next(repository.glob(f"*/{identifier}/{target}.qcow2"))
            assert points.content(image) == content, (identifier, target, story)


class Aging:
    """Backs the guest up and removes points, and knows what each must hold."""

    def __init__(self, guest: Guest, repository: Path, rng: random.Random) -> None:
        self.guest = guest
        self.repository = repository
        self.rng = rng
        self.expected: dict[str, dict[str, str]] = {}
        self.kinds: list[str] = []
        self.story: list[str] = []
        self.attached: str | None = None
        self.made = 0

    def write(self) -> None:
        for target in ("vda", "vdb"):
            for _time in range(self.rng.randint(0, 2)):
                self.made += 1
                points.fill(self.guest, target, f"w{self.made}", self.rng.randrange(120), self.rng.randint(1, 8))

    def backup(self) -> None:
        self.write()
        hashes = {target: points.device_hash(self.guest, target) for target in ("vda", "vdb")}
        if self.attached:
            hashes["vdc"] = self.guest.exec("sha256sum /dev/vdc").text.split()[0]
        made = point(self.guest, self.repository)
        self.expected[made["id"]] = hashes
        self.kinds.append(made["type"])
        self.story.append(f"backup {made['id']} {made['type']} ({made['reason']})")

    def remove(self, identifier: str) -> None:
        self.story.append(f"remove {identifier}")
        gone = ok(
            "backup", domain=self.guest.name, repository=str(self.repository), state="absent", id=identifier, diff=True
        )
        assert gone["changed"]
        assert gone["diff"]["before"]["restore_points"][0]["id"] == identifier
        del self.expected[identifier]

    def attach(self) -> None:
        image = self.guest.directory / "vdc.qcow2"
        points.run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
        points.run("qemu-io", "-c", "write -P 0x5a 0 1M", image)
        source = f"<driver name='qemu' type='qcow2'/><source file='{image}'/><target dev='vdc' bus='virtio'/>"
        self.attached = f"<disk type='file' device='disk'>{source}</disk>"
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        self.guest.domain().attachDeviceFlags(self.attached, flags)
        until(lambda: self.guest.exec("ls /dev/vdc 2>/dev/null || true").text, "the guest seeing its new disk")


def test_points_go_in_every_position_of_a_random_history(guest: Guest, repository: Path, directory: Path) -> None:
    seed = int(os.environ.get("VMK_SEED", str(time.time_ns() % 10**9)))
    print(f"VMK_SEED={seed}")
    rng = random.Random(seed)
    aging = Aging(guest, repository, rng)
    positions: list[str] = []
    for number in range(CYCLES):
        aging.backup()
        if number == 2:
            aging.attach()
        present = sorted(aging.expected)
        if len(present) < 3:
            continue
        positions = positions or rng.sample(["oldest", "middle", "newest"], 3)
        position = positions.pop()
        where = {"oldest": 0, "newest": -1, "middle": rng.randrange(1, len(present) - 1)}[position]
        aging.remove(present[where])
        assert_exact(repository, aging.expected, (seed, aging.story))
        if position == "newest":
            assert points.checkpoints(guest) == [], "it went with its point"
            aging.backup()
            assert aging.kinds[-1] == "full", aging.story
        else:
            assert len(points.checkpoints(guest)) == 1
            aging.backup()
            assert aging.kinds[-1] == "incremental", aging.story
    assert_exact(repository, aging.expected, (seed, aging.story))
    for identifier in aging.expected:
        ok("backup_verify", repository=str(repository), id=identifier)
    points.assert_nothing_left(guest, repository)
    # What the module says that it will do is what it does.
    arguments = {"repository": str(repository), "domain": guest.name, "keep_last": 2}
    foreseen = run_module_process("backup_retention", check=True, **arguments).result()
    assert_exact(repository, aging.expected, "check mode changes nothing")
    done = ok("backup_retention", **arguments)
    assert foreseen["changed"] == done["changed"]
    for key in ("kept", "removed"):
        assert [one["id"] for one in foreseen[key]] == [one["id"] for one in done[key]], key
    assert 0 < done["freed_bytes"] <= foreseen["freed_bytes"]
    assert [one["why"] for one in done["kept"]] == ["keep_last: 1 of 2", "keep_last: 2 of 2"]
    staying = {one["id"]: aging.expected[one["id"]] for one in done["kept"]}
    assert_exact(repository, staying, "retention")
    again = ok("backup_retention", **arguments)
    assert (again["changed"], again["removed"], again["freed_bytes"]) == (False, [], 0)
    aging.expected = staying
    aging.backup()
    assert_exact(repository, aging.expected, aging.story)
    ok("restore", repository=str(repository), id=done["kept"][0]["id"], domain="lab-aging-r", directory=str(directory))
    for target, content in staying[done["kept"][0]["id"]].items():
        assert points.content(directory / f"lab-aging-r.{target}.qcow2") == content
    points.forget_domain(guest, "lab-aging-r")


def test_the_newest_point_killed_at_every_step_of_its_removal(guest: Guest, repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    older = {one: {"vda": points.content(next(repository.glob(f"*/{one}/vda.qcow2")))} for one in ids(repository)}
    steps = ["begin", "checkpoint", "hide", "discard"]
    for step in steps:
        points.fill(guest, "vda", f"newest-{step}", 3, 5)
        made = point(guest, repository)
        arguments = {"domain": guest.name, "repository": str(repository), "state": "absent", "id": made["id"]}
        log.unlink(missing_ok=True)
        killed = run_module_process("backup", env=points.killed_at(step, log), **arguments)
        assert killed.wait() == -signal.SIGKILL, step
        assert log.read_text().split() == [*steps[: steps.index(step)], f"!{step}"]
        hidden = step == "discard"
        still = older if hidden else {**older, made["id"]: {}}
        assert_exact(repository, still, step)
        if step == "hide":
            # Any other task on the domain finishes it, here the next backup, which has no checkpoint to begin at.
            after = point(guest, repository)
            assert after["type"] == "full"
            ok("backup", **{**arguments, "id": after["id"]})
        else:
            assert ok("backup", **arguments)["changed"]
        assert ok("backup", **arguments)["changed"] is False
        assert_exact(repository, older, step)
        assert points.checkpoints(guest) == []
        points.assert_nothing_left(guest, repository)


@pytest.mark.parametrize(
    "passphrase",
    [None, pytest.param("not a secret", marks=pytest.mark.skipif(points.SCALE == 1, reason="runs in make test-long"))],
    ids=["clear", "encrypted"],
)
def test_retention_killed_at_every_step_is_finished_by_the_same_task(
    host, directory: Path, tmp_path: Path, passphrase: str | None
) -> None:
    """A fold, a merge in the middle and a removal at the end in one run; the domain is not defined here any more."""
    rng = random.Random(11)
    original = Built(directory / "original", passphrase=Passphrase(passphrase.encode()) if passphrase else None)
    original.path.mkdir()
    ids = [original.add(rng, {"vda": None})]
    for number in range(5):
        both: dict[str, str | None] = {"vda": ids[-1], "vdb": ids[-1] if number else None}
        ids.append(original.add(rng, both, grow=number % 2, protected=number in (1, 3)))
    log = tmp_path / "steps"
    staying = [ids[2], ids[4], ids[5]]
    arguments: dict[str, Any] = {"repository": str(directory / "cut"), "keep_last": 1}
    if passphrase:
        arguments["passphrase"] = passphrase
    made = original.copy(directory / "cut")
    listed = run_module_process("backup_retention", env=points.killed_at("", log), **arguments).result()
    assert not listed["failed"], listed["msg"]
    made.assert_settled(staying)
    seen: dict[str, int] = {}
    for name in log.read_text().split():
        seen[name] = seen.get(name, 0) + 1
        made = original.copy(directory / "cut")
        log.unlink()
        step = f"{name}#{seen[name]}"
        killed = run_module_process("backup_retention", env=points.killed_at(step, log), **arguments)
        assert killed.wait() == -signal.SIGKILL, step
        assert set(staying) <= set(made.ids()), step
        made.assert_exact(step)
        assert ok("backup_retention", **arguments)["changed"] is True, step
        made.assert_settled(staying)
        made.assert_exact(step)
        assert made.findings() == [], step
        assert list(points.JOURNALS.glob("*")) == []
    assert {"hide": 1, "merge": 4, "describe": 2, "discard": 3}.items() <= seen.items(), seen
    assert passphrase or seen["replace"] == 2, seen


def test_a_removal_waits_for_whoever_reads_the_chain(host, directory: Path) -> None:
    made = Built(directory / "r")
    made.path.mkdir()
    rng = random.Random(12)
    ids = [made.add(rng, {"vda": None})]
    ids.append(made.add(rng, {"vda": ids[0]}))
    ok("backup_verify", repository=str(made.path), id=ids[1])  # makes the lock
    lock = Path(f"/run/lock/vmkeeper.libvirt/chain-{made.repository.uuid}-{UUID}")
    with lock.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        removing = run_module_process("backup", domain=UUID, repository=str(made.path), state="absent", id=ids[0])
        until(lambda: str(removing.pid) in (lock.parent / UUID).read_text(), "the removal having the domain's lock")
        time.sleep(0.5)  # it must stay where it is: nothing to poll for
        assert removing.running()
        assert made.ids() == ids
    assert not removing.result()["failed"]
    assert made.ids() == [ids[1]]
    made.assert_exact("after")


def test_bad_policies_are_refused_and_the_guides_is_not(host, directory: Path) -> None:
    Built(directory).add(random.Random(1), {"vda": None})
    for policy in ({}, {"keep_last": 0, "keep_daily": 0}):
        refused = task("backup_retention", repository=str(directory), **policy)
        assert refused["failed"]
        assert "keep_last" in refused["msg"]
    assert "-1" in task("backup_retention", repository=str(directory), keep_daily=-1)["msg"]
    unknown = task("backup_retention", repository=str(directory), keep_last=1, domain="nobody")
    assert unknown["failed"]
    assert "nobody" in unknown["msg"]
    assert len(ids(directory)) == 1
    guide = examples_in(CHECKOUT / "docs" / "guides" / "backup.md")
    (policy,) = yaml.safe_load(next(example.text for example in guide if example.name == "retention"))
    arguments = {**policy["vmkeeper.libvirt.backup_retention"], "repository": str(directory)}
    assert [one["why"] for one in ok("backup_retention", **arguments)["kept"]] == ["keep_last: 1 of 3"]
