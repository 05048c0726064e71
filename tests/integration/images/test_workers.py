# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Exports and imports that a worker does: seen, waited for, cancelled, killed; and what they keep to themselves."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence, secrecy
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.images import run
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import DiskSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

from . import tasks

KEY = "nineteen-Quiet-herons-28"
IMAGES = Path("/var/lib/libvirt/images")
JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")
WORKERS = Path("/var/lib/vmkeeper.libvirt/workers")

#: So much that a worker is still at it when somebody has seen what it is doing.
SIZE = 256 << 20

#: So much that a limit takes hold before all of it is copied, however fast the host's disks are.
LARGE = 768 << 20


@pytest.fixture(scope="module")
def heavy(host: TestHost) -> Iterator[Guest]:
    """A guest that runs, with disks that nobody writes and that do not compress."""
    sizes = {"vdb": SIZE, "vdc": LARGE}
    still = (DiskSpec(target, size=size, format="raw", fs=None, writer=False) for target, size in sizes.items())
    guest = Guest(host, GuestSpec("heavy", disks=(DiskSpec("vda", size=16 << 20), *still)))
    try:
        guest.define()
        for target, size in sizes.items():
            guest.images[target].write_bytes(os.urandom(size))
        yield guest.start()
    finally:
        guest.cleanup()


def steps_now() -> list[str]:
    """The steps of the one operation that is unfinished; none when there is none."""
    for path in JOURNAL.glob("*.json"):
        try:
            return [step["name"] for step in json.loads(path.read_text())["steps"]]
        except (OSError, ValueError):
            continue
    return []


def process_of(answer: tasks.Outcome) -> int:
    """The process of the worker that a task has started."""
    return int(json.loads((WORKERS / answer["job"]["id"] / "state.json").read_text())["process"][0])


def job_of(name: str, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = tasks.ok("domain_job", domain=name, **options)["job"]
    return found


def cancel_at(step: str, answer: tasks.Outcome, name: str) -> None:
    """Cancel the worker when it has recorded the step; it is held meanwhile, so that it gets no further."""
    pid = process_of(answer)
    until(lambda: step in steps_now(), f"the worker reaching {step}", interval=0.002)
    os.kill(pid, signal.SIGSTOP)
    assert tasks.ok("domain_job", check=True, domain=name, state="absent").changed
    assert job_of(name)["state"] == "running"
    cancelling = tasks.start("domain_job", domain=name, state="absent")

    def is_told() -> bool:
        pending = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Pnd:" in line]
        return any(int(mask, 16) & 1 << (signal.SIGTERM - 1) for mask in pending)

    until(is_told, "the worker being told to end")
    os.kill(pid, signal.SIGCONT)
    result = tasks.finish(cancelling)
    assert (result.rc, result.changed) == (0, True), result
    assert job_of(name)["state"] == "cancelled"
    assert not tasks.ok("domain_job", domain=name, state="absent").changed


def assert_nothing_lies_around(library: Path) -> None:
    assert [path.name for path in library.iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in IMAGES.iterdir() if path.name.startswith(".")] == []
    assert not list(JOURNAL.iterdir())


def test_an_export_goes_on_without_its_task_and_the_same_task_is_about_it(heavy: Guest, library: Path) -> None:
    options = {"domain": heavy.name, "dest": str(library), "name": "one", "disks": ["vdb"], "compression": "zlib"}
    tasks.refused("export_image", "not a safe name", wait=False, **{**options, "name": "../one"})
    assert not WORKERS.exists() or not list(WORKERS.iterdir()), "what can be refused is refused now"
    late = tasks.refused("export_image", "not over after", wait_timeout="1s", **options)
    assert late["error"]["kind"] == "timeout"
    assert late["job"]["state"] == "running"
    again = tasks.ok("export_image", wait=False, **options)
    assert (again["job"]["id"], again["job"]["state"]) == (late["job"]["id"], "pending")
    done = job_of(heavy.name, state="finished", wait_timeout="10m")
    assert (done["operation"], done["state"]) == ("export_image", "finished")
    image = done["result"]["image"]
    run(
        "qemu-img",
        "compare",
        "-q",
        "-U",
        "-f",
        "raw",
        "-F",
        "qcow2",
        heavy.images["vdb"],
        library / "one" / "vdb.qcow2",
    )
    assert_nothing_lies_around(library)
    assert heavy.frozen_filesystems() == []
    # A task that comes back after its worker has finished finds what that made.
    for waiting in ({}, {"wait": False}, {"wait_timeout": "1m"}):
        found = tasks.ok("export_image", **options, **waiting)
        assert (found.changed, found["image"]["digest"]) == (False, image["digest"])


def test_a_limited_export_keeps_to_its_limit_until_that_is_lifted(heavy: Guest, library: Path) -> None:
    tasks.refused("export_image", "bandwidth", domain=heavy.name, dest=str(library), name="slow", bandwidth="fast")
    options = {"domain": heavy.name, "dest": str(library), "name": "slow", "disks": ["vdc"]}
    tasks.ok("export_image", wait=False, bandwidth="1M", **options)

    def copies() -> list[dict[str, Any]]:
        return list(tasks.ok("domain_job", domain=heavy.name)["block_jobs"])

    until(lambda: [job["bandwidth"] for job in copies()] == [1 << 20], "the limit")
    (job,) = copies()
    assert job["done"] < LARGE
    assert tasks.ok("domain_job", domain=heavy.name, bandwidth="0").changed
    image = job_of(heavy.name, state="finished", wait_timeout="5m")["result"]["image"]
    run(
        "qemu-img", "compare", "-q", "-U", "-f", "raw", "-F", "qcow2", heavy.images["vdc"], f"{image['path']}/vdc.qcow2"
    )
    assert_nothing_lies_around(library)


def test_a_limit_holds_for_the_copy_of_a_stopped_domain_too(host: TestHost, library: Path) -> None:
    guest = Guest(host, GuestSpec("limited", disks=(DiskSpec("vda", size=SIZE, format="raw", fs=None, writer=False),)))
    seconds = []
    try:
        guest.define()
        guest.images["vda"].write_bytes(os.urandom(SIZE))
        for name, limit in (("limited", {"bandwidth": str(SIZE // 8)}), ("free", {})):
            began = time.monotonic()
            tasks.ok("export_image", name=name, domain=guest.name, dest=str(library), **limit)
            seconds.append(time.monotonic() - began)
    finally:
        guest.cleanup()
    assert seconds[0] > seconds[1] + 2, "eight seconds' worth at that limit"


def test_a_cancelled_export_leaves_nothing(heavy: Guest, library: Path) -> None:
    definition = heavy.xml_text()
    options = {"domain": heavy.name, "dest": str(library), "name": "one", "disks": ["vdb"], "compression": "zlib"}
    for step in ("copy", "write"):
        cancel_at(step, tasks.ok("export_image", wait=False, **options), heavy.name)
        assert list(library.iterdir()) == [], step
        assert_nothing_lies_around(library)
        assert heavy.frozen_filesystems() == [], step
        with pytest.raises(libvirt.libvirtError):
            heavy.domain().backupGetXMLDesc(0)
    assert heavy.is_running()
    assert heavy.xml_text() == definition


def test_an_export_whose_worker_is_killed_is_done_by_the_same_task(heavy: Guest, library: Path) -> None:
    options = {"domain": heavy.name, "dest": str(library), "name": "one", "disks": ["vdb"], "compression": "zlib"}
    begun = tasks.ok("export_image", wait=False, **options)
    until(lambda: "copy" in steps_now(), "the copy", interval=0.002)
    os.kill(process_of(begun), signal.SIGKILL)
    until(lambda: job_of(heavy.name)["state"] == "interrupted", "its death being seen")
    tasks.refused("domain_job", "Run its task again", domain=heavy.name, state="finished")
    tasks.ok("export_image", wait=False, **options)
    image = job_of(heavy.name, state="finished")["result"]["image"]
    assert [path.name for path in library.iterdir()] == ["one"]
    assert Path(image["path"]) == library / "one"
    assert_nothing_lies_around(library)


def test_an_import_by_a_worker_is_found_by_its_name_before_and_after_its_domain_is_there(
    heavy: Guest, host: TestHost, library: Path, launched: list[str]
) -> None:
    tasks.ok("export_image", domain=heavy.name, dest=str(library), name="one", disks=["vdb"], compression="zlib")
    options = {"src": str(library / "one"), "domain": "lab-late", "virt_type": "qemu"}
    launched.append("lab-late")
    connection = host.connect()
    tasks.refused("import_image", "no network", network="nowhere", wait=False, **options)
    tasks.refused("domain_job", "lab-late", domain="lab-late")
    for step in ("copy", "convert"):
        cancel_at(step, tasks.ok("import_image", wait=False, **options), "lab-late")
        assert list(IMAGES.glob("lab-late*")) == [], step
        assert_nothing_lies_around(library)

    begun = tasks.ok("import_image", wait=False, **options)
    until(lambda: "copy" in steps_now(), "the copy", interval=0.002)
    os.kill(process_of(begun), signal.SIGKILL)
    until(lambda: job_of("lab-late")["state"] == "interrupted", "its death being seen")
    assert "lab-late" not in [domain.name() for domain in connection.listAllDomains()]
    tasks.ok("import_image", wait=False, **options)
    new = job_of("lab-late", state="finished")["result"]["domain"]
    assert new["uuid"] == connection.lookupByName("lab-late").UUIDString()
    assert job_of("lab-late")["result"]["domain"] == new
    assert evidence.same_content(library / "one" / "vdb.qcow2", Path(new["disks"][0]["path"]))
    assert_nothing_lies_around(library)
    assert not tasks.ok("import_image", wait=False, **options).changed, "there is nothing to do"
    connection.close()


def test_a_worker_gets_its_passphrase_and_nothing_tells_it(still: Guest, library: Path, launched: list[str]) -> None:
    export = {"domain": still.name, "dest": str(library), "name": "closed", "disks": ["vdb"]}
    launch = {"src": str(library / "closed"), "domain": "lab-opened", "virt_type": "qemu"}
    launched.append("lab-opened")
    with secrecy.Watch(KEY, [], "/var/lib/vmkeeper.libvirt", "/run", library) as watch:
        tasks.ok("export_image", wait=False, encryption={"passphrase": KEY}, **export)
        job_of(still.name, state="finished")
        tasks.refused("import_image", "is encrypted", wait=False, **launch)
        tasks.ok("import_image", wait=False, passphrase=f"{KEY}x", **launch)
        tasks.refused("domain_job", "does not open it", domain="lab-opened", state="finished")
        tasks.ok("import_image", wait=False, passphrase=KEY, **launch)
        new = job_of("lab-opened", state="finished")["result"]["domain"]
    assert evidence.same_content(still.images["vdb"], Path(new["disks"][0]["path"]))
    assert {"qemu-img"} <= watch.programs
    assert watch.seen == set()
    assert secrecy.holding([KEY], *secrecy.PLACES, library) == []
    assert_nothing_lies_around(library)
