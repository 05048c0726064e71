# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sealing: what makes a machine this one is gone from the image, also from its free space, and still in the machine.

What is on the disks is read with debugfs and by looking for the bytes themselves, never by what the module says.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.lab import appliance
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.images import run
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import DiskSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until

from . import tasks
from .opened import KEY, content_of

EVERYTHING = ["machine-id", "ssh-hostkeys", "dhcp-leases", "logs", "histories", "cloud-init", "passwords"]
JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")
SIZE = 48 << 20
START = 1 << 20

#: Of each file, whether it is gone, empty or changed afterwards. A secret is in its content, long enough to fill its blocks.
FILES = {
    "etc/os-release": 'ID=debian\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\n',
    "etc/debian_version": "12.9\n",
    "etc/fstab": "LABEL=root / ext4 defaults 0 1\n",
    "etc/hostname": "web01\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1000::/home/bob:/bin/sh\n",
    "etc/shadow": "root:$6$SECRET-hash:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nbob:!$6$SECRET-hash:1::::::\n",
    "etc/shadow-": "root:$6$SECRET-hash:18000:0:99999:7:::\n",
    "etc/machine-id": "5ec2e75ec2e75ec2e75ec2e75ec2e75e\n",
    "etc/ssh/sshd_config": "PermitRootLogin no\n",
    "etc/ssh/ssh_host_ed25519_key": "SECRET-host-key\n" * 300,
    "etc/ssh/ssh_host_ed25519_key.pub": "SECRET-public-key\n",
    "var/log/syslog": "SECRET-log\n" * 3000,
    "var/log/postgresql/postgresql.log": "SECRET-query\n" * 500,
    "var/log/an odd\nname": "SECRET-name\n",
    "var/lib/dhcp/dhclient.eth0.leases": "SECRET-lease\n" * 100,
    "var/lib/cloud/instances/i-1/user-data.txt": "SECRET-user-data\n" * 100,
    "root/.bash_history": "SECRET-command\n" * 100,
    "home/bob/.psql_history": "SECRET-select\n" * 100,
    "home/bob/data": "KEPT-data\n" * 100,
}
DIRECTORIES = ("bin", "boot", "dev", "proc", "run", "sys", "tmp", "usr/bin", "var/lib/dpkg")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """What libguestfs needs here."""
    why = appliance.missing()
    if why:
        pytest.skip(f"sealing needs libguestfs: {why}")
    return appliance.environment()


def put_debian(guest: Guest, work: Path) -> None:
    """A small Debian on the partition of a defined guest's first disk."""
    tree = work / "tree"
    for name in DIRECTORIES:
        (tree / name).mkdir(parents=True)
    for name, content in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    filesystem = work / "fs"
    with filesystem.open("wb") as stream:
        stream.truncate(SIZE - 2 * START)
    run("mkfs.ext4", "-q", "-F", "-b", "1024", "-L", "root", "-d", tree, filesystem)
    disk = work / "disk"
    with disk.open("wb") as stream:
        stream.truncate(SIZE)
    run("sfdisk", "-q", disk, stdin="label: dos\nstart=1MiB, type=83, bootable\n")
    run("dd", f"if={filesystem}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, guest.images["vda"])


@pytest.fixture(scope="module")
def machine(host: TestHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A domain that was never started, with a small Debian on a partition of its disk and data on another disk."""
    guest = Guest(host, GuestSpec("template", disks=(DiskSpec("vda", size=SIZE), DiskSpec("vdb", size=16 << 20))))
    try:
        put_debian(guest.define(), tmp_path_factory.mktemp("debian"))
        yield guest
    finally:
        guest.cleanup()


@pytest.fixture(scope="module")
def at_work(host: TestHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest that runs and writes on the disk that has a small Debian on its partition."""
    guest = Guest(host, GuestSpec("at-work", disks=(DiskSpec("vda", size=SIZE, partitioned=True),)))
    try:
        put_debian(guest.define(), tmp_path_factory.mktemp("debian"))
        yield guest.start()
    finally:
        guest.cleanup()


def raw_of(image: Path, work: Path) -> Path:
    raw = work / "raw"
    run("qemu-img", "convert", "-O", "raw", image, raw)
    return raw


def debugfs(raw: Path, command: str) -> str:
    done = subprocess.run(
        ["debugfs", "-R", command, f"{raw}?offset={START}"], capture_output=True, text=True, check=True
    )
    return done.stdout


def names_in(raw: Path, directory: str) -> set[str]:
    lines = debugfs(raw, f"ls -p {directory}").splitlines()
    return {line.split("/")[5] for line in lines if line.count("/") > 5} - {".", ".."}


def assert_sealed(image: Path, work: Path) -> None:
    """Nothing of :data:`FILES` that is secret is in there, also not in free space, and what is not is."""
    assert_content_sealed(raw_of(image, work))


def assert_content_sealed(raw: Path) -> None:
    """The same of what an image holds, which is removed."""
    content = raw.read_bytes()
    assert b"SECRET" not in content, content[content.index(b"SECRET") - 20 :][:60]
    assert b"5ec2e75ec2e75e" not in content
    assert content.count(b"KEPT-data") == FILES["home/bob/data"].count("KEPT-data")
    assert debugfs(raw, "cat /etc/machine-id") == ""
    assert "machine-id" in names_in(raw, "/etc")
    assert names_in(raw, "/etc/ssh") == {"sshd_config"}
    assert names_in(raw, "/var/log") == {"postgresql"}
    assert not names_in(raw, "/var/log/postgresql")
    assert not names_in(raw, "/var/lib/cloud")
    assert debugfs(raw, "cat /etc/shadow").splitlines() == [
        "root:*:19000:0:99999:7:::",
        "daemon:*:19000:0:99999:7:::",
        "bob:!:1::::::",
    ]
    run("e2fsck", "-fn", f"{raw}?offset={START}")
    raw.unlink()


def test_everything_is_sealed_in_the_image_and_nothing_in_the_machine(
    machine: Guest, environment: dict[str, str], library: Path, tmp_path: Path
) -> None:
    before = {target: image.read_bytes() for target, image in machine.images.items()}
    options = {"domain": machine.name, "dest": str(library), "name": "template", "compression": "zstd"}

    foreseen = tasks.run("export_image", check=True, env=environment, seal=EVERYTHING, **options)
    assert foreseen.rc == 0, foreseen
    assert foreseen["image"]["sealed"] == EVERYTHING
    assert not list(library.iterdir())

    for step in ("copy-to-seal", "copy-to-seal#2", "clean"):
        tasks.kill_at(step, "export_image", tmp_path / "log", seal=EVERYTHING, **options)
        assert len(list(library.iterdir())) == 1, "the run before left something"

    result = tasks.run("export_image", env=environment, seal=EVERYTHING, **options)
    assert result.rc == 0, (result.message, result.answer)
    assert result["image"]["sealed"] == EVERYTHING
    assert "may travel" not in str(result.answer.get("warnings"))
    manifest = json.loads((library / "template" / "manifest.json").read_text())
    assert manifest["sealed"] == EVERYTHING

    assert_sealed(library / "template" / "vda.qcow2", tmp_path)
    run("qemu-img", "compare", "-q", library / "template" / "vdb.qcow2", machine.images["vdb"])

    assert {target: image.read_bytes() for target, image in machine.images.items()} == before
    assert not [one for one in library.iterdir() if one.name != "template"]

    again = tasks.run("export_image", env=environment, seal=EVERYTHING, **options)
    assert (again.rc, again.changed) == (0, False), again
    tasks.refused("export_image", "what is sealed", env=environment, seal=["logs"], **options)


def test_an_image_may_be_sealed_and_encrypted_and_is_handed_over_where_it_cannot_be_compared(
    machine: Guest, environment: dict[str, str], library: Path, tmp_path: Path
) -> None:
    options = {"domain": machine.name, "dest": str(library), "name": "both", "seal": EVERYTHING}
    closed = {**options, "encryption": {"passphrase": KEY}}
    made = tasks.run("export_image", env=environment, **closed)
    assert made.rc == 0, made
    image = library / "both" / "vda.qcow2"
    assert b"KEPT-data" not in image.read_bytes()
    assert_content_sealed(content_of(image, tmp_path))
    assert {disk["unsealed_sha256"] for disk in made["image"]["disks"]} == {None}, "it would tell what was encrypted"

    again = tasks.run("export_image", env=environment, **closed)
    assert again.failed
    assert "cannot be told" in again.message
    assert again["image"]["digest"] == made["image"]["digest"], "whoever only hands it over is told what it is"
    for other in ({**closed, "encryption": {"passphrase": KEY + "x"}}, options, {**closed, "seal": ["logs"]}):
        refused = tasks.run("export_image", env=environment, **other)
        assert refused.failed
        assert "image" not in refused.answer, "it is not what was asked for"


def test_an_unsealed_image_says_which_secrets_may_travel(machine: Guest, library: Path) -> None:
    result = tasks.ok("export_image", domain=machine.name, dest=str(library), name="open")
    warning = str(result["warnings"])
    assert "not sealed" in warning
    for secret in ("machine-id", "SSH host keys", "hashed passwords", "users' keys"):
        assert secret in warning


def test_without_libguestfs_sealing_is_refused_and_names_the_package(machine: Guest, library: Path) -> None:
    found = shutil.which("guestfish", path="/usr/bin:/bin")
    if found:
        run("mount", "--bind", "/dev/null", found)  # in the private test host only
    try:
        for check in (True, False):
            options = {"domain": machine.name, "dest": str(library), "name": "no", "seal": ["logs"]}
            tasks.refused("export_image", "guestfish", check=check, **options)
            assert not list(library.iterdir())
    finally:
        if found:
            run("umount", found)


def test_disks_without_an_operating_system_are_not_called_sealed(
    machine: Guest, environment: dict[str, str], library: Path
) -> None:
    tasks.refused(
        "export_image", "no operating system", env=environment,
        domain=machine.name, dest=str(library), name="data", disks=["vdb"], seal=["logs"],
    )  # fmt: skip
    assert not list(library.iterdir())


def assert_untouched(guest: Guest, run_id: int, definition: str) -> None:
    """The guest is the same run of the same machine on the same disks, it writes, and has all its secrets."""
    assert (guest.domain().ID(), guest.xml_text()) == (run_id, definition)
    assert guest.is_running()
    assert guest.frozen_filesystems() == []
    assert guest.writer_errors("vda") == []
    written = guest.gaps("vda").count
    until(lambda: guest.gaps("vda").count > written, "the writer going on")
    for name, content in FILES.items():
        assert guest.read_file(f"/disk/vda/{name}") == content.encode(), name


def test_a_running_machine_is_sealed_in_its_image_only_wherever_the_export_is_killed(
    at_work: Guest, environment: dict[str, str], library: Path, tmp_path: Path
) -> None:
    run_id, definition, log = at_work.domain().ID(), at_work.xml_text(), tmp_path / "log"
    options = {
        "domain": at_work.name,
        "dest": str(library),
        "name": "sealed",
        "quiesce": "required",
        "seal": EVERYTHING,
    }
    steps = tasks.steps_of("export_image", log, env=environment, **options)
    assert {"targets", "frozen", "cut", "copy", "copy-to-seal", "clean", "write", "seal", "sealed"} <= set(steps)
    bundle = library / "sealed"
    assert json.loads((bundle / "manifest.json").read_text())["sealed"] == EVERYTHING
    assert_sealed(bundle / "vda.qcow2", tmp_path)
    assert_untouched(at_work, run_id, definition)
    # It is another moment's content now: an image is never replaced by it, and the refusal says so.
    sums = {path.name: path.read_bytes() for path in bundle.iterdir()}
    tasks.refused("export_image", "its content is another one now", env=environment, **options)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == sums

    shutil.rmtree(bundle)
    for step in tasks.of_its_own(steps[:-1], "copy", "copy-to-seal", "clean", "seal"):
        tasks.kill_at(step, "export_image", log, env=environment, **options)
        found = tasks.ok("recover_domain", domains=[at_work.name])["findings"]
        assert found, step
        assert all(one["settled"] for one in found), step
        assert list(library.iterdir()) == [], step
        assert not list(JOURNAL.iterdir()), step
        assert at_work.frozen_filesystems() == [], step
    with pytest.raises(libvirt.libvirtError):
        at_work.domain().backupGetXMLDesc(0)

    # In the middle of the appliance's work: it goes with the module.
    tasks.kill_with("guestfish", "", "export_image", hold=False, env=environment, **options)

    tasks.kill_at(steps[-1], "export_image", log, env=environment, **options)
    assert tasks.ok("export_image", env=environment, **options).changed
    assert [path.name for path in library.iterdir()] == ["sealed"]
    assert not list(JOURNAL.iterdir())
    assert_sealed(bundle / "vda.qcow2", tmp_path)
    assert_untouched(at_work, run_id, definition)
