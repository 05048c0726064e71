# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused, Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import chain
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import Disk, Layer

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def overlay(path, backing, backing_format="qcow2"):
    formats = ["-F", backing_format] if backing_format else []
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", *formats, "-b", str(backing), str(path), "1M"], check=True
    )
    return path


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    return path


def paths(layers):
    return [layer.path for layer in layers]


def test_absolute_and_relative_links_are_followed_to_the_base(tmp_path, base):
    (tmp_path / "sub").mkdir()
    middle = overlay(tmp_path / "sub" / "middle.qcow2", "../base.qcow2")
    top = overlay(tmp_path / "top.qcow2", middle)
    found = chain.follow(Layer(str(top), "qcow2"))
    assert paths(found) == [str(top), str(middle), str(base)]


def test_a_link_is_relative_to_where_the_file_really_lies(tmp_path, base):
    (tmp_path / "sub").mkdir()
    real = overlay(tmp_path / "sub" / "real.qcow2", "../base.qcow2")
    link = tmp_path / "link.qcow2"
    os.symlink(real, link)
    assert paths(chain.follow(Layer(str(link), "qcow2")))[-1] == str(base)


def test_a_raw_layer_ends_the_chain_whatever_its_bytes_say(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base, "raw")
    found = chain.follow(Layer(str(top), "qcow2"))
    assert [layer.format for layer in found] == ["qcow2", "raw"]
    assert paths(chain.follow(Layer(str(overlay(tmp_path / "evil.qcow2", "/etc/shadow")), "raw"))) == [
        str(tmp_path / "evil.qcow2")
    ]


def test_a_loop_is_refused(tmp_path):
    overlay(tmp_path / "a.qcow2", tmp_path / "b.qcow2")
    overlay(tmp_path / "b.qcow2", tmp_path / "a.qcow2")
    with pytest.raises(Refused, match="comes back"):
        chain.follow(Layer(str(tmp_path / "a.qcow2"), "qcow2"))


def test_a_missing_layer_is_named(tmp_path):
    top = overlay(tmp_path / "top.qcow2", tmp_path / "gone.qcow2")
    with pytest.raises(Refused, match=r"gone\.qcow2 is missing"):
        chain.follow(Layer(str(top), "qcow2"))


@pytest.mark.parametrize("name", ["nbd://host/x", "json:{}", "rbd:pool/image"])
def test_what_is_not_a_local_file_is_refused(tmp_path, name):
    top = overlay(tmp_path / "top.qcow2", name, "raw")
    with pytest.raises(Unsupported, match="not a local file"):
        chain.follow(Layer(str(top), "qcow2"))


def test_a_live_chain_is_believed_and_an_inactive_one_is_read_from_the_files(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base)
    live = (Layer("/live/top", "qcow2"), Layer("/live/base", "qcow2"))
    assert chain.chain_of(Disk("vda", "disk", "file", "virtio", live)) == live
    assert paths(chain.chain_of(Disk("vda", "disk", "file", "virtio", (Layer(str(top), "qcow2"),)))) == [
        str(top),
        str(base),
    ]
    assert chain.chain_of(Disk("sda", "cdrom", "file", "sata", ())) == ()


def test_a_definition_that_does_not_say_where_the_chain_ends_is_read_on_in_the_images(tmp_path, base):
    """libvirt does so when it starts the guest; a chain that is said to end is believed."""
    middle = overlay(tmp_path / "middle.qcow2", base)
    top = overlay(tmp_path / "top.qcow2", middle)
    said = (Layer(str(top), "qcow2"), Layer(str(middle), "qcow2"))
    disk = Disk("vda", "disk", "file", "virtio", said, open_ended=True)
    assert paths(chain.chain_of(disk)) == [str(top), str(middle), str(base)]
    assert chain.chain_of(replace(disk, open_ended=False)) == said


def test_virtual_sizes_come_from_header_or_length(tmp_path, base):
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(12345))
    assert chain.virtual_size(Layer(str(base), "qcow2")) == 1 << 20
    assert chain.virtual_size(Layer(str(raw), "raw")) == 12345
    assert chain.virtual_size(Layer(str(raw), "qcow2")) is None
    assert chain.virtual_size(Layer(str(tmp_path / "gone"), "raw")) is None
    assert chain.virtual_size(Layer(None, "raw")) is None


@pytest.mark.parametrize(
    ("version", "layers"),
    [((9, 0, 0), 200), ((10, 7, 0), 200), ((10, 8, 0), 25), ((11, 3, 0), 25), ((11, 10, 0), 25), ((12, 0, 0), 200)],
)
def test_some_versions_of_libvirt_start_no_guest_on_a_long_chain(version, layers):
    assert chain.longest_startable(version) == layers


def test_the_depth_of_what_cannot_be_read_is_what_the_definition_says(tmp_path, base):
    assert chain.depth(Disk("vda", "disk", "file", "virtio", (Layer(str(base), "raw"),))) == 1
    missing = Layer(str(tmp_path / "missing.qcow2"), "qcow2")
    assert chain.depth(Disk("vda", "disk", "file", "virtio", (missing,))) == 1
