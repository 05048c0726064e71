# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the disk of a domain that is off smaller: a copy is shrunk and checked, then takes the original's name.

The filesystem says whether it fits, and shrinks, inside libguestfs; the host only copies bytes and cuts the copy behind its
end.  The original stays beside it under another name until the domain was well with the copy.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._errors import Refused, Unsupported, VmkeeperError
from ..hypervisor import qemu_img
from ..hypervisor.appliance import Appliance
from ..safety import places, processes, space
from ..safety.space import human
from . import partition_table
from .partition_table import SECTOR, Partition

MIB = 1 << 20

#: What can be made smaller.
EXT = ("ext2", "ext3", "ext4")
_FIELD = re.compile(r"^\s*(part_num|part_start|part_end): (\d+)$")

#: An appliance knows the one disk by this name.
_DISK = "/dev/sda"


@dataclass(frozen=True)
class Layout:
    """Where the last filesystem of a disk lies. ``table`` is msdos, gpt or None for a filesystem without a partition."""

    table: str | None
    partition: Partition | None

    @property
    def device(self) -> str:
        """What it lies on, by the appliance's name."""
        return f"{_DISK}{self.partition.number}" if self.partition else _DISK

    def room(self, size: int) -> int:
        """The most bytes that the filesystem can have on a disk of ``size``, and not more than it has. Pure.

        A GPT keeps its copy in the last 33 sectors; partitions end on whole MiB, as the tools that made them do it.
        """
        if self.partition is None:
            return size - size % 4096
        end = size - (33 * SECTOR if self.table == "gpt" else 0)
        return min(end - end % MIB, self.partition.end + 1) - self.partition.start

    def on(self, size: int) -> Layout:
        """The same on a smaller disk of ``size`` bytes. Pure."""
        if self.partition is None:
            return self
        return replace(self, partition=replace(self.partition, end=self.partition.start + self.room(size) - 1))


def parse_partitions(lines: Sequence[str]) -> tuple[Partition, ...]:
    """What guestfish prints for ``part-list``."""
    values: dict[str, list[int]] = {"part_num": [], "part_start": [], "part_end": []}
    for line in lines:
        match = _FIELD.match(line)
        if match:
            values[match.group(1)].append(int(match.group(2)))
    return tuple(Partition(*entry) for entry in zip(values["part_num"], values["part_start"], values["part_end"]))


def choose_layout(table: str | None, partitions: Sequence[Partition]) -> Layout:
    """The last partition of a disk, or the disk itself where it has no table; raises :class:`Unsupported`. Pure."""
    if table is None:
        return Layout(None, None)
    if table not in ("msdos", "gpt") or not partitions:
        raise Unsupported(f"a partition table of type {table} with {len(partitions)} partitions cannot be shortened")
    last = max(partitions, key=lambda one: one.start)
    if table == "msdos" and last.number > 4:
        raise Unsupported(f"its last partition, number {last.number}, is a logical one of a DOS table")
    return Layout(table, last)


class _Look:
    """Reading and changing one disk's layout in an appliance."""

    def __init__(self, appliance: Appliance) -> None:
        self._appliance = appliance

    def layout(self) -> Layout:
        do = self._appliance.do
        if not [line for line in do("list-partitions") if line]:
            layout = choose_layout(None, ())
        else:
            table = "".join(do("part-get-parttype", _DISK)).strip()
            layout = choose_layout(table, parse_partitions(do("part-list", _DISK)))
        kind = "".join(do("vfs-type", layout.device)).strip()
        if kind not in EXT:
            raise Unsupported(
                "XFS cannot be made smaller"
                if kind == "xfs"
                else f"what lies last on it ({kind[:32] or 'nothing known'}) cannot be made smaller; ext2, ext3 and ext4 can"
            )
        return layout

    def repair(self, layout: Layout) -> None:
        """Check all of it and replay its journal; raises for damage that is not for a program to repair (e2fsck -p)."""
        self._appliance.do("e2fsck", layout.device, "correct:true")

    def least(self, layout: Layout) -> int:
        """Bytes that the filesystem needs at least, by resize2fs' own estimate."""
        return int("".join(self._appliance.do("vfs-minimum-size", layout.device)))

    def files(self, layout: Layout) -> int:
        """How many inodes are in use."""
        said = dict(line.split(": ", 1) for line in self._appliance.do("tune2fs-l", layout.device) if ": " in line)
        return int(said["Inode count"]) - int(said["Free inodes"])

    def shorten(self, layout: Layout, size: int) -> None:
        """Let the filesystem end where a disk of ``size`` lets it."""
        self._appliance.do("resize2fs-size", layout.device, str(layout.room(size)))


def check_fits(path: str, image_format: str, size: int, *, doing: str) -> None:
    """Raise where the disk cannot be made that small. The image, which nobody writes, is only read."""
    with _explained(doing), Appliance([(path, image_format)], doing=doing, readonly=True) as appliance:
        look = _Look(appliance)
        layout = look.layout()
        look.repair(layout)  # of an overlay that is thrown away
        least, room = look.least(layout), layout.room(size)
    check_room(least, room, layout.partition.start if layout.partition else 0, doing=doing)


def check_room(least: int, room: int, offset: int, *, doing: str) -> None:
    """Raise where a filesystem that begins ``offset`` bytes into its disk and needs ``least`` bytes would have ``room``. Pure."""
    if room < least:
        raise Refused(
            f"{doing}: its filesystem needs at least {human(least)}, and would have {human(max(room, 0))}",
            advice=f"Give at least {human(offset + least + 2 * MIB)}, and some room for what is still to come",
            least=least,
        )


def room_for_copy(path: str, image_format: str) -> tuple[str, int]:
    """``(directory, bytes)`` that a smaller copy of an image takes while it is made."""
    content = space.allocated(path)
    return os.path.dirname(path), content * (2 if image_format != "raw" else 1) + (64 << 20)


def make_copy(shrink: Mapping[str, Any], *, doing: str) -> int:
    """A smaller, checked copy of an image at ``shrink['copy']``; raises and leaves the original alone.

    ``shrink`` is an entry of the journal: ``{target, path, format, size, copy, work, kept}``.  Returns when what was copied had
    last been written (nanoseconds, by the image's filesystem).
    """
    path, image_format, size = shrink["path"], shrink["format"], int(shrink["size"])
    work = shrink["work"]
    space.require([room_for_copy(path, image_format)], doing)
    check_fits(path, image_format, size, doing=doing)
    places.unlink_quietly(work)
    written = os.stat(path).st_mtime_ns
    os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    qemu_img.run(["convert", "-q", "-f", image_format, "-O", "raw", path, work], doing=doing, with_caller=True)
    with _explained(doing), Appliance([(work, "raw")], doing=doing) as appliance:
        look = _Look(appliance)
        layout = look.layout()
        look.repair(layout)
        files = look.files(layout)
        look.shorten(layout, size)
    shorter = layout.on(size)
    with _explained(doing):
        if layout.table is None or shorter.partition is None:
            os.truncate(work, size)
        else:
            partition_table.shorten(work, layout.table, shorter.partition, size)
    with _explained(doing), Appliance([(work, "raw")], doing=doing) as appliance:
        look = _Look(appliance)
        after = look.layout()
        look.repair(after)  # ends badly for anything but the trivial
        if look.files(after) != files or after != shorter:
            raise VmkeeperError(f"{doing}: the smaller copy does not hold as many files", advice="Look at the disk")
    _finish(work, shrink, doing)
    return written


def _finish(work: str, shrink: Mapping[str, Any], doing: str) -> None:
    """The copy in the original's format, with its owner and mode, durable."""
    copy, image_format = shrink["copy"], shrink["format"]
    if image_format == "raw":
        os.rename(work, copy)
    else:
        places.unlink_quietly(copy)
        qemu_img.run(["convert", "-q", "-f", "raw", "-O", image_format, work, copy], doing=doing, with_caller=True)
        qemu_img.run(["compare", "-q", "-f", "raw", "-F", image_format, work, copy], doing=doing, with_caller=True)
        os.unlink(work)
    status = os.stat(shrink["path"])
    os.chown(copy, status.st_uid, status.st_gid)
    os.chmod(copy, status.st_mode & 0o7777)
    places.fsync_file(copy)


@contextlib.contextmanager
def _explained(doing: str) -> Any:
    """What the disk's layout does not allow, as a whole sentence."""
    try:
        yield
    except Unsupported as error:
        if error.problem.startswith(doing):
            raise
        raise Unsupported(
            f"{doing}: {error.problem}", advice="Copy the data to a new disk inside the guest instead"
        ) from error


def swap(shrink: Mapping[str, Any]) -> None:
    """The copy takes the original's name, which at every instant names one of them whole; the original is kept."""
    os.link(shrink["path"], shrink["kept"])
    os.rename(shrink["copy"], shrink["path"])
    places.fsync_directory(os.path.dirname(shrink["path"]))


def swapped(shrink: Mapping[str, Any]) -> bool:
    """Whether the disk's name stands for the copy now, and its original is still there."""
    try:
        return not os.path.samefile(shrink["kept"], shrink["path"])
    except FileNotFoundError:
        return False


def written_since(shrinks: Sequence[Mapping[str, Any]], when: float) -> bool:
    """Whether a copy that stands for its disk now was written later than ``when`` (seconds of the epoch): a guest has run on it."""
    return any(swapped(shrink) and os.stat(shrink["path"]).st_mtime > when for shrink in shrinks)


def return_used(shrinks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The targets whose running domain was started on the original before this gave its name away; it has the name again.

    Only of a domain that runs: it has one of the two open. What stands beside the other, a program that reads it, says nothing.
    """
    used = [
        shrink
        for shrink in shrinks
        if swapped(shrink) and processes.holders_of(shrink["kept"]) and not processes.holders_of(shrink["path"])
    ]
    put_back(used)
    return [shrink["target"] for shrink in used]


def put_back(shrinks: Sequence[Mapping[str, Any]]) -> None:
    """The originals under their names, and no copies; can be repeated."""
    for shrink in shrinks:
        if swapped(shrink):
            os.rename(shrink["kept"], shrink["path"])
        for name in ("work", "copy", "kept"):
            places.unlink_quietly(shrink[name])
        places.fsync_directory(os.path.dirname(shrink["path"]))


def drop_originals(shrinks: Sequence[Mapping[str, Any]]) -> None:
    """The domain was well: nothing needs the originals any more. Can be repeated."""
    for shrink in shrinks:
        places.unlink_quietly(shrink["kept"])
