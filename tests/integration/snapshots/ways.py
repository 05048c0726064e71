# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of the ways back share: what the guest holds, what lies on the host, and whether both are whole."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import libvirt

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import MIB

MARK = "mark"
SECTOR = 512


def write(guest: Guest, content: str, *targets: str) -> None:
    """Let the guest write a file on each disk, durably."""
    for target in targets or tuple(guest.images):
        guest.write_file(f"/disk/{target}/{MARK}", content.encode())


def write_stopped(guest: Guest, content: str) -> None:
    """Write a mark to every disk of a domain that never boots: no file system, one sector at 1 MiB."""
    with tempfile.NamedTemporaryFile() as pattern:
        pattern.write(content.encode().ljust(SECTOR, b"\0"))
        pattern.flush()
        for target, path in guest.active_paths().items():
            kind = "raw" if backing_of(path) is None and guest.images[target].suffix == ".raw" else "qcow2"
            command = f"write -q -s {pattern.name} 1M {SECTOR}"
            subprocess.run(["qemu-io", "-f", kind, "-c", command, str(path)], check=True, stdout=subprocess.DEVNULL)


def read_stopped(paths: Iterable[Path]) -> set[str]:
    """The marks that :func:`write_stopped` left in these images, seen through their chains."""
    found = set()
    for path in paths:
        with tempfile.NamedTemporaryFile() as sector:
            source, target = f"if={path}", f"of={sector.name}"
            kind = "raw" if path.suffix == ".raw" else "qcow2"
            where = [f"bs={SECTOR}", f"skip={MIB // SECTOR}", f"count={MIB // SECTOR + 1}"]
            subprocess.run(["qemu-img", "dd", "-U", "-f", kind, "-O", "raw", source, target, *where], check=True)
            found.add(Path(sector.name).read_bytes().rstrip(b"\0").decode())
    return found


def read(guest: Guest, *targets: str) -> set[str]:
    """The contents of that file on each disk, by the running guest, or from the images of a stopped one."""
    found = set()
    for target in targets or tuple(guest.images):
        if guest.is_running():
            found.add(guest.read_file(f"/disk/{target}/{MARK}").decode())
        else:
            found.add(evidence.read_file(guest.active_paths()[target], f"/{MARK}").decode())
    return found


def files(guest: Guest) -> set[str]:
    """Names of all files in the guest's directory."""
    return {path.name for path in guest.directory.rglob("*") if path.is_file()}


def backing_of(path: Path) -> Path | None:
    """The backing file of an image, by ``qemu-img``."""
    out = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", str(path)], check=True, capture_output=True, text=True
    ).stdout
    name = json.loads(out).get("full-backing-filename")
    return Path(name) if name else None


def chain(path: Path) -> list[Path]:
    """An image and all below it, by ``qemu-img``; raises when one is missing."""
    layers = [path]
    while (below := backing_of(layers[-1])) is not None:
        layers.append(below)
    return layers


def snapshots(guest: Guest) -> dict[str, str | None]:
    """Snapshot -> parent, as libvirt has them."""
    tree = {}
    for snapshot in guest.domain().listAllSnapshots():
        parent = None
        with contextlib.suppress(libvirt.libvirtError):
            parent = snapshot.getParent().getName()
        tree[snapshot.getName()] = parent
    return tree


def bases(guest: Guest, snapshot: str) -> dict[str, Path]:
    """Target -> the image that holds the snapshot's content, as libvirt has it."""
    root = ElementTree.fromstring(guest.domain().snapshotLookupByName(snapshot).getXMLDesc(0))
    held = {
        disk.get("name") for disk in root.iterfind("disks/disk") if disk.get("snapshot") in ("external", "internal")
    }
    found = {}
    for disk in root.iterfind("domain/devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is not None and source is not None and target.get("dev") in held:
            found[str(target.get("dev"))] = Path(str(source.get("file")))
    return found


def content_of(guest: Guest, snapshot: str) -> set[str]:
    """What a snapshot holds on each external disk, read from its images."""
    return {evidence.read_file(path, f"/{MARK}").decode() for path in bases(guest, snapshot).values()}


def assert_whole(guest: Guest) -> None:
    """No chain is broken, no file lies there that nobody needs, and running and next start agree."""
    needed: set[str] = {path.name for path in guest.images.values()}
    for path in guest.active_paths().values():
        needed |= {layer.name for layer in chain(path)}
    for name in snapshots(guest):
        for path in bases(guest, name).values():
            needed |= {layer.name for layer in chain(path)}
        root = ElementTree.fromstring(guest.domain().snapshotLookupByName(name).getXMLDesc(0))
        label = root.findtext("domain/metadata/{urn:vmkeeper:libvirt:snapshot:1}snapshot")
        variables = json.loads(label).get("nvram") if label else None
        if variables:
            needed.add(Path(variables).name)
        memory = root.find("memory")
        if memory is not None and memory.get("file"):
            needed.add(Path(str(memory.get("file"))).name)
    assert files(guest) == needed, sorted(files(guest) ^ needed)
    inactive = guest.xml(inactive=True)
    for target, path in guest.active_paths().items():
        source = inactive.find(f"./devices/disk/target[@dev='{target}']/../source")
        assert source is not None
        assert source.get("file") == str(path)
    journal = Path("/var/lib/vmkeeper.libvirt/journal")
    assert not journal.exists() or not any(journal.iterdir())
