# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An operator who comes after a crash, and does not run the same task again: recover_domain tells, and takes everything away."""

from __future__ import annotations

from pathlib import Path

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost

from . import tasks
from .registries import Registry

IMAGES = Path("/var/lib/libvirt/images")
JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")


def lying_around() -> list[str]:
    """Directories of interrupted runs, wherever a test of this file has any."""
    return sorted(str(path) for path in [*IMAGES.glob(".*"), *IMAGES.glob("library/.*")])


def told_then_settled(kind: str, step: str, **options: list[str]) -> str:
    """In check mode it is told and nothing changed; then it is settled. Returns what was done."""
    before = lying_around()
    told = tasks.ok("recover_domain", check=True, **options)
    assert told.changed, step
    (finding,) = told["findings"]
    assert kind in finding["what"], finding
    assert not finding["settled"]
    assert set(before) <= set(finding["left"]), (step, finding)
    assert all(Path(path).exists() for path in finding["left"]), step
    assert lying_around() == before, step
    (done,) = tasks.ok("recover_domain", **options)["findings"]
    assert done["settled"], done
    assert done["left"] == finding["left"]
    assert lying_around() == [], step
    assert not list(JOURNAL.iterdir()), step
    assert tasks.ok("recover_domain")["findings"] == []
    return str(done["action"])


def test_an_interrupted_export_is_told_and_taken_away(running: Guest, library: Path, tmp_path: Path) -> None:
    options = {"domain": running.name, "dest": str(library), "name": "one", "disks": ["vdb"], "deadline": "20s"}
    chain = running.xml_text()
    for step, action in (
        ("targets", "taken back"),
        ("cut-done", "taken back"),
        ("copy", "taken back"),
        ("sealed", "finished"),
    ):
        tasks.kill_at(step, "export_image", tmp_path / "log", **options)
        assert told_then_settled("export_image", step, domains=[running.name]) == action, step
        assert [path.name for path in library.iterdir()] == (["one"] if action == "finished" else []), step
        assert running.frozen_filesystems() == [], step
        assert running.is_running(), step
    assert running.xml_text() == chain
    with pytest.raises(libvirt.libvirtError):
        running.domain().backupGetXMLDesc(0)


def test_an_import_that_has_no_domain_yet_is_found_by_its_name_and_taken_away(
    still: Guest, host: TestHost, library: Path, launched: list[str], tmp_path: Path
) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="one", disks=["vdb"])
    options = {"src": str(library / "one"), "domain": "lab-half", "virt_type": "qemu"}
    launched.append("lab-half")
    steps = tasks.steps_of("import_image", tmp_path / "log", **options)
    connection = host.connect()
    for number, step in enumerate(steps):
        domain = connection.lookupByName("lab-half") if number == 0 else None
        if domain is not None:
            domain.undefine()
            (IMAGES / "lab-half.vdb.qcow2").unlink()
        tasks.kill_at(step, "import_image", tmp_path / "log", **options)
        # Both ways to ask lead there: by the name, and for all that there is.
        named = {"domains": ["lab-half"]} if number % 2 else {}
        action = told_then_settled("import_image", step, **named)
        if step == "defined":
            assert action == "finished: it is defined"
            assert evidence.same_content(still.images["vdb"], IMAGES / "lab-half.vdb.qcow2")
            assert not tasks.ok("import_image", **options).changed
        else:
            assert action == "taken back", step
            assert list(IMAGES.glob("lab-half*")) == [], step
            assert "lab-half" not in [one.name() for one in connection.listAllDomains()]
    connection.close()
    tasks.refused("recover_domain", "lab-nobody", domains=["lab-nobody"])


def test_what_pulls_and_pushes_have_left_is_told_and_taken_away(
    still: Guest, library: Path, registry: Registry, tmp_path: Path
) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="sent", disks=["vdb"])
    reference = f"{registry.address}/left/image:v1"
    push = {"src": str(library / "sent"), "reference": reference, **registry.access}
    for step in ("layout", "push", "pushed"):
        tasks.kill_at(step, "push_image", tmp_path / "log", **push)
        told_then_settled("push_image", step)
    tasks.ok("push_image", **push)
    pull = {"dest": str(library), "name": "came", "reference": reference, **registry.access}
    for step in ("fetch", "unpack", "publish"):
        tasks.kill_at(step, "pull_image", tmp_path / "log", **pull)
        told_then_settled("pull_image", step)
        assert [path.name for path in library.iterdir()] == ["sent"], step

    # A pull that failed by itself keeps what it has fetched, for the same task, and that is told, too.
    data = max(registry.storage.rglob("data"), key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    tasks.refused("pull_image", "", **pull)
    data.write_bytes(content)
    assert tasks.ok("recover_domain", check=True)["findings"] != []
    assert tasks.ok("pull_image", **pull).changed
    assert lying_around() == []
    assert not list(JOURNAL.iterdir())


def test_what_copies_for_a_run_ends_with_it(still: Guest, library: Path, launched: list[str], tmp_path: Path) -> None:
    """Else the disks of a stopped domain would be locked by a copy that nobody wants, and it could not be started."""
    export = {"domain": still.name, "dest": str(library), "name": "one", "disks": ["vdb"]}
    tasks.kill_with("qemu-img", "convert", "export_image", hold=True, **export)
    tasks.ok("export_image", **export)
    options = {"src": str(library / "one"), "domain": "lab-copied", "virt_type": "qemu"}
    launched.append("lab-copied")
    tasks.kill_with("qemu-img", "convert", "import_image", hold=True, **options)
    assert tasks.ok("import_image", **options).changed
    assert lying_around() == []
