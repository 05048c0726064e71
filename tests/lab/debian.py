# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A whole Debian guest with PostgreSQL, its data and its write-ahead log on disks of their own.

It is for what only a real database shows: whether a restored machine comes up and its pages and indexes are whole. It is built
once (two minutes) and kept in the lab's cache.
"""

from __future__ import annotations

import base64
import inspect
import json
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from .images import run
from .waiting import until
from .whole_debian import BOOT_SECONDS, WholeGuest, cached, make_root

#: Target of a disk -> the directory of the guest that lies on it, and its size.
DISKS = {"vda": ("/", 2 << 30), "vdb": ("/srv/data", 512 << 20), "vdc": ("/srv/wal", 512 << 20)}

PACKAGES = ("qemu-guest-agent", "postgresql")

#: Runs in the new root file system. The database is made by the builder's CPU, not by the emulated one.
PROVISION = """
echo debian >/etc/hostname
printf '127.0.0.1 localhost\\n' >/etc/hosts
cat >/etc/fstab <<'FSTAB'
LABEL=root / ext4 noatime,errors=remount-ro 0 1
LABEL=data /srv/data ext4 noatime,errors=remount-ro 0 2
LABEL=wal /srv/wal ext4 noatime,errors=remount-ro 0 2
FSTAB
pg=$(ls /usr/lib/postgresql)
pg_dropcluster "$pg" main 2>/dev/null || true
install -d -o postgres -g postgres /srv/data /srv/wal
pg_createcluster "$pg" main -d /srv/data/main -- --waldir=/srv/wal/main --data-checksums
printf "full_page_writes = on\\nfsync = on\\nsynchronous_commit = on\\ncheckpoint_timeout = 30s\\n" \\
    >"/etc/postgresql/$pg/main/conf.d/test.conf"
pg_ctlcluster --skip-systemctl-redirect "$pg" main start
runuser -u postgres -- createdb bench
runuser -u postgres -- pgbench -q -i -s 2 bench
runuser -u postgres -- psql -qc 'CREATE EXTENSION amcheck' bench
pg_ctlcluster --skip-systemctl-redirect "$pg" main stop
"""


def built() -> Path:
    """The directory with ``vmlinuz``, ``initrd.img`` and ``<target>.qcow2``; built unless the cache has it."""
    recipe = [inspect.getsource(function) for function in (_build, _disk)]
    return cached("postgresql-guest", [json.dumps([PACKAGES, DISKS]), PROVISION, *recipe], _build)


def _build(scratch: Path, content: Path) -> None:
    root = scratch / "root"
    make_root(root, PACKAGES, PROVISION, (), content)
    for target, (path, size) in reversed(DISKS.items()):
        _disk(root / path.lstrip("/"), size, content / f"{target}.qcow2", path)


def _disk(tree: Path, size: int, image: Path, path: str) -> None:
    """A file system of a directory, which is then emptied: what lies deeper has a disk of its own."""
    raw = image.with_suffix(".raw")
    with raw.open("wb") as file:
        file.truncate(size)
    label = path.rsplit("/", 1)[1] or "root"
    run("mke2fs", "-q", "-t", "ext4", "-L", label, "-d", tree, raw)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    raw.unlink()
    if path != "/":
        for entry in tree.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@dataclass(frozen=True)
class Ran:
    """What a command in the guest came to."""

    rc: int
    output: str


class DebianGuest(WholeGuest):
    """A domain with the built disks. It is talked to through its agent only."""

    def define(self) -> None:
        """Copy the disks and define the domain."""
        self.define_from(built(), DISKS, memory=512)

    def start(self) -> None:
        """Start it and wait until its database answers."""
        self.domain().create()
        self.wait_database()

    def wait_database(self) -> None:
        """Wait until the database answers."""
        until(self._database_answers, f"the database of {self.name} answering", BOOT_SECONDS)

    def _database_answers(self) -> bool:
        try:
            return self.run("runuser -u postgres -- psql -Atc 'SELECT 1' bench").rc == 0
        except libvirt.libvirtError:
            return False

    def sql(self, statement: str) -> str:
        """The output of one statement, unaligned."""
        ran = self.run(f"runuser -u postgres -- psql -v ON_ERROR_STOP=1 -Atc {shlex.quote(statement)} bench")
        assert ran.rc == 0, ran.output
        return ran.output.strip()

    def run(self, command: str, timeout: float = 300) -> Ran:
        """Run a shell command in the guest; both of its outputs. Raises libvirtError where the agent does not answer."""
        arguments = {"path": "/bin/sh", "arg": ["-c", f"exec 2>&1; {command}"], "capture-output": True}
        pid = self._agent("guest-exec", arguments)["pid"]
        deadline = time.monotonic() + timeout
        while True:
            status = self._agent("guest-exec-status", {"pid": pid})
            if status["exited"]:
                return Ran(status.get("exitcode", -1), base64.b64decode(status.get("out-data", "")).decode())
            assert time.monotonic() < deadline, f"{command!r} takes longer than {timeout} s"
            time.sleep(0.2)

    def _agent(self, command: str, arguments: dict[str, Any]) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain(), request, 30, 0))["return"]
