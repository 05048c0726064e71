# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Going back: the guest is what it was, one can go back again, and an interrupted revert is finished or taken back."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import ways
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import IMAGES, DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import MIB


@pytest.fixture(scope="module")
def guest(make_guest: Callable[..., Guest]) -> Guest:
    return make_guest(
        GuestSpec(
            "revert",
            disks=(
                DiskSpec("vda", size=32 * MIB, writer=False),
                DiskSpec("vdb", size=24 * MIB, format="raw", writer=False),
            ),
        )
    )


@pytest.fixture(autouse=True)
def flat_and_running(guest: Guest) -> Iterator[None]:
    if not guest.is_running():
        guest.start()
    yield
    tasks.ok("recover_domain", domain=guest.name)
    for name in ways.snapshots(guest):
        tasks.ok("snapshot", domain=guest.name, name=name, state="absent")
    tasks.ok("blockcommit", domain=guest.name)
    ways.assert_whole(guest)


def back(guest: Guest, name: str, **options: object) -> tasks.Outcome:
    """Go back and wait for the guest, if it runs."""
    answer = tasks.ok("snapshot", domain=guest.name, name=name, state="reverted", **options)
    if guest.is_running():
        guest.wait_ready()
    return answer


def test_a_running_guest_is_booted_on_the_snapshot_only_if_that_is_allowed(guest: Guest) -> None:
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one")
    ways.write(guest, "two")
    before = ways.files(guest)
    refused = tasks.run("snapshot", domain=guest.name, name="one", state="reverted", allow_restart=False)
    assert refused.failed
    assert "allow_restart" in refused.message
    assert ways.files(guest) == before
    foreseen = tasks.ok("snapshot", domain=guest.name, name="one", state="reverted", allow_restart=True, check=True)
    assert ways.read(guest) == {"two"}
    answer = back(guest, "one", allow_restart=True)
    assert foreseen["snapshot"]["discarded"] == answer["snapshot"]["discarded"]
    assert [part["disk"] for part in answer["snapshot"]["discarded"]] == ["vda", "vdb"]
    assert answer["snapshot"]["guest"] == "booted"
    assert ways.read(guest) == {"one"}
    ways.assert_whole(guest)
    ways.write(guest, "three")
    assert back(guest, "one", allow_restart=True).changed
    assert ways.read(guest) == {"one"}
    ways.assert_whole(guest)


def test_memory_is_resumed_again_and_again_and_the_next_start_is_on_the_same_disks(guest: Guest) -> None:
    ways.write(guest, "one")
    guest.exec("echo held > /run/in-memory")
    tasks.ok("snapshot", domain=guest.name, name="one", memory=True)
    for _time in range(2):
        ways.write(guest, "two")
        guest.exec("echo lost > /run/in-memory")
        assert back(guest, "one")["snapshot"]["guest"] == "resumed"
        assert guest.read_file("/run/in-memory") == b"held\n"
        assert ways.read(guest) == {"one"}
        ways.assert_whole(guest)
    ways.write(guest, "three")
    guest.shutdown()
    assert ways.read(guest) == {"three"}
    # Also from off: that is what its memory is for.
    assert back(guest, "one")["snapshot"]["guest"] == "resumed"
    assert ways.read(guest) == {"one"}


def test_the_present_is_kept_as_a_branch_that_one_can_go_back_to(guest: Guest) -> None:
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one")
    ways.write(guest, "two")
    answer = back(guest, "one", allow_restart=True, keep_present_as="two")
    assert answer["snapshot"]["kept_present_as"] == "two"
    assert answer["snapshot"]["discarded"] == []
    assert ways.read(guest) == {"one"}
    assert ways.snapshots(guest) == {"one": None, "two": "one"}
    again = tasks.run(
        "snapshot", domain=guest.name, name="one", state="reverted", allow_restart=True, keep_present_as="two"
    )
    assert again.failed
    assert "keep_present_as" in again.message
    info = tasks.ok("snapshot_info", domain=guest.name, name="two")
    assert info["snapshot"]["tags"] == {}
    back(guest, "two", allow_restart=True)
    assert ways.read(guest) == {"two"}
    ways.assert_whole(guest)


def test_a_stopped_domain_stays_off_and_keeps_todays_definition(guest: Guest) -> None:
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one")
    ways.write(guest, "two")
    guest.shutdown()
    text = guest.xml_text(inactive=True)
    guest.connection().defineXML(text.replace("<on_crash>destroy</on_crash>", "<on_crash>preserve</on_crash>"))
    try:
        assert back(guest, "one")["snapshot"]["guest"] == "shut off"
        assert not guest.is_running()
        assert ways.read(guest) == {"one"}
        assert "<on_crash>preserve</on_crash>" in guest.xml_text(inactive=True)
    finally:
        text = guest.xml_text(inactive=True)
        guest.connection().defineXML(text.replace("<on_crash>preserve</on_crash>", "<on_crash>destroy</on_crash>"))


def test_a_revert_that_boots_is_finished_by_the_same_task_after_a_kill(guest: Guest, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one")
    # Every step is killed below, where the guest is resumed, which takes less time.
    for step in ("begin", "stop", "start", "discard"):
        ways.write(guest, "two")
        options = {"domain": guest.name, "name": "one", "state": "reverted", "allow_restart": True}
        killed = tasks.finish(tasks.killed_at(step, "snapshot", log, **options))
        assert killed.killed, (step, tasks.steps_in(log))
        if step in ("begin", "overlays"):
            assert ways.read(guest) == {"two"}, step
        tasks.ok("snapshot", **options)
        guest.wait_ready()
        assert ways.read(guest) == {"one"}, step
        ways.assert_whole(guest)


#: The first ``begin`` and ``overlays`` are of the snapshot that keeps the present.
KEPT_AT = ["begin#2", "overlays#2", "stop", "define", "current", "checkpoints", "start", "discard", "unmark"]


def test_the_kept_present_survives_a_kill_at_any_step_and_the_same_task_afterwards(
    guest: Guest, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one", memory=True)
    options = {"domain": guest.name, "name": "one", "state": "reverted", "keep_present_as": "kept"}
    for step in KEPT_AT:
        ways.write(guest, f"before {step}")
        # At "discard" nothing is left to do but the mark: what is thrown away is kept.
        killed = tasks.finish(tasks.killed_at(step, "snapshot", log, **options))
        assert killed.killed, (step, tasks.steps_in(log))
        answer = tasks.ok("snapshot", **options)
        assert answer["snapshot"]["kept_present_as"] == "kept"
        guest.wait_ready()
        assert ways.read(guest) == {"one"}, step
        assert ways.snapshots(guest) == {"one": None, "kept": "one"}, step
        assert ways.content_of(guest, "kept") == {f"before {step}"}, step
        assert tasks.ok("snapshot_info", domain=guest.name, name="kept")["snapshot"]["tags"] == {}, step
        ways.assert_whole(guest)
        tasks.ok("snapshot", domain=guest.name, name="kept", state="absent")


def test_a_group_that_was_killed_between_its_domains_goes_back_whole_and_keeps_each_present(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    pair = [
        make_guest(GuestSpec(name, disks=(DiskSpec("vda", size=8 * MIB, fs=None, writer=False),)), start="no")
        for name in ("first", "second")
    ]
    names = [one.name for one in pair]
    for one in pair:
        ways.write_stopped(one, "one")
    tasks.ok("snapshot", domains=names, name="one")
    options = {"domains": names, "name": "one", "state": "reverted", "keep_present_as": "kept"}
    # Both presents are kept first; then one domain goes back after the other.
    for step in ("begin#2", "begin#3", "begin#4", "define", "define#2"):
        for one in pair:
            ways.write_stopped(one, f"before {step}")
        killed = tasks.finish(tasks.killed_at(step, "snapshot", tmp_path / "steps", **options))
        assert killed.killed, (step, tasks.steps_in(tmp_path / "steps"))
        assert len(tasks.ok("snapshot", **options)["snapshots"]) == 2
        for one in pair:
            assert ways.read_stopped(one.active_paths().values()) == {"one"}, step
            assert ways.read_stopped(ways.bases(one, "kept").values()) == {f"before {step}"}, step
            shown = tasks.ok("snapshot_info", domain=one.name, name="kept")["snapshot"]
            assert shown["tags"] == {}, step
            ways.assert_whole(one)
        tasks.ok("snapshot", domains=names, name="kept", state="absent")
    for one in pair:
        one.cleanup()


def test_recover_domain_finishes_what_had_stopped_the_guest_and_takes_back_what_had_not(
    guest: Guest, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one", memory=True)
    ways.write(guest, "two")
    for step, content in (("overlays", "two"), ("define", "one")):
        killed = tasks.finish(tasks.killed_at(step, "snapshot", log, domain=guest.name, name="one", state="reverted"))
        assert killed.killed
        foreseen = tasks.ok("recover_domain", domain=guest.name, check=True)
        assert len(foreseen["findings"]) == 1
        found = tasks.ok("recover_domain", domain=guest.name)["findings"]
        assert [one["settled"] for one in found] == [True]
        guest.wait_ready()
        assert ways.read(guest) == {content}
        ways.assert_whole(guest)
        assert not tasks.ok("recover_domain", domain=guest.name).changed


def test_a_guest_that_was_started_by_hand_after_a_kill_is_not_stopped_again(guest: Guest, tmp_path: Path) -> None:
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one")
    ways.write(guest, "two")
    options = {"domain": guest.name, "name": "one", "state": "reverted", "allow_restart": True}
    killed = tasks.finish(tasks.killed_at("define", "snapshot", tmp_path / "steps", **options))
    assert killed.killed
    assert not guest.is_running()
    guest.start()
    found = tasks.ok("recover_domain", domain=guest.name)["findings"]
    assert [one["action"] for one in found] == ["taken back"]
    assert ways.read(guest) == {"two"}
    ways.assert_whole(guest)


def test_what_a_guest_did_on_its_old_disks_after_a_kill_is_not_thrown_away(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    worked = make_guest(GuestSpec("worked", disks=(DiskSpec("vda", size=8 * MIB, fs=None, writer=False),)), start="no")
    ways.write_stopped(worked, "one")
    tasks.ok("snapshot", domain=worked.name, name="one")
    options = {"domain": worked.name, "name": "one", "state": "reverted"}
    old = worked.active_paths()
    for after in ("shutdown", "save"):
        assert tasks.finish(tasks.killed_at("define", "snapshot", tmp_path / "steps", **options)).killed
        ways.write_stopped(worked, after)
        if after == "save":
            worked.start(wait=False)
            worked.domain().managedSave(0)
        (found,) = tasks.ok("recover_domain", domain=worked.name)["findings"]
        assert found["action"] == "taken back", after
        assert worked.active_paths() == old
        assert ways.read_stopped(old.values()) == {after}
        ways.assert_whole(worked)
    refused = tasks.run("snapshot", **options)
    assert "managed-save" in refused.message
    worked.cleanup()


def test_memory_is_not_resumed_on_disks_that_the_guest_has_written_after_a_kill(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    moved = make_guest(GuestSpec("moved", disks=(DiskSpec("vda", size=8 * MIB, fs=None, writer=False),)), start="no")
    moved.start(wait=False)
    tasks.ok("snapshot", domain=moved.name, name="one", memory=True)
    options = {"domain": moved.name, "name": "one", "state": "reverted"}
    assert tasks.finish(tasks.killed_at("start", "snapshot", tmp_path / "steps", **options)).killed
    moved.start(wait=False)
    moved.domain().managedSave(0)
    saved = tasks.run("snapshot", **options)
    assert "managed-save" in saved.message
    assert moved.domain().hasManagedSaveImage()
    moved.start(wait=False)
    moved.destroy()
    ways.write_stopped(moved, "since")
    (found,) = tasks.ok("recover_domain", domain=moved.name)["findings"]
    assert found["action"] == "finished"
    assert moved.domain().state() == [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED]
    ways.assert_whole(moved)
    moved.cleanup()


def test_memory_is_refused_what_others_use_by_now_and_comes_back_without_a_medium_that_has_gone(
    make_guest: Callable[..., Guest],
) -> None:
    iso = IMAGES / "seed.iso"
    medium = f"<disk type='file' device='cdrom'><source file='{iso}'/><target dev='sda' bus='sata'/><readonly/></disk>"
    disks = tuple(DiskSpec(target, size=8 * MIB, fs=None, writer=False) for target in ("vda", "vdb"))
    seeded = make_guest(GuestSpec("seeded", disks=disks, extra_devices=medium), start="no")
    iso.write_bytes(bytes(MIB))
    seeded.start(wait=False)
    tasks.ok("snapshot", domain=seeded.name, name="one", memory=True, disks=["vda"])
    data = seeded.images["vdb"]
    drives = {one.find("target").get("dev"): one for one in seeded.xml(inactive=True).iterfind("devices/disk")}
    seeded.destroy()
    drives["sda"].remove(drives["sda"].find("source"))
    seeded.domain().updateDeviceFlags(ElementTree.tostring(drives["sda"], encoding="unicode"))
    seeded.domain().detachDeviceFlags(ElementTree.tostring(drives["vdb"], encoding="unicode"))
    iso.unlink()
    options = {"domain": seeded.name, "name": "one", "state": "reverted"}
    clone, hidden = data.with_name("clone.qcow2"), data.with_name("hidden")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", data, "-F", "qcow2", clone], check=True)
    refused = tasks.run("snapshot", **options)
    assert str(clone) in refused.message
    clone.unlink()
    data.rename(hidden)
    refused = tasks.run("snapshot", **options, check=True)
    assert f"{data}, which is missing" in refused.message
    hidden.rename(data)
    assert tasks.ok("snapshot", **options)["snapshot"]["guest"] == "resumed"
    assert seeded.xml().find("devices/disk[@device='cdrom']/source") is None
    assert seeded.active_paths()["vdb"] == data
    seeded.cleanup()


def test_a_layer_that_another_tool_puts_on_top_after_a_kill_keeps_what_it_stands_on(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    disks = tuple(DiskSpec(target, size=8 * MIB, fs=None, writer=False) for target in ("vda", "vdb"))
    used = make_guest(GuestSpec("used", disks=disks), start="no")
    ways.write_stopped(used, "one")
    tasks.ok("snapshot", domain=used.name, name="one")
    ways.write_stopped(used, "two")
    options = {"domain": used.name, "name": "one", "state": "reverted"}
    assert tasks.finish(tasks.killed_at("start", "snapshot", tmp_path / "steps", **options)).killed
    fresh = used.active_paths()
    ways.write_stopped(used, "three")
    used.start(wait=False)
    foreign = {target: used.directory / f"{target}.foreign" for target in fresh}
    parts = "".join(
        f"<disk name='{one}' snapshot='external'><source file='{path}'/></disk>" for one, path in foreign.items()
    )
    xml = f"<domainsnapshot><name>foreign</name><disks>{parts}</disks></domainsnapshot>"
    used.domain().snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    (found,) = tasks.ok("recover_domain", domain=used.name)["findings"]
    assert found["action"] == "finished"
    assert used.is_running()
    assert used.active_paths() == foreign
    assert [ways.chain(path)[:2] for path in foreign.values()] == [[foreign[one], fresh[one]] for one in fresh]
    assert used.domain().snapshotCurrent().getName() == "foreign"
    used.destroy()
    assert ways.read_stopped(used.active_paths().values()) == {"three"}
    ways.assert_whole(used)
    used.cleanup()


def test_checkpoints_made_after_the_snapshot_end_and_earlier_ones_go_on(guest: Guest) -> None:
    def checkpoint(name: str) -> None:
        xml = f"<domaincheckpoint><name>{name}</name><disks><disk name='vda'/><disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>"
        guest.domain().checkpointCreateXML(xml)

    checkpoint("before")
    tasks.ok("snapshot", domain=guest.name, name="one", disks=["vda"])
    tasks.ok("snapshot", domain=guest.name, name="two", disks=["vda"])
    checkpoint("after")
    answer = back(guest, "one", allow_restart=True)
    try:
        assert answer["snapshot"]["checkpoints_ended"] == ["after"]
        assert [one.getName() for one in guest.domain().listAllCheckpoints()] == ["before"]
        # libvirt measures through every layer, so the chain of bitmaps must be whole.
        size = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        assert "size=" in guest.domain().checkpointLookupByName("before").getXMLDesc(size)
    finally:
        for one in guest.domain().listAllCheckpoints():
            one.delete()


def test_an_internal_snapshot_is_gone_back_to_after_any_kill_and_refused_under_dirty_bitmaps(
    make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    inside = make_guest(GuestSpec("inside", disks=(DiskSpec("vda", size=24 * MIB, writer=False),)))
    ways.write(inside, "one")
    tasks.ok("snapshot", domain=inside.name, name="one", mode="internal", memory=True)
    inside.domain().checkpointCreateXML("<domaincheckpoint><name>c</name></domaincheckpoint>")
    ways.write(inside, "two")
    refused = tasks.run("snapshot", domain=inside.name, name="one", state="reverted")
    assert refused.failed
    assert "bitmap" in refused.message
    assert inside.is_running()
    assert ways.read(inside) == {"two"}
    inside.domain().checkpointLookupByName("c").delete()
    options = {"domain": inside.name, "name": "one", "state": "reverted"}
    for step in ("begin", "overlays", "revert", "begin#2", "unmark"):
        keep = {"keep_present_as": "kept"} if step in ("begin#2", "unmark") else {}
        ways.write(inside, "two")
        killed = tasks.finish(tasks.killed_at(step, "snapshot", tmp_path / "steps", **options, **keep))
        assert killed.killed, (step, tasks.steps_in(tmp_path / "steps"))
        assert step == "unmark" or ways.read(inside) == {"two"}, step
        tasks.ok("snapshot", **options, **keep)
        inside.wait_ready()
        assert ways.read(inside) == {"one"}, step
        assert ways.snapshots(inside) == ({"one": None, "kept": "one"} if keep else {"one": None}), step
        if keep:
            tasks.ok("snapshot", domain=inside.name, name="kept", state="reverted")
            inside.wait_ready()
            assert ways.read(inside) == {"two"}, step
            tasks.ok("snapshot", domain=inside.name, name="kept", state="absent")
    inside.cleanup()


def test_what_cannot_be_gone_back_to_is_refused_before_anything_is_changed(guest: Guest) -> None:
    ways.write(guest, "one")
    tasks.ok("snapshot", domain=guest.name, name="one", memory=True)
    unknown = tasks.run("snapshot", domain=guest.name, name="nothing", state="reverted")
    assert "one" in unknown.message
    hidden = guest.directory / "hidden"
    memory = next(guest.directory.glob("*.memory"))
    memory.rename(hidden)
    try:
        refused = tasks.run("snapshot", domain=guest.name, name="one", state="reverted", allow_restart=False)
        assert refused.failed
        assert str(memory) in refused.message
    finally:
        hidden.rename(memory)
    ignored = tasks.run("snapshot", domain=guest.name, name="one", state="reverted", tags={"a": "b"})
    assert ignored.failed
    assert guest.is_running()
    assert ways.read(guest) == {"one"}


def test_a_volume_is_flat_again_when_the_snapshot_that_it_went_back_to_is_removed(make_guest):
    disk = DiskSpec("vda", size=8 * MIB, fs=None, writer=False, kind="volume")
    guest = make_guest(GuestSpec("pooled", disks=(disk,)), start="no")
    tasks.ok("snapshot", domains=[guest.name], name="pooled")
    tasks.ok("snapshot", domains=[guest.name], name="pooled", state="reverted")
    tasks.ok("snapshot", domains=[guest.name], name="pooled", state="absent")
    source = guest.xml(inactive=True).find("devices/disk/source")
    assert source.get("volume") == "vda.qcow2" or source.get("file") == str(guest.images["vda"])
    assert list(guest.images["vda"].parent.iterdir()) == [guest.images["vda"]]
