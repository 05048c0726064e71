# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import shutil
import stat

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_header, qemu_img

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
ME = (os.geteuid(), os.getegid())


@pytest.fixture
def overlay(tmp_path):
    base, path = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"x" * (1 << 20))
    qemu_img.create_overlay(str(path), backing=str(base), backing_format="raw", size=1 << 20, owner=ME)
    return path


@needs_qemu_img
def test_an_overlay_is_private_and_stands_on_its_base(overlay):
    header = image_header.read_qcow2(str(overlay))
    assert (header.backing_file, header.backing_format) == (str(overlay.with_name("base.raw")), "raw")
    assert header.virtual_size == 1 << 20
    assert stat.S_IMODE(overlay.stat().st_mode) == 0o600


@needs_qemu_img
def test_nothing_is_ever_overwritten(overlay):
    before = overlay.read_bytes()
    with pytest.raises(FileExistsError):
        qemu_img.create_overlay(str(overlay), backing="/x", backing_format="raw", size=1, owner=ME)
    (overlay.parent / "link").symlink_to(overlay.parent / "target")
    with pytest.raises(OSError):
        qemu_img.create_overlay(str(overlay.parent / "link"), backing="/x", backing_format="raw", size=1, owner=ME)
    assert overlay.read_bytes() == before
    assert not (overlay.parent / "target").exists()


@needs_qemu_img
def test_what_could_not_be_made_is_not_left_behind(tmp_path):
    with pytest.raises(qemu_img.ImageToolFailed, match="Making the overlay"):
        qemu_img.create_overlay(str(tmp_path / "a"), backing="/x", backing_format="nonsense", size=1, owner=ME)
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_qemu_img_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(Unsupported, match="qemu-utils"):
        qemu_img.run(["--version"], doing="Trying")
