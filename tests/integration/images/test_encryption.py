# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Encrypted images: nobody reads them without the passphrase, and who has it launches the same machine."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence, secrecy
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest
from ansible_collections.vmkeeper.libvirt.tests.lab.images import run

from . import tasks
from .opened import KEY, content_of

#: What the guest writes, and nothing but an unencrypted copy of its disk can hold.
MARK = "vmk-plaintext-of-the-guest"

IMAGES = Path("/var/lib/libvirt/images")
JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")


def remove(bundle: Path) -> None:
    for path in bundle.iterdir():
        path.unlink()
    bundle.rmdir()


def test_an_encrypted_image_is_launched_with_its_passphrase_only(
    still: Guest, library: Path, launched: list[str], tmp_path: Path
) -> None:
    secret = b"nobody else shall read this line"
    known = tmp_path / "known"
    known.write_bytes(secret * 4000)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", known, still.images["vdb"])
    options = {"domain": still.name, "dest": str(library), "name": "closed", "encryption": {"passphrase": KEY}}
    tasks.refused("export_image", "shorter", **{**options, "encryption": {"passphrase": "tiny-77"}})
    tasks.refused("export_image", "format: qcow2", format="raw", **options)
    tasks.refused("export_image", "compression: none", compression="zstd", **options)
    made = tasks.ok("export_image", **options)
    assert KEY not in str(made.answer)
    assert {disk["encryption"] for disk in made["image"]["disks"]} == {"luks"}
    bundle = library / "closed"
    for file in bundle.iterdir():
        assert secret not in file.read_bytes(), file
    assert '"encrypted": true' in run("qemu-img", "info", "--output=json", bundle / "vdb.qcow2")
    assert not tasks.ok("export_image", **options).changed
    tasks.refused("export_image", "content", **{**options, "encryption": {"passphrase": KEY + "x"}})
    tasks.refused("export_image", "the encryption", **{**options, "encryption": None})

    launch = {"src": str(bundle), "domain": "lab-opened", "virt_type": "qemu"}
    launched.append("lab-opened")
    tasks.refused("import_image", "is encrypted", **launch)
    tasks.refused("import_image", "does not open it", passphrase=KEY + "x", **launch)
    new = tasks.ok("import_image", passphrase=KEY, **launch)["domain"]
    for disk in new["disks"]:
        assert evidence.same_content(still.images[disk["target"]], Path(disk["path"]))


def test_an_encrypted_export_that_is_killed_anywhere_tells_nothing_and_is_finished_by_the_same_task(
    running: Guest, library: Path, tmp_path: Path
) -> None:
    running.write_file("/disk/vdb/mark", (MARK * 4000).encode())
    options = {
        "domain": running.name, "dest": str(library), "name": "closed", "disks": ["vdb"], "quiesce": "required",
        "encryption": {"passphrase": KEY}, "deadline": "20s",
    }  # fmt: skip
    chain, log = running.xml_text(), tmp_path / "log"
    # Not one unencrypted byte of the guest lies in the destination at any time.
    with secrecy.Watch(KEY, [MARK], library, "/var/lib/vmkeeper.libvirt", "/run") as watch:
        steps = tasks.steps_of("export_image", log, **options)
        assert {"targets", "cut", "copy", "write", "seal", "sealed"} <= set(steps)
        killed = tasks.of_its_own(steps, "targets", "cut-done", "copy", "write", "seal", "sealed")
        for step in killed:
            remove(library / "closed")
            tasks.kill_at(step, "export_image", log, **options)
            done = tasks.ok("export_image", **options)
            assert done.changed, step
            assert [path.name for path in library.iterdir()] == ["closed"], step
            assert list(IMAGES.glob(".vmkeeper-export-*")) == [], step
            assert not list(JOURNAL.iterdir()), step
            assert running.frozen_filesystems() == [], step
    assert watch.samples > len(killed)
    assert "qemu-img" in watch.programs, "the watch saw it at work"
    assert watch.seen == set()
    assert secrecy.holding([KEY], *secrecy.PLACES) == []
    assert running.xml_text() == chain
    raw = content_of(library / "closed" / "vdb.qcow2", tmp_path)
    assert evidence.fsck(raw).clean
    assert evidence.read_file(raw, "/mark") == (MARK * 4000).encode()


def test_an_encrypted_import_that_is_killed_anywhere_tells_nothing_and_is_finished_by_the_same_task(
    still: Guest, library: Path, launched: list[str], tmp_path: Path
) -> None:
    tasks.ok(
        "export_image", domain=still.name, dest=str(library), name="closed", disks=["vdb"],
        encryption={"passphrase": KEY},
    )  # fmt: skip
    options = {"src": str(library / "closed"), "virt_type": "qemu", "passphrase": KEY}
    log = tmp_path / "log"
    with secrecy.Watch(KEY, [], "/var/lib/vmkeeper.libvirt", "/run") as watch:
        launched.append("lab-e")
        steps = tasks.steps_of("import_image", log, domain="lab-e", **options)
        assert {"begin", "stage", "copy", "convert", "place", "define", "defined"} <= set(steps)
        for number, step in enumerate(steps):
            name = f"lab-e{number}"
            launched.append(name)
            tasks.kill_at(step, "import_image", log, domain=name, **options)
            # Foreseen is what will be done, also where the interrupted run had placed its disks already.
            assert tasks.ok("import_image", check=True, domain=name, **options)["domain"]["name"] == name, step
            new = tasks.ok("import_image", domain=name, **options)["domain"]
            assert evidence.same_content(still.images["vdb"], Path(new["disks"][0]["path"])), step
            assert not list(JOURNAL.iterdir()), step
            assert [path.name for path in IMAGES.iterdir() if path.name.startswith(".")] == [], step
    assert watch.seen == set()
    assert secrecy.holding([KEY], *secrecy.PLACES) == []
