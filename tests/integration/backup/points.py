# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What the backup tests look at, never through the product: files, libvirt, what the guest wrote."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import libvirt
from lab import evidence
from lab.ansible import CHECKOUT, Result, run_module_process
from lab.guest import Guest
from lab.waiting import until

KILLHOOK = CHECKOUT / "tests" / "lab" / "killhook"
JOURNALS = Path("/var/lib/vmkeeper.libvirt/journal")
WORKERS = Path("/var/lib/vmkeeper.libvirt/workers")
SCALE = int(os.environ.get("VMK_SCALE", "1"))


def task(module: str, **arguments: Any) -> Result:
    """Run a module of the collection to its end; the result, whether it failed or not."""
    return run_module_process(module, **arguments).result()


def ok(module: str, **arguments: Any) -> Result:
    """Run a module that must not fail."""
    result = task(module, **arguments)
    assert not result["failed"], (result["msg"], result.get("exception"))
    return result


def point(guest: Guest, repository: Path, **arguments: Any) -> dict[str, Any]:
    """Make a restore point of one guest."""
    made: dict[str, Any] = ok("backup", domain=guest.name, repository=str(repository), **arguments)["restore_point"]
    return made


def directory_of(repository: Path, made: dict[str, Any]) -> Path:
    """Where a point lies."""
    return repository / made["domain_uuid"] / made["id"]


def content(image: Path) -> str:
    """SHA-256 of what a guest would see in an image with its chain."""
    raw = evidence.flatten(image)
    try:
        return sha256(raw)
    finally:
        raw.unlink()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def device_hash(guest: Guest, target: str) -> str:
    """SHA-256 of a whole disk, computed by the guest from the device, past its cache."""
    node = guest.exec(f"cat /run/disk/{target}").text
    return guest.exec(f"sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum {node}").text.split()[0]


def fill(guest: Guest, target: str, mark: str, offset: int, blocks: int) -> None:
    """Write ``blocks`` of 64 KiB of a text at an offset in blocks, past the guest's cache, and flush: the rest is nobody's promise.

    libvirt kills a QEMU that does not end within ten seconds of ``destroy``, as on a busy host.
    """
    node = guest.exec(f"cat /run/disk/{target}").text
    writing = (
        f"dd of={node} bs=65536 seek={offset} count={blocks} iflag=fullblock oflag=direct conv=notrunc 2>/dev/null"
    )
    guest.exec(f"yes {mark} | {writing} && sync && sync {node}")


def pattern(mark: str, blocks: int) -> bytes:
    """What :func:`fill` writes."""
    line = mark.encode() + b"\n"
    size = blocks * 65536
    return (line * (size // len(line) + 1))[:size]


def has_job(guest: Guest) -> bool:
    """Whether libvirt has a backup job for the domain."""
    try:
        guest.domain().backupGetXMLDesc()
        return True
    except libvirt.libvirtError:
        return False


def checkpoints(guest: Guest) -> list[str]:
    """Names of the domain's checkpoints."""
    return sorted(one.getName() for one in guest.domain().listAllCheckpoints())


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return content


def working_for(guest: Guest) -> list[Path]:
    """What is left of sentries, and of workers of this guest that are not over. How a worker ended is kept for domain_job."""
    found = []
    for directory in WORKERS.glob("*"):
        ticket, state = _json(directory / "ticket.json"), _json(directory / "state.json")
        others = "entry" in ticket and all(uuid != guest.domain().UUIDString() for uuid, _name in ticket["domains"])
        if not others and not state.get("ended"):
            found.append(directory)
    return found


def assert_nothing_left(guest: Guest, repository: Path) -> None:
    """No job, no half point, no journal, no sentry; the guest runs, is not frozen, and no write of it failed."""
    assert not has_job(guest)
    assert [str(path) for path in repository.glob("*/.*")] == []
    assert list(JOURNALS.glob("*")) == []
    until(lambda: not working_for(guest), "the sentry going home", 60)
    if guest.is_running():
        assert guest.frozen_filesystems() == []
        for disk in guest.spec.disks:
            if disk.writer:
                assert guest.writer_errors(disk.target) == []


def scratch_files() -> list[str]:
    """What lies in the scratch directory that is used where none is given."""
    return [str(path) for path in Path("/var/lib/vmkeeper.libvirt/scratch").glob("*")]


def manifest(repository: Path, made: dict[str, Any]) -> dict[str, Any]:
    """A point's manifest as it lies."""
    found: dict[str, Any] = json.loads((directory_of(repository, made) / "manifest.json").read_text())
    return found


def run(*words: str | Path) -> str:
    """Run a program of the host; its output."""
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


def killed_at(step: str, log: Path, how: str = "kill") -> dict[str, str]:
    """The environment that kills (or stops) a module at a step of its journal."""
    found = {"PYTHONPATH": str(KILLHOOK), "VMK_KILL_LOG": str(log), "VMK_KILL_HOW": how}
    return {**found, "VMK_KILL_AT": step} if step else found


def forget_domain(guest: Guest, name: str) -> None:
    """Undefine a restored domain and remove its images."""
    domain = guest.connection().lookupByName(name)
    if domain.isActive():
        domain.destroy()
    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
