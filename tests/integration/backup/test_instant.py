# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""``restore mode: instant``: runs at once, loses nothing whatever happens, and leaves the repository as it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import evidence
from lab.ansible import run_module_process
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.host import TestHost
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import host_graph
from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import directory_of, ok, point, task
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.test_interrupted import steps_of

VIEWS = Path("/var/lib/libvirt/vmkeeper/views")
BLOCK = 65536


class Lent:
    """A repository with a chain of two points, and what its files were when nobody had touched them."""

    def __init__(self, repository: Path, made: dict[str, Any]) -> None:
        self.repository = repository
        self.id = made["id"]
        self.directory = directory_of(repository, made)
        self.vdb = points.content(self.directory / "vdb.qcow2")
        self.facts = self.read()

    def read(self) -> dict[str, Any]:
        """Owner, mode, extended attributes, times and content of every file."""
        found = {}
        for path in sorted(self.repository.rglob("*")):
            status = path.stat()
            xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            facts = (status.st_uid, status.st_gid, status.st_mode, status.st_mtime_ns, status.st_ctime_ns, xattrs)
            found[str(path.relative_to(self.repository))] = (facts, points.sha256(path) if path.is_file() else "")
        return found

    def assert_untouched(self) -> None:
        """Nothing in the repository has changed."""
        now = self.read()
        assert now.keys() == self.facts.keys()
        assert [name for name in now if now[name] != self.facts[name]] == []


@pytest.fixture(scope="module")
def lent(module_guest_factory, make_repository) -> Lent:
    origin = module_guest_factory(
        GuestSpec(
            "lender", disks=(DiskSpec("vda", size=48 * MIB), DiskSpec("vdb", size=36 * MIB, fs=None, writer=False))
        )
    )
    repository = make_repository()
    points.fill(origin, "vdb", "first", 0, 400)
    point(origin, repository)
    points.fill(origin, "vdb", "second", 300, 200)
    made = point(origin, repository)
    assert made["type"] == "incremental"
    origin.destroy()
    return Lent(repository, made)


@pytest.fixture
def restored(host: TestHost) -> Iterator[Guest]:
    """The domain that a test restores; gone after it."""
    guest = Guest(
        host, GuestSpec("lent", disks=(DiskSpec("vda"), DiskSpec("vdb", fs=None, writer=False)), extra_cmdline="")
    )
    yield guest
    guest.cleanup()
    for view in [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]:
        if view.startswith(str(VIEWS)):
            subprocess.run(["umount", "-l", view], check=False)
    for path in VIEWS.glob("*"):
        path.unlink() if path.is_symlink() else path.rmdir()
    for path in points.JOURNALS.glob("*"):
        path.unlink()


def arguments(lent: Lent, directory: Path, **more: Any) -> dict[str, Any]:
    """The task."""
    return {
        "repository": str(lent.repository),
        "id": lent.id,
        "domain": "lab-lent",
        "directory": str(directory),
        "mode": "instant",
        **more,
    }


def assert_independent(lent: Lent, restored: Guest, directory: Path) -> None:
    """The domain names nothing of the repository, nothing is left on the host, and the repository is as it was."""
    images = sorted(directory.iterdir())
    assert [path.name for path in images] == ["lab-lent.vda.qcow2", "lab-lent.vdb.qcow2"]
    for path in images:
        info = json.loads(points.run("qemu-img", "info", "-U", "--output=json", path))
        assert "backing-filename" not in info
    for text in (restored.xml_text(), restored.xml_text(inactive=True)):
        assert str(lent.repository) not in text
        assert str(VIEWS) not in text
    assert list(VIEWS.glob("*")) == []
    assert str(VIEWS) not in Path("/proc/self/mountinfo").read_text()
    assert list(points.JOURNALS.glob("*")) == []
    lent.assert_untouched()


def readers(restored: Guest, path: Path) -> set[str]:
    """Whom the host graph, which everything asks that changes a layer, knows to read an image."""
    return {str(one) for one in host_graph.read_graph(restored.connection()).readers(str(path))}


def expected_vdb(lent: Lent, tmp_path: Path, writes: list[tuple[str, int, int]]) -> str:
    """SHA-256 of the point's vdb with the guest's own writes over it."""
    raw = evidence.flatten(lent.directory / "vdb.qcow2", tmp_path / "expected.raw")
    with raw.open("r+b") as stream:
        for mark, offset, blocks in writes:
            stream.seek(offset * BLOCK)
            stream.write(points.pattern(mark, blocks))
    return points.sha256(raw)


def write(guest: Guest, mark: str, offset: int, blocks: int) -> None:
    """Write to vdb, and flush: what was not flushed is nobody's promise."""
    points.fill(guest, "vdb", mark, offset, blocks)
    guest.exec(["/bin/sync", guest.exec("cat /run/disk/vdb").text])


def test_the_guest_answers_at_once_and_what_it_writes_meanwhile_is_kept(
    lent: Lent, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    answered = ok("restore", **arguments(lent, directory, wait=False, bandwidth="256K"))
    assert answered["job"]["state"] == "pending"
    shown = ok("domain_job", domain="lab-lent")
    assert shown["job"]["operation"] == "instant-restore"
    restored.wait_ready()
    assert points.device_hash(restored, "vdb") == lent.vdb
    write(restored, "mine", 290, 20)
    shown = ok("domain_job", domain="lab-lent")
    assert shown["job"]["state"] == "running", shown
    assert {job["type"] for job in shown["block_jobs"]} == {"pull"}
    assert all(0 <= job["done"] <= job["total"] for job in shown["block_jobs"]), shown["block_jobs"]
    (size,) = {job["total"] for job in shown["block_jobs"]}
    assert size in (48 * MIB, 36 * MIB), "one disk after the other, each as large as it is"
    lent.assert_untouched()
    for point_directory in lent.directory.parent.iterdir():
        assert "domain 'lab-lent'" in readers(restored, point_directory / "vdb.qcow2")
    refused = task("backup", domain="lab-lender", repository=str(lent.repository), state="absent", id=lent.id)
    assert refused["failed"]
    assert "lab-lent'" in refused["msg"], refused["msg"]
    lent.assert_untouched()
    busy = task("snapshot", domain="lab-lent", name="s", check=True)
    assert not busy["failed"] or busy["error"]["kind"] in ("busy", "unfinished"), busy["msg"]
    joined = run_module_process("restore", **arguments(lent, directory, wait=True, bandwidth="256K"))
    until(
        lambda: bool(ok("domain_job", domain="lab-lent", bandwidth="0")["block_jobs"]) or not joined.running(), "a pull"
    )
    while joined.running():
        ok("domain_job", domain="lab-lent", bandwidth="0")
    assert not joined.result()["failed"], joined.result()["msg"]
    ok("domain_job", domain="lab-lent", state="finished")
    assert_independent(lent, restored, directory)
    assert points.device_hash(restored, "vdb") == expected_vdb(lent, tmp_path, [("mine", 290, 20)])
    assert restored.writer_errors("vda") == []
    assert restored.writer_log("vda").is_intact
    restored.shutdown()
    assert points.content(directory / "lab-lent.vdb.qcow2") == expected_vdb(lent, tmp_path, [("mine", 290, 20)])
    assert evidence.fsck(directory / "lab-lent.vda.qcow2").clean


@pytest.mark.timeout(1200)
def test_killed_at_every_step_the_next_run_finishes_it(
    lent: Lent, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    listed = run_module_process("restore", env=points.killed_at("", log), **arguments(lent, directory)).result()
    assert not listed["failed"], listed["msg"]
    assert_independent(lent, restored, directory)
    steps = steps_of(log)
    assert {"lend", "overlay", "place", "define", "start", "running", "pull", "detach", "release"} <= set(steps), steps
    for number, step in enumerate(steps):
        points.forget_domain(restored, "lab-lent")
        for path in directory.iterdir():
            path.unlink()
        log.unlink()
        killed = run_module_process("restore", env=points.killed_at(step, log), **arguments(lent, directory))
        assert killed.wait() == -signal.SIGKILL, step
        exists = "lab-lent" in [one.name() for one in restored.connection().listAllDomains()]
        if exists and number % 2:
            found = ok("recover_domain", domain="lab-lent")
            assert [one["what"] for one in found["findings"]] == [f"an interrupted instant restore of {lent.id}"], step
            if found["findings"][0]["action"] == "undone":
                assert list(directory.iterdir()) == []
                ok("restore", **arguments(lent, directory))
        else:
            ok("restore", **arguments(lent, directory))
        assert restored.is_running(), step
        assert_independent(lent, restored, directory)
        restored.destroy()
        assert points.content(directory / "lab-lent.vdb.qcow2") == lent.vdb, step


def test_libvirtd_and_qemu_and_the_host_go_away_and_nothing_is_lost(
    host: TestHost, lent: Lent, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    slowly = arguments(lent, directory, wait=False, bandwidth="512K")
    ok("restore", **slowly)
    restored.wait_ready()
    write(restored, "before", 100, 10)
    host.kill_libvirtd()
    host.start()
    assert points.device_hash(restored, "vdb") == expected_vdb(lent, tmp_path, [("before", 100, 10)])
    assert ok("domain_job", domain="lab-lent")["job"]["state"] == "running"

    os.kill(host.qemu_pids()["lab-lent"], signal.SIGKILL)
    restored.wait_shutoff()
    failed = task("domain_job", domain="lab-lent", state="finished")
    assert failed["failed"]
    assert "safe in its own images" in failed["msg"], failed["msg"]
    assert "domain 'lab-lent'" in readers(restored, lent.directory / "vdb.qcow2")
    ok("restore", **slowly)
    restored.wait_ready()
    write(restored, "after", 200, 10)
    writes = [("before", 100, 10), ("after", 200, 10)]
    assert points.device_hash(restored, "vdb") == expected_vdb(lent, tmp_path, writes)

    host.power_cut()
    unmount_views()
    away = lent.repository.with_name("away")
    lent.repository.rename(away)
    host.start()
    refused = task("restore", **slowly)
    assert refused["failed"]
    for module in ("recover_domain", "backup"):
        also = {"repository": str(directory / "other")} if module == "backup" else {}
        (directory / "other").mkdir(exist_ok=True)
        refused = task(module, domain="lab-lent", **also)
        assert refused["failed"]
        assert "is not there" in refused["msg"], refused["msg"]
        assert "Mount the repository" in refused["msg"], refused["msg"]
    away.rename(lent.repository)
    shutil.rmtree(directory / "other")
    assert "domain 'lab-lent'" in readers(restored, lent.directory / "vdb.qcow2"), "also while the view is not there"
    ok("restore", **slowly)
    restored.wait_ready()
    assert points.device_hash(restored, "vdb") == expected_vdb(lent, tmp_path, writes)
    # A guest that is shut down meanwhile is made independent as it lies.
    restored.shutdown()
    ok("domain_job", domain="lab-lent", state="finished")
    assert_independent(lent, restored, directory)
    assert points.content(directory / "lab-lent.vdb.qcow2") == expected_vdb(lent, tmp_path, writes)
    assert evidence.fsck(directory / "lab-lent.vda.qcow2").clean


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "victim",
    [
        "libvirtd",
        pytest.param("QEMU", marks=pytest.mark.skipif(points.SCALE == 1, reason="runs in make test-long")),
    ],
)
def test_libvirtd_or_qemu_killed_at_a_step_the_next_run_finishes_it(
    host: TestHost, lent: Lent, restored: Guest, directory: Path, tmp_path: Path, victim: str
) -> None:
    log = tmp_path / "steps"
    steps = ["define"] if victim == "libvirtd" else ["pull"]
    if points.SCALE > 1:
        listed = run_module_process("restore", env=points.killed_at("", log), **arguments(lent, directory)).result()
        assert not listed["failed"], listed["msg"]
        seen = steps_of(log)
        steps = seen if victim == "libvirtd" else seen[seen.index("running") :]
    for step in steps:
        if list(directory.iterdir()):
            points.forget_domain(restored, "lab-lent")
        for path in directory.iterdir():
            path.unlink()
        log.unlink(missing_ok=True)
        environment = points.killed_at(step, log, how="stop")
        held = run_module_process("restore", env=environment, **arguments(lent, directory))
        until(lambda: log.exists() and "!" in log.read_text(), f"the restore reaching {step}")
        if victim == "libvirtd":
            host.kill_libvirtd()
        else:
            os.kill(host.qemu_pids()["lab-lent"], signal.SIGKILL)
            restored.wait_shutoff()
        os.kill(held.pid, signal.SIGCONT)
        if victim == "libvirtd":
            host.start()
        held.wait()
        again = task("restore", **arguments(lent, directory))
        # The run itself may have come to its end before it needed what was killed.
        assert not again["failed"] or "There is a domain" in again["msg"], (step, again["msg"])
        assert_independent(lent, restored, directory)
        if restored.is_running():
            restored.destroy()
        assert points.content(directory / "lab-lent.vdb.qcow2") == lent.vdb, step


def killed_when_defined(lent: Lent, directory: Path, tmp_path: Path) -> None:
    """Leave what a kill leaves between the definition of the domain and its start."""
    killed = run_module_process(
        "restore", env=points.killed_at("start", tmp_path / "steps"), **arguments(lent, directory)
    )
    assert killed.wait() == -signal.SIGKILL
    journal = next(path for path in points.JOURNALS.glob("*") if not path.is_symlink())
    operation = json.loads(journal.read_text())
    assert operation["steps"].pop()["name"] == "start"  # a step is named before anything of it is done
    journal.write_text(json.dumps(operation))


def test_a_guest_that_was_started_by_hand_after_a_kill_is_kept(
    host: TestHost, lent: Lent, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    killed_when_defined(lent, directory, tmp_path)
    restored.domain().create()
    process = host.qemu_pids()["lab-lent"]
    ok("restore", **arguments(lent, directory))
    assert host.qemu_pids()["lab-lent"] == process
    assert_independent(lent, restored, directory)

    points.forget_domain(restored, "lab-lent")
    for path in (*directory.iterdir(), tmp_path / "steps"):
        path.unlink()
    killed_when_defined(lent, directory, tmp_path)
    restored.start()
    write(restored, "mine", 10, 10)
    restored.destroy()
    found = ok("recover_domain", domain="lab-lent")["findings"]
    assert [one["action"] for one in found] == ["finished"], found
    assert_independent(lent, restored, directory)
    assert points.content(directory / "lab-lent.vdb.qcow2") == expected_vdb(lent, tmp_path, [("mine", 10, 10)])


@pytest.mark.skipif(points.SCALE == 1, reason="runs in make test-long")
def test_killed_while_a_stopped_guest_is_made_whole_nothing_writes_on_and_the_next_run_finishes_it(
    lent: Lent, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    held = run_module_process(
        "restore", env=points.killed_at("flatten", tmp_path / "steps"), **arguments(lent, directory, bandwidth="256K")
    )
    until(lambda: list(directory.glob("*.qcow2")) and restored.is_running(), "the guest")
    restored.wait_ready()
    write(restored, "mine", 10, 10)
    restored.shutdown()
    assert held.wait() == -signal.SIGKILL
    recovering = run_module_process("recover_domain", domain="lab-lent")
    children = Path(f"/proc/{recovering.pid}/task/{recovering.pid}/children")

    def copying() -> int | None:
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                if b"\0rebase\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGSTOP)
                    return int(pid)
        return None

    program = until(copying, "qemu-img", interval=0.001)
    os.kill(recovering.pid, signal.SIGKILL)
    recovering.wait()
    until(
        lambda: not Path(f"/proc/{program}/cmdline").exists() or not Path(f"/proc/{program}/cmdline").read_bytes(),
        "its end",
    )
    assert [one["action"] for one in ok("recover_domain", domain="lab-lent")["findings"]] == ["finished"]
    assert_independent(lent, restored, directory)
    assert points.content(directory / "lab-lent.vdb.qcow2") == expected_vdb(lent, tmp_path, [("mine", 10, 10)])


def unmount_views() -> None:
    """What a reboot does, and a power cut of the lab does not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[4].startswith(str(VIEWS)):
            subprocess.run(["umount", "-l", line.split()[4]], check=True)


def test_what_it_cannot_do_is_refused_before_anything_is_changed(
    lent: Lent, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    before = evidence.host_state(restored.connection(), [directory])
    for more, said in (
        ({"state": "defined"}, "starts the domain"),
        ({"in_place": True, "confirm": "lab-lender", "directory": None}, "new domain"),
        ({"domain": "lab-lender"}, "exists already"),
    ):
        call = {key: value for key, value in {**arguments(lent, directory), **more}.items() if value is not None}
        refused = task("restore", **call)
        assert refused["failed"], more
        assert said in refused["msg"] or "There is a domain" in refused["msg"], refused["msg"]
    foreseen = task("restore", check=True, **arguments(lent, directory))
    assert not foreseen["failed"], foreseen["msg"]
    assert foreseen["changed"]
    assert before.differences(evidence.host_state(restored.connection(), [directory])) == []
    assert not VIEWS.exists() or list(VIEWS.glob("*")) == []
    lent.assert_untouched()


@contextlib.contextmanager
def without_kernel(point_directory: Path) -> Iterator[None]:
    """The guest of a point can be defined and not started."""
    definition = (point_directory / "domain.xml").read_text()
    kernel = Path(definition.split("<kernel>")[1].split("<")[0])
    hidden = kernel.with_name("hidden")
    kernel.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(kernel)


def test_a_restore_whose_domain_is_gone_is_never_called_done(
    lent: Lent, restored: Guest, directory: Path, tmp_path: Path
) -> None:
    images = [directory / f"lab-lent.{target}.qcow2" for target in ("vda", "vdb")]
    log = tmp_path / "steps"
    killed = run_module_process("restore", env=points.killed_at("pull", log), **arguments(lent, directory))
    assert killed.wait() == -signal.SIGKILL
    restored.wait_ready()
    write(restored, "mine", 10, 10)
    restored.destroy()
    restored.domain().undefine()
    written = {path: points.sha256(path) for path in images}
    failed = task("restore", **arguments(lent, directory))
    assert failed["failed"]
    assert failed["error"]["left"] == [str(path) for path in images], failed["msg"]
    assert {path: points.sha256(path) for path in images} == written
    assert list(points.JOURNALS.glob("*")) == []
    assert list(VIEWS.glob("*")) == []

    for path in images:
        path.unlink()
    log.unlink()
    with without_kernel(lent.directory):
        killed = run_module_process("restore", env=points.killed_at("undo", log), **arguments(lent, directory))
        assert killed.wait() == -signal.SIGKILL
    # It had come so far.
    restored.domain().undefine()
    images[0].unlink()
    ok("restore", **arguments(lent, directory))
    assert restored.is_running()
    assert_independent(lent, restored, directory)


def test_a_start_that_fails_takes_everything_back(lent: Lent, restored: Guest, directory: Path, tmp_path: Path) -> None:
    definition = lent.directory / "domain.xml"
    manifest = lent.directory / "manifest.json"
    kept = {path: (path.read_bytes(), path.stat()) for path in (definition, manifest)}
    with without_kernel(lent.directory):
        failed = task("restore", **arguments(lent, directory))
    assert failed["failed"]
    assert "Starting the restored domain" in failed["msg"], failed["msg"]
    assert list(directory.iterdir()) == []
    assert "lab-lent" not in [one.name() for one in restored.connection().listAllDomains()]
    assert list(VIEWS.glob("*")) == []
    assert list(points.JOURNALS.glob("*")) == []
    assert all(path.read_bytes() == kept[path][0] for path in kept)
    with contextlib.suppress(FileNotFoundError):
        lent.assert_untouched()
