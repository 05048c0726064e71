# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Encrypted images: nobody reads them without the passphrase, and who has it launches the same machine."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest
from ansible_collections.vmkeeper.libvirt.tests.lab.images import run

from . import tasks

KEY = "correct horse battery"


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
