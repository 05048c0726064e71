# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A restore that loses its process, libvirtd or QEMU's program: the original is not lost, and the same task finishes it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest
from lab import evidence
from lab.ansible import run_module_process
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import ok, point, task
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.test_interrupted import steps_of

TARGETS = ("vda", "vdb")


class Kept:
    """A stopped domain with a point of what its disks held, which now hold something else."""

    def __init__(self, guest: Guest, repository: Path) -> None:
        self.guest = guest
        self.repository = repository
        self.write("then")
        self.then = self.contents()
        self.id = point(guest, repository)["id"]
        self.write("now")
        self.now = self.contents()
        self.xml = guest.xml_text(inactive=True)

    def write(self, when: str) -> None:
        """Let the disks hold something."""
        for number, image in enumerate(self.guest.images.values()):
            pattern = {"then": 0x10, "now": 0x20}[when] + number
            points.run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 3M", image)

    def contents(self) -> dict[str, str]:
        """What the disks hold, where the definition says that they are."""
        return {target: points.content(image) for target, image in self.guest.images.items()}

    def assert_not_lost(self, where: Any) -> None:
        """What every disk held before the restore is there, in its place or aside, unless the restored one is."""
        for target, image in self.guest.images.items():
            held = [points.content(path) for path in image.parent.glob(f"{image.name}*") if path.suffix != ".part"]
            assert self.now[target] in held or held == [self.then[target]], (where, target)

    def assert_as_before(self, where: Any) -> None:
        """Nothing of the restore is left."""
        assert self.contents() == self.now, where
        assert self.litter() == [], where
        assert self.guest.xml_text(inactive=True) == self.xml, where

    def assert_restored(self, where: Any) -> None:
        """It is what it was then, and nothing else is left."""
        assert self.contents() == self.then, where
        assert self.litter() == [], where
        assert list(points.JOURNALS.glob("*")) == [], where

    def litter(self) -> list[str]:
        """What lies beside the images."""
        wanted = {image.name for image in self.guest.images.values()}
        return sorted(
            path.name for path in self.guest.directory.iterdir() if ".qcow2" in path.name and path.name not in wanted
        )

    @property
    def in_place(self) -> dict[str, Any]:
        """The task that puts it back."""
        return {"repository": str(self.repository), "id": self.id, "in_place": True, "confirm": self.guest.name}


@pytest.fixture(scope="module")
def kept(module_guest_factory, make_repository) -> Kept:
    disks = tuple(DiskSpec(target, size=4 * MIB, fs=None, writer=False) for target in TARGETS)
    return Kept(module_guest_factory(GuestSpec("kept", disks=disks), start=False), make_repository())


@pytest.fixture(autouse=True)
def fresh(kept: Kept) -> Iterator[None]:
    """The domain is as it was before the restore, and stopped."""
    kept.write("now")
    yield
    if kept.guest.is_running():
        kept.guest.destroy()


def held_at(step: str, log: Path, **arguments: Any):
    """A restore whose process is stopped where it begins a step."""
    log.unlink(missing_ok=True)
    held = run_module_process("restore", env=points.killed_at(step, log, how="stop"), **arguments)
    until(lambda: (log.exists() and "!" in log.read_text()) or not held.running(), f"the restore reaching {step}")
    assert held.running(), held.result()["msg"]
    return held


def steps(log: Path, **arguments: Any) -> list[str]:
    """The steps that there are."""
    listed = run_module_process("restore", env=points.killed_at("", log), **arguments).result()
    assert not listed["failed"], listed["msg"]
    return steps_of(log)


def test_in_place_killed_at_every_step_the_original_is_not_lost_and_the_next_run_finishes(
    kept: Kept, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    for number, step in enumerate(steps(log, **kept.in_place)):
        kept.write("now")
        log.unlink()
        killed = run_module_process("restore", env=points.killed_at(step, log), **kept.in_place)
        assert killed.wait() == -signal.SIGKILL, step
        kept.assert_not_lost(step)
        if number % 2:
            found = ok("recover_domain", domain=kept.guest.name)["findings"]
            if [one["action"] for one in found] == ["undone"]:
                kept.assert_as_before(step)
                ok("restore", **kept.in_place)
        else:
            assert ok("restore", check=True, **kept.in_place)["changed"], step
            ok("restore", **kept.in_place)
        kept.assert_restored(step)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("where", ["in place", "anew"])
def test_libvirtd_killed_at_a_step_the_next_run_finishes(
    kept: Kept, where: str, directory: Path, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    anew = {"repository": str(kept.repository), "id": kept.id, "domain": "lab-kept-r", "directory": str(directory)}
    arguments = kept.in_place if where == "in place" else anew
    names = ["define"] if points.SCALE == 1 else steps(log, **arguments)
    for step in names:
        if list(directory.iterdir()):
            points.forget_domain(kept.guest, "lab-kept-r")
            for image in directory.iterdir():
                image.unlink()
        kept.write("now")
        held = held_at(step, log, **arguments)
        kept.guest.host.kill_libvirtd()
        os.kill(held.pid, signal.SIGCONT)
        held.wait()
        kept.guest.host.start()
        kept.assert_not_lost(step)
        again = task("restore", **arguments)
        if where == "in place":
            assert not again["failed"], (step, again["msg"])
            kept.assert_restored(step)
        else:
            # The run itself may have come to its end before it needed libvirtd again.
            assert not again["failed"] or "There is a domain" in again["msg"], (step, again["msg"])
            found = {target: points.content(directory / f"lab-kept-r.{target}.qcow2") for target in TARGETS}
            assert found == kept.then, step
            assert len(list(directory.iterdir())) == len(TARGETS), step
            assert list(points.JOURNALS.glob("*")) == [], step
    if where == "anew":
        points.forget_domain(kept.guest, "lab-kept-r")


def test_the_program_that_copies_is_killed_and_nothing_of_the_restore_is_left(kept: Kept) -> None:
    restoring = run_module_process("restore", **kept.in_place, bandwidth="64K")
    until(lambda: copying(kept) or not restoring.running(), "the copy")
    os.kill(copying(kept)[0], signal.SIGKILL)
    failed = restoring.result()
    assert failed["failed"]
    assert "Restoring disk 'vda'" in failed["msg"], failed["msg"]
    kept.assert_as_before("qemu-img")
    ok("restore", **kept.in_place)
    kept.assert_restored("again")


def copying(kept: Kept) -> list[int]:
    """The processes that write an image of the domain."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"convert" in words and any(str(kept.guest.directory).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found


def test_nothing_is_put_in_place_under_a_guest_that_was_started_meanwhile(kept: Kept, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    held = held_at("copy#2", log, **kept.in_place)
    kept.guest.domain().create()
    os.kill(held.pid, signal.SIGCONT)
    refused = held.result()
    assert refused["failed"]
    assert "was started while" in refused["msg"], refused["msg"]
    kept.guest.destroy()
    kept.assert_as_before("started while it was copied")

    log.unlink()
    killed = run_module_process("restore", env=points.killed_at("place", log), **kept.in_place)
    assert killed.wait() == -signal.SIGKILL
    kept.guest.domain().create()
    for module, arguments in (
        ("restore", kept.in_place),
        ("backup", {"domain": kept.guest.name, "repository": str(kept.repository)}),
        ("recover_domain", {"domain": kept.guest.name}),
    ):
        refused = task(module, **arguments)
        assert refused["failed"], module
        assert "Shut it down" in refused["msg"], refused["msg"]
    kept.guest.destroy()
    kept.assert_not_lost("started half done")
    ok("restore", **kept.in_place)
    kept.assert_restored("shut down again")


def test_what_somebody_else_makes_meanwhile_is_kept_and_the_restore_taken_back(
    kept: Kept, directory: Path, tmp_path: Path
) -> None:
    anew = {"repository": str(kept.repository), "id": kept.id, "domain": "lab-kept-r", "directory": str(directory)}
    held = held_at("place", tmp_path / "steps", **anew)
    taken = directory / "lab-kept-r.vdb.qcow2"
    taken.write_text("somebody's")
    os.kill(held.pid, signal.SIGCONT)
    failed = held.result()
    assert failed["failed"]
    assert failed["error"]["kind"] == "refused", failed["msg"]
    assert [path.name for path in directory.iterdir()] == [taken.name]
    assert taken.read_text() == "somebody's"
    assert list(points.JOURNALS.glob("*")) == []
    taken.unlink()
    ok("restore", **anew)
    points.forget_domain(kept.guest, "lab-kept-r")


def test_disks_that_cannot_all_be_attached_are_all_taken_back_also_after_a_kill(
    kept: Kept, directory: Path, tmp_path: Path
) -> None:
    attach = {"repository": str(kept.repository), "id": kept.id, "attach_to": kept.guest.name, "disks": list(TARGETS)}
    attach["directory"] = str(directory)
    before = kept.guest.xml_text(inactive=True)
    other = "<disk type='file' device='disk'><source file='/nowhere'/><target dev='vdd' bus='virtio'/></disk>"
    log = tmp_path / "steps"
    held = held_at("attach", log, **attach)
    kept.guest.domain().attachDeviceFlags(other, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    os.kill(held.pid, signal.SIGCONT)
    failed = held.result()
    assert failed["failed"]
    assert "Nothing was attached" in failed["msg"], failed["msg"]
    assert list(directory.iterdir()) == []
    assert list(points.JOURNALS.glob("*")) == []
    kept.guest.domain().detachDeviceFlags(other, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    assert disks_of(kept.guest.xml_text(inactive=True)) == disks_of(before)

    log.unlink()
    assert run_module_process("restore", env=points.killed_at("attach", log), **attach).wait() == -signal.SIGKILL
    kept.guest.domain().attachDeviceFlags(other, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    killed = run_module_process("restore", env=points.killed_at("take-back", log), **attach)
    assert killed.wait() == -signal.SIGKILL
    # It had come so far.
    next(directory.glob("*.vdb.qcow2")).unlink()
    kept.guest.domain().detachDeviceFlags(other, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    attached = ok("restore", **attach)["restored"]
    assert [one["attached_as"] for one in attached] == ["vdc", "vdd"]
    assert {one["target"]: points.content(Path(one["path"])) for one in attached} == kept.then
    assert {one["path"] for one in attached} < disks_of(kept.guest.xml_text(inactive=True))
    kept.guest.connection().defineXML(before)


def disks_of(xml: str) -> set[str]:
    """The images that a definition names."""
    found = ElementTree.fromstring(xml).iterfind("devices/disk/source")
    return {str(source.get("file")) for source in found}


def test_single_disks_in_place_lose_what_the_definition_records_below_them(kept: Kept, tmp_path: Path) -> None:
    image, base = kept.guest.images["vda"], kept.guest.directory / "base.img"
    points.run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    points.run("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 4M", base)
    base.chmod(0o644)
    points.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, image)
    chain = f"<backingStore type='file'><format type='qcow2'/><source file='{base}'/><backingStore/></backingStore>"
    linked = ElementTree.fromstring(kept.xml)
    linked.find("devices/disk").append(ElementTree.fromstring(chain))
    kept.guest.connection().defineXML(ElementTree.tostring(linked, encoding="unicode"))
    assert str(base) in kept.guest.xml_text(inactive=True)
    single = {**kept.in_place, "disks": ["vda"]}
    killed = run_module_process("restore", env=points.killed_at("define", tmp_path / "steps"), **single)
    assert killed.wait() == -signal.SIGKILL
    # Whoever starts it now has the point's disk, and nothing of the base where that holds zeros.
    assert str(base) not in kept.guest.xml_text(inactive=True)
    kept.guest.start()
    assert points.device_hash(kept.guest, "vda") == kept.then["vda"]
    kept.guest.destroy()
    ok("restore", **single)
    assert points.content(image) == kept.then["vda"]
    base.unlink()


def test_an_image_that_others_stand_on_is_not_replaced_and_nobodys_clone_loses_its_base(
    kept: Kept, tmp_path: Path
) -> None:
    image, clone = kept.guest.images["vda"], kept.guest.directory / "clone.img"
    made = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, clone)
    points.run(*made)
    before = points.content(clone)
    refused = task("restore", **kept.in_place, disks=["vda"])
    assert refused["failed"]
    assert f"{image} is also in use by the image {clone}" in refused["msg"], refused["msg"]
    assert points.content(clone) == before
    ok("restore", **kept.in_place, disks=["vdb"])
    # Made while the point is copied, or when its files are being put in place already.
    clone.unlink()
    log = tmp_path / "steps"
    held = held_at("copy", log, **kept.in_place)
    points.run(*made)
    os.kill(held.pid, signal.SIGCONT)
    assert "also in use" in held.result()["msg"]
    assert points.content(clone) == before
    clone.unlink()
    held = held_at("place", log, **kept.in_place)
    points.run(*made)
    os.kill(held.pid, signal.SIGCONT)
    warnings = held.result()["warnings"]
    (aside,) = kept.guest.directory.glob(f"{image.name}.before-*")
    assert any(f"{aside}, which was {image} before, is kept" in one and str(clone) in one for one in warnings), warnings
    assert points.content(aside) == kept.now["vda"]
    clone.unlink()
    aside.unlink()


def test_a_block_device_is_not_replaced_and_the_refusal_says_what_to_do(
    module_guest_factory, make_repository, directory: Path
) -> None:
    disks = (
        DiskSpec("vda", size=4 * MIB, fs=None, writer=False),
        DiskSpec("vdb", size=4 * MIB, fs=None, writer=False, format="raw", kind="block"),
    )
    guest: Guest = module_guest_factory(GuestSpec("device", disks=disks), start=False)
    points.run("qemu-io", "-f", "raw", "-c", "write -P 0x33 0 2M", guest.images["vdb"])
    repository = make_repository()
    made = point(guest, repository)
    device = guest.active_paths()["vdb"]
    assert device.is_block_device()
    before = evidence.host_state(guest.connection(), [guest.directory])
    arguments = {"repository": str(repository), "id": made["id"]}
    # A path that leads to a device is one too.
    link = directory / "link"
    link.symlink_to(device)
    for path in (device, link):
        guest.connection().defineXML(guest.xml_text(inactive=True).replace(str(guest.active_paths()["vdb"]), str(path)))
        for disks_asked in ({}, {"disks": ["vdb"]}):
            refused = task("restore", **arguments, in_place=True, confirm=guest.name, **disks_asked)
            assert refused["failed"]
            assert f"block device {path}" in refused["msg"], refused["msg"]
            assert "qemu-img convert" in refused["msg"]
    guest.connection().defineXML(guest.xml_text(inactive=True).replace(str(link), str(device)))
    assert before.differences(evidence.host_state(guest.connection(), [guest.directory])) == []
    # Beside the original it is a file, and is said to be one.
    new = ok("restore", **arguments, domain="lab-device-r", network="disconnected", directory=str(directory))
    assert [one["format"] for one in new["restored"]] == ["qcow2", "raw"]
    restored = directory / "lab-device-r.vdb.raw"
    assert points.sha256(restored) == points.sha256(device)
    root = guest.connection().lookupByName("lab-device-r").XMLDesc()
    assert f"file='{restored}'" in root
    assert str(device) not in root
    points.forget_domain(guest, "lab-device-r")
    whereto = task("restore", check=True, **arguments, domain="lab-device-r", network="disconnected")
    assert any(f"was on the block device {device}" in warning for warning in whereto["warnings"]), whereto["warnings"]
