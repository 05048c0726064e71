# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import stillness


def test_every_way_of_changing_a_file_is_seen(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(bytes(100))
        os.utime(path, ns=(1, 1))
        return path

    still, overwritten, grown, replaced, gone = map(fresh, ("still", "overwritten", "grown", "replaced", "gone"))
    new = tmp_path / "new"
    marks = stillness.marks_of(map(str, (still, overwritten, grown, replaced, gone, new)))
    new.touch()
    still.read_bytes()
    still.chmod(0o600)  # libvirt gives the files of a domain to others when it starts and stops
    with overwritten.open("r+b") as stream:
        stream.write(b"x")
    grown.write_bytes(bytes(101))
    os.utime(grown, ns=(1, 1))
    other = fresh("other")
    other.rename(replaced)
    gone.unlink()
    assert stillness.written_since(marks) == [str(one) for one in (overwritten, grown, replaced, gone, new)]


def test_a_block_device_is_judged_by_the_writes_that_the_kernel_counts(tmp_path: Path, monkeypatch) -> None:
    counts = tmp_path / "8:1"
    counts.mkdir()
    status = SimpleNamespace(st_mode=stat.S_IFBLK, st_rdev=os.makedev(8, 1), st_ino=7, st_size=0, st_mtime_ns=1)
    line = "  410  55 15602  154  {}  26  9952  120  0  196  303  0 0 0 0 8 29\n"
    (counts / "stat").write_text(line.format(17))
    monkeypatch.setattr(stillness, "os", SimpleNamespace(**{**vars(os), "stat": lambda path: status}))
    marks = stillness.marks_of(["/dev/sda1"], devices=str(tmp_path))
    same = stillness.written_since(marks, devices=str(tmp_path))
    with (counts / "stat").open("w") as stream:
        stream.write(line.format(18))
    assert same == []
    assert stillness.written_since(marks, devices=str(tmp_path)) == ["/dev/sda1"]
