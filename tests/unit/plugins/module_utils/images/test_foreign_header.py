# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import foreign_header

SIZE = 4 << 20
needs_qemu_img = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v qemu-img"], capture_output=True, check=False).returncode != 0,
    reason="qemu-img is not installed",
)


def made(path: Path, image_format: str, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, *options, str(path), str(SIZE)], check=True)
    return path


@needs_qemu_img
@pytest.mark.parametrize(
    ("image_format", "options"),
    [("qcow2", ()), ("qcow2", ("-o", "compat=0.10")), ("raw", ()), ("vmdk", ()), ("vhdx", ())],
)
def test_qemu_img_s_own_images_are_accepted(tmp_path: Path, image_format: str, options: tuple[str, ...]) -> None:
    foreign_header.check(str(made(tmp_path / "disk", image_format, *options)), image_format, SIZE, "disk")


@needs_qemu_img
@pytest.mark.parametrize("image_format", ["qcow2", "raw", "vmdk", "vhdx"])
def test_another_size_than_promised_is_refused(tmp_path: Path, image_format: str) -> None:
    path = made(tmp_path / "disk", image_format)
    with pytest.raises(Refused, match="the manifest says"):
        foreign_header.check(str(path), image_format, SIZE + 512, "disk")


@needs_qemu_img
@pytest.mark.parametrize(("real", "said"), [("vmdk", "qcow2"), ("vhdx", "vmdk"), ("qcow2", "vhdx"), ("raw", "qcow2")])
def test_a_format_that_is_not_what_it_says_is_refused(tmp_path: Path, real: str, said: str) -> None:
    with pytest.raises(Refused, match="not a self-contained"):
        foreign_header.check(str(made(tmp_path / "disk", real)), said, SIZE, "disk")


@needs_qemu_img
@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vhdx"])
def test_no_header_cut_short_anywhere_gets_through(tmp_path: Path, image_format: str) -> None:
    content = made(tmp_path / "disk", image_format).read_bytes()
    cut = tmp_path / "cut"
    for length in (0, 3, 4, 8, 20, 71, 72, 78, 100, 600, 196608, 196620):
        cut.write_bytes(content[:length])
        if length < 112 or image_format == "vhdx":
            with pytest.raises(Refused):
                foreign_header.check(str(cut), image_format, SIZE, "disk")


@needs_qemu_img
def test_a_vhdx_with_a_parent_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "vhdx")
    content = bytearray(path.read_bytes())
    parameters = content.index(foreign_header._VHDX_FILE_PARAMETERS.bytes_le)
    (item,) = struct.unpack_from("<I", content, parameters + 16)
    metadata = content.index(b"metadata")
    content[metadata + item + 4] |= 2
    path.write_bytes(content)
    with pytest.raises(Refused, match="stands on another file"):
        foreign_header.check(str(path), "vhdx", SIZE, "disk")


DESCRIPTOR = (
    'version=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicSparse"\nRW 8192 SPARSE "x.vmdk"\nddb.x = "1"\n'
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ffffffff", "00000001"),
        ("monolithicSparse", "twoGbMaxExtentSparse"),
        ("SPARSE", "FLAT"),
        ("RW 8192", "RW 4096"),
        ("ddb.x", 'parentFileNameHint="/etc/shadow"\nddb.x'),
        ("ddb.x", 'RW 8192 SPARSE "/etc/shadow"\nddb.x'),
        ("ddb.x", "parentCID=ffffffff\nddb.x"),
        ("CID=1", "this is no line of a descriptor"),
    ],
)
def test_a_vmdk_descriptor_that_names_anything_else_is_refused(old: str, new: str) -> None:
    foreign_header._check_vmdk_descriptor(DESCRIPTOR, 8192)
    with pytest.raises(foreign_header.BadHeader):
        foreign_header._check_vmdk_descriptor(DESCRIPTOR.replace(old, new, 1), 8192)


@needs_qemu_img
def test_a_vmdk_whose_descriptor_is_not_where_qemu_looks_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "vmdk")
    content = bytearray(path.read_bytes())
    clean = bytes(content[512 : 512 + 20 * 512])
    parent = clean.replace(b"parentCID=ffffffff", b"parentCID=00000001").replace(
        b"createType", b'parentFileNameHint="/victim.vmdk"\ncreateType', 1
    )
    moved = bytearray(content)
    moved[512 : 512 + 20 * 512] = parent[: 20 * 512]
    moved[128 * 512 : 148 * 512] = clean
    moved[28:36] = (128).to_bytes(8, "little")
    path.write_bytes(moved)
    with pytest.raises(Refused, match="not where QEMU looks"):
        foreign_header.check(str(path), "vmdk", SIZE, "disk")

    # The header says one sector; QEMU reads twenty.
    behind = bytearray(content)
    behind[36:44] = (1).to_bytes(8, "little")
    behind[512 + 1024 : 512 + 1024 + 40] = b'\nparentfilenameHINT="/victim.vmdk"\n'.ljust(40, b"#")
    path.write_bytes(behind)
    with pytest.raises(Refused):
        foreign_header.check(str(path), "vmdk", SIZE, "disk")

    footer = bytearray(content)
    footer[56:64] = b"\xff" * 8
    path.write_bytes(footer)
    with pytest.raises(Refused, match="footer"):
        foreign_header.check(str(path), "vmdk", SIZE, "disk")
