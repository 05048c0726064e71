# Copyright: vmkeeper.libvirt contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demonstration behind ``make demo``: the main job on a real guest, and the proof that it was done right.

Runs inside a private test host (``tests/lab/enter``). Ends with a non-zero status when a proof fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import libvirt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from lab import evidence, probe  # noqa: E402
from lab.guest import DiskSpec, Guest, GuestSpec, digest  # noqa: E402
from lab.host import TestHost  # noqa: E402

#: Inside the private host, where QEMU's user can reach it.
REPOSITORY = Path("/var/lib/libvirt/demo-repository")

_COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _paint(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if _COLOUR else text


def title(text: str) -> None:
    """A new chapter."""
    print(f"\n{_paint('1', text)}", flush=True)


def say(what: str, value: object) -> None:
    """One measured or observed fact."""
    print(f"    {what:<46} {value}", flush=True)


class ProofFailedError(Exception):
    """What was to be shown is not so."""


def prove(what: str, holds: bool, value: object) -> None:
    """One claim that must hold."""
    mark = _paint("32", "yes") if holds else _paint("31", "NO")
    print(f"    {what:<46} {mark}  {value}", flush=True)
    if not holds:
        raise ProofFailedError(what)


def playbook(name: str, guest: Guest, results: Path) -> dict:
    """Run one of the demonstration's playbooks with the real ``ansible-playbook``; returns what its modules said."""
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "--inventory",
        "hypervisor,",
        "--connection",
        "local",
        "--extra-vars",
        json.dumps(
            {
                "ansible_python_interpreter": "/usr/bin/python3",
                "demo_domain": guest.name,
                "demo_repository": str(REPOSITORY),
                "demo_results": str(results),
            }
        ),
        str(HERE / name),
    ]
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".ansible/collections"), "ANSIBLE_NOCOWS": "1"}
    print(f"    $ ansible-playbook {name}", flush=True)
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ProofFailedError(f"{name} failed:\n{ran.stdout}\n{ran.stderr}")
    return json.loads(results.read_text())


def show_snapshot(snapshot: dict) -> None:
    """What the module said of the snapshot."""
    say("consistency", snapshot["consistency"])
    say("the guest was frozen for", f"{snapshot['frozen_ms']} ms")
    for disk in snapshot["disks"]:
        say(f"{disk['target']} as it was", Path(disk["base"]).name)
        say(f"{disk['target']} from now on", Path(disk["overlay"]).name)


def prove_one_instant(guest: Guest, snapshot: dict) -> None:
    """The snapshot's layers are clean filesystems whose writers stopped at the same instant."""
    last = {}
    for disk in snapshot["disks"]:
        base = Path(disk["base"])
        fsck = evidence.fsck(base)
        prove(f"{disk['target']}: e2fsck -fn finds nothing to mend", fsck.clean, "")
        prove(f"{disk['target']}: no journal to replay", not fsck.needs_recovery, "")
        log = evidence.writer_log(base)
        prove(f"{disk['target']}: every record is whole", log.is_intact, f"{len(log.records)} records")
        last[disk["target"]] = log.last.tick
    apart = max(last.values()) - min(last.values())
    prove("both disks end at the same instant", apart <= 2, f"{apart} writes of 20 ms apart")


def prove_still_writing(guest: Guest) -> None:
    """The guest goes on as if nothing had happened."""
    before = {disk.target: guest.gaps(disk.target).count for disk in guest.spec.disks}
    time.sleep(1)
    for target, count in before.items():
        now = guest.gaps(target)
        prove(f"{target}: the guest keeps writing", now.count > count, f"longest gap {now.longest_ms:.0f} ms")


def show_chain(info: dict, domain: str) -> None:
    """The chains as a tree of files."""
    for target, layers in info["chains"][domain].items():
        for depth, layer in enumerate(layers):
            after = f"after {layer['after_snapshot']}" if layer["after_snapshot"] else "base"
            arrow = "  " * depth + ("└ " if depth else "")
            say(
                f"{target if not depth else '':<4} {arrow}{Path(layer['path']).name}",
                f"{after}, {layer['allocated'] >> 10} KiB",
            )


def back_up(guest: Guest, results: Path) -> dict:
    """One restore point of the guest, shown."""
    point = playbook("backup.yml", guest, results)["restore_point"]
    say("type", f"{point['type']}: {point['reason']}")
    say("consistency", f"{point['consistency']}, frozen for {point['frozen_ms']} ms")
    say("stored", f"{point['stored_bytes'] >> 10} KiB")
    return point


def prove_restored(guest: Guest, point: dict, digest: str) -> None:
    """The restored disks are those of the point, and the guest finds its file in them."""
    for disk in point["disks"]:
        stored = REPOSITORY / point["domain_uuid"] / point["id"] / disk["file"]
        same = evidence.same_content(guest.images[disk["target"]], stored)
        prove(f"{disk['target']}: qemu-img compare finds no difference", same, "")
    guest.start()
    prove("the guest reads its file as it wrote it", guest.sha256("/disk/vda/precious") == digest, digest[:16])
    for disk in guest.spec.disks:
        log = guest.writer_log(disk.target)
        prove(f"{disk.target}: every record is whole", log.is_intact, f"{len(log.records)} records")


def main() -> int:
    """Tell the story; 0 when every proof held."""
    began = time.monotonic()
    host = TestHost()
    host.start()
    connection = host.connect()
    title("A private hypervisor")
    say("libvirt", ".".join(str(connection.getLibVersion() // 1000**n % 1000) for n in (2, 1, 0)))
    say("QEMU", ".".join(str(connection.getVersion() // 1000**n % 1000) for n in (2, 1, 0)))
    acceleration = probe.acceleration()
    say(
        "acceleration",
        "KVM (a probe guest booted with it)"
        if acceleration == "kvm"
        else "emulation (a probe guest does not boot with KVM here)",
    )
    guest = Guest(host, GuestSpec("demo", disks=(DiskSpec("vda"), DiskSpec("vdb"))))
    try:
        with tempfile.TemporaryDirectory(prefix="vmkeeper-demo-") as scratch:
            _story(guest, Path(scratch))
    except ProofFailedError as failure:
        print(f"\n{_paint('31', 'The demonstration failed:')} {failure}", file=sys.stderr)
        return 1
    finally:
        guest.cleanup()
        shutil.rmtree(REPOSITORY, ignore_errors=True)
    left = [domain.name() for domain in host.connect().listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT)]
    title(f"Done in {time.monotonic() - began:.0f} s; everything that was made is removed ({len(left)} domains left)")
    return 0


def _timed(what: str, work: Callable[[], object]) -> None:
    began = time.monotonic()
    work()
    say(what, f"{time.monotonic() - began:.1f} s")


def _story(guest: Guest, scratch: Path) -> None:
    title("A guest with two disks, each written 50 times a second by a process of its own")
    guest.define()
    _timed("from power-on to its agent answering", guest.start)
    precious = os.urandom(100_000)
    for disk in guest.spec.disks:
        guest.write_file(f"/disk/{disk.target}/precious", precious)
    precious_sum = digest(precious)

    title("A consistent snapshot: freeze, cut and thaw in one module call")
    said = playbook("snapshot.yml", guest, scratch / "snapshot.json")
    snapshot = said["taken"]["snapshot"]
    show_snapshot(snapshot)
    prove("run again, it changes nothing", not said["again"]["changed"], "changed: false")

    title("The chain now")
    show_chain(said["info"], guest.name)

    title("The proof, by e2fsck and by what the guest wrote")
    prove_one_instant(guest, snapshot)
    prove_still_writing(guest)
    _way_back(guest, scratch, precious_sum)
    _backup_story(guest, scratch)


def _way_back(guest: Guest, scratch: Path, precious: str) -> None:
    title("An upgrade goes wrong: everything on vda is deleted, vdb's file is overwritten")
    guest.stop_writers()
    guest.exec("rm -rf /disk/vda/*; echo rubbish > /disk/vdb/precious; sync")
    say("vda holds now", guest.exec("ls /disk/vda | wc -l").text + " files")

    title("Back to the snapshot, and the wreck is kept as a branch")
    said = playbook("revert.yml", guest, scratch / "revert.json")
    _timed("until the guest is up again", guest.wait_ready)
    show_tree(said["info"])
    for disk in guest.spec.disks:
        found = guest.sha256(f"/disk/{disk.target}/precious")
        prove(f"{disk.target}: the file is what it was", found == precious, found[:16])
        prove(f"{disk.target}: every record is whole", guest.writer_log(disk.target).is_intact, "")

    title("The branch removed, the chains flat, the guest running all the time")
    said = playbook("flatten.yml", guest, scratch / "flatten.json")
    show_chain(said["info"], guest.name)
    for target, layers in said["info"]["chains"][guest.name].items():
        prove(f"{target}: one layer", len(layers) == 1, Path(layers[0]["path"]).name)
    prove("no other file is left", len(list(guest.directory.iterdir())) == len(guest.spec.disks), "")
    for disk in guest.spec.disks:
        prove(f"{disk.target}: the file is what it was", guest.sha256(f"/disk/{disk.target}/precious") == precious, "")
    prove_still_writing(guest)


def show_tree(info: dict) -> None:
    """The snapshots as a tree."""
    for snapshot in info["snapshots"]:
        mark = "  <- the present descends from it" if snapshot["current"] else ""
        say("  " * snapshot["depth"] + snapshot["name"], f"{snapshot['consistency']}{mark}")


def _backup_story(guest: Guest, scratch: Path) -> None:
    REPOSITORY.mkdir()
    title("A full backup")
    back_up(guest, scratch / "full.json")

    title("8 MiB are written; then an increment")
    guest.exec("dd if=/dev/urandom of=/disk/vda/precious bs=1M count=8 2>/dev/null; sync")
    written = guest.sha256("/disk/vda/precious")
    point = back_up(guest, scratch / "increment.json")
    prove("it is an increment of both disks", [disk["type"] for disk in point["disks"]] == ["incremental"] * 2, "")

    title("The guest's disks are destroyed")
    guest.destroy()
    guest.images.update(guest.active_paths())
    for path in guest.images.values():
        path.write_bytes(b"destroyed")
        say("destroyed", path.name)

    title("The point is proved, and restored in place")
    playbook("restore.yml", guest, scratch / "restored.json")
    prove_restored(guest, point, written)


if __name__ == "__main__":
    raise SystemExit(main())
