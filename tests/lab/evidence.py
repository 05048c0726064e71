# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Independent checks on images at rest and on the host's state: never our own product's report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt

from . import assets
from .images import run

RECORD = 96
TICK_NS = 20_000_000

# --- the writer's log --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of guestfs/labwriter.c. ``tick`` is floor(monotonic / 20 ms), common to all writers of a guest."""

    target: str
    boot: str
    count: int
    tick: int
    monotonic_ns: int
    gap_ns: int


@dataclasses.dataclass(frozen=True)
class WriterLog:
    """A parsed log. ``problems`` is empty when every record is whole, in order and none is missing.

    ``torn`` counts trailing bytes that are not a whole record: allowed after a power cut, and only there.
    """

    records: tuple[Record, ...]
    problems: tuple[str, ...]
    torn: int

    @property
    def last(self) -> Record:
        """The newest record; raises IndexError when there is none."""
        return self.records[-1]

    @property
    def is_intact(self) -> bool:
        """Whether there is something and nothing is damaged or missing (a torn tail is not damage)."""
        return bool(self.records) and not self.problems

    def ticks(self) -> set[int]:
        """The ticks at which this writer completed a record in its newest boot."""
        return {record.tick for record in self.records if record.boot == self.last.boot}


_LINE = re.compile(rb"L1 (\S+) +([0-9a-f]{8}) (\d{10}) (\d{12}) (\d{18}) (\d{15}) +([0-9a-f]{8})\n")


def parse_writer_log(data: bytes) -> WriterLog:
    """Parse and check a writer's log: CRC of every record, counts without a hole, clocks that only go forward."""
    records: list[Record] = []
    problems: list[str] = []
    whole = len(data) // RECORD
    torn = len(data) % RECORD
    for number in range(whole):
        raw = data[number * RECORD : (number + 1) * RECORD]
        match = _LINE.fullmatch(raw)
        if match is None or zlib.crc32(raw[: RECORD - 10]) != int(match.group(7), 16):
            rest = data[number * RECORD :]
            if not rest.strip(b"\0"):  # allocated but never written: the tail that a power cut leaves
                torn = len(rest)
                break
            problems.append(f"record {number} is damaged: {raw[:60]!r}")
            continue
        record = Record(match.group(1).decode(), match.group(2).decode(), *(int(match.group(i)) for i in (3, 4, 5, 6)))
        if records:
            before = records[-1]
            if record.count != before.count + 1:
                problems.append(f"count {record.count} follows {before.count}")
            if record.boot == before.boot and record.tick <= before.tick:
                problems.append(f"tick {record.tick} follows {before.tick} at count {record.count}")
        elif record.count != 1:
            problems.append(f"the log begins at count {record.count}")
        records.append(record)
    return WriterLog(tuple(records), tuple(problems), torn)


# --- images ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FsckResult:
    """What a read-only check of a file system found."""

    clean: bool
    """No damage. A journal that would be replayed is not damage (see needs_recovery)."""
    needs_recovery: bool
    """The journal holds what a mount would replay: the file system was neither frozen nor unmounted."""
    output: str


@contextlib.contextmanager
def flattened(image: Path, partition: int | None = None) -> Iterator[Path]:
    """The guest-visible content of an image (with its chain) as a sparse raw file, or of one of its partitions."""
    with tempfile.TemporaryDirectory(dir=_scratch(), prefix="lab-evidence-") as directory:
        raw = flatten(image, Path(directory) / "content.raw")
        if partition is not None:
            start, size = partition_range(raw, partition)
            inner = Path(directory) / "partition.raw"
            _copy_range(raw, inner, start, size)
            raw = inner
        yield raw


def flatten(image: Path, destination: Path | None = None) -> Path:
    """Convert an image with its chain to a raw file; returns it. Without ``destination``: a temporary file of the caller's."""
    if destination is None:
        fd, name = tempfile.mkstemp(dir=_scratch(), prefix="lab-evidence-", suffix=".raw")
        os.close(fd)
        destination = Path(name)
    run("qemu-img", "convert", "-O", "raw", image, destination)
    return destination


def _scratch() -> str:
    return os.environ.get("VMK_LAB_HOST_ROOT") or tempfile.gettempdir()


def partition_range(raw: Path, number: int) -> tuple[int, int]:
    """Start and size in bytes of a partition (1 is the first) of a raw image."""
    table = json.loads(run(assets.guest_assets().sfdisk, "--json", raw))["partitiontable"]
    sector = table.get("sectorsize", 512)
    entry = table["partitions"][number - 1]
    return entry["start"] * sector, entry["size"] * sector


def _copy_range(source: Path, destination: Path, start: int, size: int) -> None:
    run(
        "dd",
        f"if={source}",
        f"of={destination}",
        "bs=1M",
        "iflag=skip_bytes,count_bytes",
        f"skip={start}",
        f"count={size}",
        "conv=sparse",
        "status=none",
    )
    os.truncate(destination, size)


def fsck(image: Path, partition: int | None = None) -> FsckResult:
    """Check an ext4 or XFS file system in an image at rest, without writing to it.

    ext4: ``e2fsck -fn``, on a copy whose journal has been replayed when it needs recovery (what a mount would
    do first). XFS: ``xfs_repair -n`` likewise knows of an unreplayed log.
    """
    with flattened(image, partition) as raw:
        if _magic(raw) == "xfs":
            return _fsck_xfs(raw)
        header = run("dumpe2fs", "-h", raw)
        needs_recovery = bool(re.search(r"^Filesystem features:.*\bneeds_recovery\b", header, re.MULTILINE))
        output = ""
        if needs_recovery:
            output = _lenient("e2fsck", "-E", "journal_only", "-p", str(raw))[1]
        code, checked = _lenient("e2fsck", "-f", "-n", str(raw))
        return FsckResult(code == 0, needs_recovery, output + checked)


def _fsck_xfs(raw: Path) -> FsckResult:
    code, output = _lenient("xfs_repair", "-n", "-f", str(raw))
    needs_recovery = "valuable metadata changes in a log" in output
    return FsckResult(
        code == 0 and not re.search(r"would (have|fix|clear|reset|junk|correct)", output), needs_recovery, output
    )


def _magic(raw: Path) -> str:
    with raw.open("rb") as image:
        return "xfs" if image.read(4) == b"XFSB" else "ext4"


def _lenient(*argv: str) -> tuple[int, str]:
    result = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False
    )
    return result.returncode, result.stdout


def read_file(image: Path, path: str, partition: int | None = None) -> bytes:
    """The content of a file in an ext4 image at rest, as a mount would show it (journal replayed on a copy).

    ``path`` is relative to that file system: ``/writer.log``. Raises FileNotFoundError.
    """
    with flattened(image, partition) as raw:
        if _magic(raw) == "xfs":
            raise ValueError("debugfs reads ext4 only; boot a guest on the image to read XFS")
        if "needs_recovery" in run("dumpe2fs", "-h", raw):
            _lenient("e2fsck", "-E", "journal_only", "-p", str(raw))
        if "Inode:" not in _lenient("debugfs", "-R", f"stat {path}", str(raw))[1]:
            raise FileNotFoundError(f"{path} is not in {image}")
        return subprocess.run(
            ["debugfs", "-R", f"cat {path}", str(raw)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        ).stdout


def sha256_of_file(image: Path, path: str, partition: int | None = None) -> str:
    """The hex digest of a file in an ext4 image at rest."""
    return hashlib.sha256(read_file(image, path, partition)).hexdigest()


def writer_log(image: Path, partition: int | None = None) -> WriterLog:
    """The writer's log in an ext4 image at rest."""
    return parse_writer_log(read_file(image, "/writer.log", partition))


def same_content(first: Path, second: Path) -> bool:
    """Whether two images (with their chains) show the same content (``qemu-img compare``)."""
    result = subprocess.run(
        ["qemu-img", "compare", "-q", str(first), str(second)], stderr=subprocess.PIPE, text=True, check=False
    )
    if result.returncode not in (0, 1):
        raise RuntimeError(f"qemu-img compare {first} {second}: {result.stderr.strip()}")
    return result.returncode == 0


def check(image: Path) -> None:
    """``qemu-img check`` of a qcow2 image; raises RuntimeError on corruption or leaks."""
    run("qemu-img", "check", "-q", image)


# --- the host ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HostState:
    """A digest per thing, so that a difference can be named."""

    parts: dict[str, str]

    def differences(self, other: HostState) -> list[str]:
        """The names of what is not the same in both."""
        names = self.parts.keys() | other.parts.keys()
        return sorted(name for name in names if self.parts.get(name) != other.parts.get(name))


def host_state(connection: libvirt.virConnect, directories: Sequence[Path] = (), content: bool = True) -> HostState:
    """Everything that a task in check mode must leave alone.

    Domain definitions (live and saved), snapshots, checkpoints, pools, managed-save images, and every file
    below ``directories``: owner, mode, size, mtime and, with ``content``, its bytes. Ask for content only
    of directories that no running guest writes to.
    """
    parts: dict[str, str] = {}
    for domain in connection.listAllDomains():
        name = f"domain {domain.name()}"
        parts[name] = _sha(domain.XMLDesc(0))
        parts[f"{name} inactive"] = _sha(
            domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        )
        parts[f"{name} state"] = f"{domain.state()} {domain.hasManagedSaveImage()} {domain.autostart()}"
        for snapshot in domain.listAllSnapshots():
            parts[f"{name} snapshot {snapshot.getName()}"] = _sha(snapshot.getXMLDesc()) + str(snapshot.isCurrent())
        for checkpoint in domain.listAllCheckpoints():
            parts[f"{name} checkpoint {checkpoint.getName()}"] = _sha(checkpoint.getXMLDesc())
    for pool in connection.listAllStoragePools():
        parts[f"pool {pool.name()}"] = _sha(pool.XMLDesc(libvirt.VIR_STORAGE_XML_INACTIVE)) + str(pool.isActive())
    for directory in directories:
        parts.update(_files(directory, content))
    return HostState(parts)


def _files(directory: Path, content: bool) -> dict[str, str]:
    found = {}
    for path in sorted([directory, *directory.rglob("*")]):
        status = path.lstat()
        facts = f"{status.st_mode:o} {status.st_uid}:{status.st_gid} {status.st_ino}"
        if path.is_symlink():
            facts += f" -> {os.readlink(path)}"
        elif path.is_file():
            facts += f" {status.st_size} {status.st_mtime_ns}"
            if content:
                facts += " " + _file_sha(path)
        found[f"file {path}"] = facts
    return found


def _file_sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha(text: str) -> str:
    # statistics of pools move by themselves; a definition's text does not
    return hashlib.sha256(re.sub(r"<(capacity|allocation|available)[^>]*>[^<]*</\1>", "", text).encode()).hexdigest()


def free_copy(path: Path, destination: Path) -> Path:
    """Copy an image file as it lies (sparse), to keep it as evidence."""
    run("cp", "--sparse=always", path, destination)
    shutil.copymode(path, destination)
    return destination
