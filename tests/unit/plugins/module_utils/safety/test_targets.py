# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput, Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import targets

QEMU = (64055, 64055)


@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs", "tmpfs", "fuseblk", ""])
def test_filesystems_of_this_host_are_told_by_their_name(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(targets, "filesystem_type", lambda _path: name)
    assert targets.is_local(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["nfs4", "cifs", "virtiofs", "beegfs", "glusterfs", "ocfs2", "gfs2", "fuse", "fuse.sshfs", "fuse.mergerfs"]
)
def test_a_filesystem_that_others_may_stall_is_refused_and_the_way_out_is_named(
    tmp_path: Path, monkeypatch, name: str
) -> None:
    monkeypatch.setattr(targets, "filesystem_type", lambda _path: name)
    with pytest.raises(Unsupported, match=f"on {name}, .* with scratch"):
        targets.check(str(tmp_path), (0, 0), "scratch directory")


def test_the_type_of_a_filesystem_is_read_from_mountinfo(tmp_path: Path) -> None:
    device = os.stat(tmp_path).st_dev
    info = tmp_path / "mountinfo"
    info.write_text(f"1 0 {os.major(device)}:{os.minor(device)} / /x rw shared:1 - nfs4 server:/x rw\n")
    assert targets.filesystem_type(str(tmp_path), mountinfo=str(info)) == "nfs4"


def test_the_directory_that_does_not_let_qemu_through_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(targets, "is_local", lambda _path: True)
    closed = tmp_path / "closed"
    inner = closed / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(
        targets.places, "reachable_by", lambda path, owner: owner[0] == 0 or not path.startswith(str(closed))
    )
    with pytest.raises(InvalidInput, match=f"reach the repository {inner}: {closed} does not let it through"):
        targets.check(str(inner), QEMU, "repository")
    targets.check(str(inner), (0, 0), "repository")
