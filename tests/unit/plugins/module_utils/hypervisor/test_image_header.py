# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_header
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_header import (
    BadHeader,
    Bitmap,
    holds_data,
    is_qcow2,
    read_qcow2,
)

MIB = 1 << 20

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def qemu_img(*arguments):
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def header(version=3, **fields):
    """A well-formed header without extensions, 64 KiB clusters; ``fields`` override by offset name."""
    values = {
        "magic": b"QFI\xfb",
        "backing_offset": 0,
        "backing_length": 0,
        "cluster_bits": 16,
        "size": MIB,
        "crypt": 0,
        "snapshots": 0,
        "incompatible": 0,
        "header_length": 104,
        **fields,
    }
    raw = bytearray(4096)
    raw[0:4] = values["magic"]
    struct.pack_into(
        ">IQIIQI",
        raw,
        4,
        version,
        values["backing_offset"],
        values["backing_length"],
        values["cluster_bits"],
        values["size"],
        values["crypt"],
    )
    struct.pack_into(">I", raw, 60, values["snapshots"])
    if version == 3:
        struct.pack_into(">Q", raw, 72, values["incompatible"])
        struct.pack_into(">I", raw, 100, values["header_length"])
    return raw


def written(tmp_path, raw):
    path = tmp_path / "image"
    path.write_bytes(bytes(raw))
    return str(path)


@needs_qemu_img
@pytest.mark.parametrize(
    "options", ["compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2M", "extended_l2=on"]
)
def test_reads_what_qemu_img_makes(tmp_path, options):
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "48M")
    found = read_qcow2(str(image))
    assert found.virtual_size == 48 * MIB
    assert found.version == (2 if options == "compat=0.10" else 3)
    assert found.cluster_size == {"cluster_size=512": 512, "cluster_size=2M": 2 * MIB}.get(options, 65536)
    assert bool(found.incompatible_features & image_header.INCOMPATIBLE_EXTENDED_L2) == (options == "extended_l2=on")
    assert (found.backing_file, found.data_file, found.bitmaps, found.encrypted, found.corrupt) == (
        None,
        None,
        (),
        False,
        False,
    )


@needs_qemu_img
def test_reads_the_backing_file_and_its_format_without_opening_it(tmp_path):
    image = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "../nowhere/base.raw", image, "1M")
    found = read_qcow2(str(image))
    assert (found.backing_file, found.backing_format) == ("../nowhere/base.raw", "raw")


@needs_qemu_img
def test_reads_an_external_data_file(tmp_path):
    image, data = tmp_path / "a.qcow2", tmp_path / "data.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, "1M")
    found = read_qcow2(str(image))
    assert found.has_data_file
    assert found.data_file == str(data)


@needs_qemu_img
def test_reads_bitmaps_with_their_state(tmp_path):
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    qemu_img("bitmap", "--add", "-g", "32K", image, "first")
    qemu_img("bitmap", "--add", "--disable", image, "a-much-longer-name-of-a-bitmap")
    assert read_qcow2(str(image)).bitmaps == (
        Bitmap("first", enabled=True, in_use=False, granularity=32768),
        Bitmap("a-much-longer-name-of-a-bitmap", enabled=False, in_use=False, granularity=65536),
    )


@needs_qemu_img
def test_counts_internal_snapshots_and_sees_encryption(tmp_path):
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("snapshot", "-c", "one", image)
    assert read_qcow2(str(image)).internal_snapshots == 1
    secret = tmp_path / "secret"
    secret.write_text("x")
    locked = tmp_path / "locked.qcow2"
    # Not LUKS: making one measures the processor, which fails on a busy machine.
    options = ["--object", f"secret,id=s,file={secret}", "-o", "encrypt.format=aes,encrypt.key-secret=s"]
    made = subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(locked), "1M"], capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert read_qcow2(str(locked)).encrypted
    assert not holds_data(str(locked)), "which needs no key"
    opened = ["--object", f"secret,id=s,file={secret}", "--image-opts"]
    opened += [f"driver=qcow2,file.driver=file,file.filename={locked},encrypt.format=aes,encrypt.key-secret=s"]
    subprocess.run(["qemu-io", *opened, "-c", "write -P 1 0 512"], check=True, capture_output=True)
    assert holds_data(str(locked))


@needs_qemu_img
@pytest.mark.parametrize("write", ["write -P 0x55 65536 512", "write -z 0 65536", "write -P 1 2047M 512"])
def test_a_layer_holds_data_as_soon_as_anything_was_written_to_it(tmp_path, write):
    base, overlay = tmp_path / "base.raw", tmp_path / "top.qcow2"
    with base.open("wb") as stream:
        stream.truncate(2 << 30)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "read 0 512", overlay], check=True, capture_output=True)
    assert not holds_data(str(overlay))
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, overlay], check=True, capture_output=True)
    base.unlink()  # not needed for the answer
    assert holds_data(str(overlay))


@pytest.mark.parametrize(("entries", "offset"), [((32 << 20) // 8 + 1, 4096), (2, 1 << 56), (2, 1 << 40)])
def test_a_first_table_that_is_not_there_is_no_answer(tmp_path, entries, offset):
    raw = header()
    struct.pack_into(">IQ", raw, 36, entries, offset)
    with pytest.raises(BadHeader, match="first table"):
        holds_data(written(tmp_path, raw))


def test_a_raw_image_is_not_qcow2(tmp_path):
    path = written(tmp_path, bytes(4096))
    assert not is_qcow2(path)
    with pytest.raises(BadHeader, match="not a qcow2 image"):
        read_qcow2(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 4},
        {"cluster_bits": 8},
        {"cluster_bits": 22},
        {"cluster_bits": 0xFFFFFFFF},
        {"header_length": 71},
        {"header_length": 0xFFFFFFFF},
        {"backing_offset": 512, "backing_length": 1024},
        {"backing_offset": 512, "backing_length": 0},
        {"backing_offset": 1 << 62, "backing_length": 10},
        {"backing_offset": 65530, "backing_length": 100},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, fields):
    with pytest.raises(BadHeader):
        read_qcow2(written(tmp_path, header(**fields)))


def with_extension(kind, length, content=b""):
    raw = header()
    struct.pack_into(">II", raw, 104, kind, length)
    raw[112 : 112 + len(content)] = content
    return raw


def test_an_extension_longer_than_the_header_is_refused(tmp_path):
    with pytest.raises(BadHeader, match="longer than the header"):
        read_qcow2(written(tmp_path, with_extension(0xE2792ACA, 0xFFFFFFF0)))


@pytest.mark.parametrize(
    "content",
    [
        struct.pack(">IIQQ", 65536, 0, 100, 4096),
        struct.pack(">IIQQ", 1, 0, 1 << 40, 4096),
        struct.pack(">IIQQ", 1, 0, 100, 1 << 40),
        struct.pack(">IIQQ", 3, 0, 10, 0),
        b"short",
    ],
)
def test_a_hostile_bitmap_directory_is_refused_without_reading_much(tmp_path, content):
    with pytest.raises(BadHeader):
        read_qcow2(written(tmp_path, with_extension(0x23852875, len(content), content)))


@pytest.mark.parametrize("length", [0, 3, 4, 20, 71, 103])
def test_a_file_that_ends_early_is_refused(tmp_path, length):
    with pytest.raises(BadHeader):
        read_qcow2(written(tmp_path, header()[:length]))


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    raw = header(backing_offset=512, backing_length=4)
    raw[512:516] = b"\xff\xfe\xff\xfe"
    with pytest.raises(BadHeader, match="UTF-8"):
        read_qcow2(written(tmp_path, raw))


def test_the_corrupt_mark_is_seen(tmp_path):
    assert read_qcow2(written(tmp_path, header(incompatible=2))).corrupt
