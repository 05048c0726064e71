# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput, NotFound, Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import bundle
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.access import (
    Principal,
    acl_text,
    parse_acl,
    parse_principals,
)


def test_the_acl_lets_the_named_read_and_nobody_write() -> None:
    named = [Principal("user", "alice", 1001), Principal("group", "ops", 1002)]
    assert acl_text(named, folder=True) == "u::rwx,g::---,o::---,u:1001:r-x,g:1002:r-x"
    assert acl_text([], folder=False) == "u::rw-,g::---,o::---"


def test_the_named_are_read_back() -> None:
    text = "user::rw-\nuser:1001:r--\ngroup::---\ngroup:1002:r--\t#effective:---\nmask::r--\nother::---\n"
    assert parse_acl(text) == {("user", 1001), ("group", 1002)}


@pytest.mark.parametrize("name", ["alice", "user:", "other:x", "user:no-such-user", "group:no-such-group"])
def test_who_is_not_known_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        parse_principals([name])


def test_a_file_with_a_hole_is_copied_whole(tmp_path: Path) -> None:
    content = b"a" * 10 + bytes(3 << 20) + b"b" + bytes(1 << 20)
    (tmp_path / "vda.raw").write_bytes(content)
    with bundle.Opened(str(tmp_path)) as opened:
        opened.copy("vda.raw", len(content), bundle.sha256_of_bytes(content), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == content


def test_links_and_pipes_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "soft").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    with bundle.Opened(str(tmp_path)) as opened:
        for name in ("soft", "pipe", "none"):
            with pytest.raises(Refused):
                opened.open(name)
        opened.open("real").close()
        os.link(tmp_path / "real", tmp_path / "hard")
        with pytest.raises(Refused, match="hard link"):
            opened.open("real")


def test_a_bundle_s_directory_is_not_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(Refused):
        bundle.Opened(str(tmp_path / "link"))
    with pytest.raises(NotFound):
        bundle.Opened(str(tmp_path / "none"))
    with pytest.raises(InvalidInput):
        bundle.Opened("relative")


def test_files_that_others_can_exchange_are_not_used_by_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with bundle.Opened(str(tmp_path)) as opened:
        opened.require_ours()
        tmp_path.chmod(0o777)
        with pytest.raises(Refused, match="Somebody else"):
            opened.require_ours()
