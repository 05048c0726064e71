# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

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


def holding(path, byte):
    """A qcow2 image whose content is that byte."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(bytes([byte]) * 4096)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()
    return path


def read_by_qemu(image, tmp_path):
    out = tmp_path / "out"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(out)], check=True, cwd="/")
    return out.read_bytes()[0]


def test_a_relative_name_is_looked_for_beside_the_link_as_qemu_does(tmp_path):
    for name, byte in (("images", 1), ("data", 2)):
        (tmp_path / name).mkdir()
        holding(tmp_path / name / "base.qcow2", byte)
    link = tmp_path / "images" / "link.qcow2"
    link.symlink_to(overlay(tmp_path / "data" / "real.qcow2", "base.qcow2"))
    assert paths(chain.follow(Layer(str(link), "qcow2"))) == [str(link), str(tmp_path / "images" / "base.qcow2")]
    assert read_by_qemu(link, tmp_path) == 1


def test_up_from_a_linked_directory_is_up_from_where_it_leads(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "deep")
    holding(tmp_path / "base.qcow2", 1)
    right = holding(tmp_path / "data" / "base.qcow2", 2)
    overlay(tmp_path / "link" / "top.qcow2", "../base.qcow2")
    top = tmp_path / "link" / "top.qcow2"
    assert paths(chain.follow(Layer(str(top), "qcow2"))) == [str(top), str(right)]
    assert read_by_qemu(top, tmp_path) == 2


@pytest.mark.parametrize(
    "name",
    [
        "base.qcow2",
        "{base}",
        "/{base}",
        "file:{base}",
        "file://{base}",
        'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{base}"}}}}',
        'json:{{"file": {{"filename": "{base}"}}}}',
        'json:{{"file.driver": "file", "file.filename": "{base}"}}',
    ],
)
def test_every_way_to_name_a_local_file_is_understood_as_qemu_does(tmp_path, name):
    base = holding(tmp_path / "base.qcow2", 7)
    top = overlay(tmp_path / "top.qcow2", name.format(base=base))
    assert chain.follow(Layer(str(top), "qcow2")) == (Layer(str(top), "qcow2"), Layer(str(base), "qcow2"))
    assert chain.mentioned(Layer(str(top), "qcow2")) == ()
    assert read_by_qemu(top, tmp_path) == 7


def test_the_headers_format_is_taken_before_that_of_a_name(tmp_path, base):
    name = f'json:{{"driver": "qcow2", "file": {{"filename": "{base}"}}}}'
    top = overlay(tmp_path / "top.qcow2", name, "raw")
    assert chain.follow(Layer(str(top), "qcow2"))[1].format == "raw"


@pytest.mark.parametrize(
    "name",
    [
        "blkdebug::{base}",
        "file:base.qcow2",
        'json:{{"file": {{"driver": "file", "filename": "base.qcow2"}}}}',
        'json:{{"driver": "file", "filename": "{base}"}}',
        'json:{{"driver": "raw", "offset": 512, "file": {{"driver": "file", "filename": "{base}"}}}}',
        'json:{{"driver": "raw", "file": {{"driver": "qcow2", "file": {{"filename": "{base}"}}}}}}',
        'json:{{"driver": "quorum", "children": [{{"driver": "file", "filename": "{base}"}}]}}',
        'json:{{"file": {{"driver": "nbd", "path": "{base}"}}, "backing": null}}',
    ],
)
def test_a_name_that_is_not_understood_is_no_chain_and_tells_the_files_that_it_mentions(tmp_path, base, name):
    top = Layer(str(overlay(tmp_path / "top.qcow2", name.format(base=base))), "qcow2")
    with pytest.raises(Unsupported, match="not a local file"):
        chain.follow(top)
    assert chain.mentioned(top) == (Layer(str(base), "qcow2"),)


@pytest.mark.parametrize("name", ["nbd://host/x", "json:{}", "json:{", "json:" + "[" * 1000, "rbd:pool/image", "a:"])
def test_what_names_no_local_file_mentions_none(tmp_path, base, name):
    assert chain.mentioned(Layer(str(overlay(tmp_path / "top.qcow2", name, "raw")), "qcow2")) == ()
    assert chain.mentioned(Layer(str(base), "qcow2")) == ()
    assert chain.mentioned(Layer(str(tmp_path / "gone"), "qcow2")) == ()


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
    only = (Layer(str(top), "qcow2"),)
    assert len(chain.chain_of(replace(disk, chain=only, open_ended=True))) > 1
    assert chain.chain_of(replace(disk, chain=only, alone=True)) == only, "libvirt opens it with no backing file then"


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
