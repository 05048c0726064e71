# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Chains as QEMU's programs take them, tried on qemu-img, qemu-nbd and qemu-io themselves."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import digests
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node, qemu_img
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import Image, Keys, Passphrase

KEY = Passphrase(b"correct horse")
SIZE = 4 << 20

needs_qemu = pytest.mark.skipif(
    not all(shutil.which(program) for program in ("qemu-img", "qemu-io", "qemu-nbd")), reason="QEMU's tools are missing"
)


def test_a_chain_is_described_layer_by_layer_and_tells_no_passphrase() -> None:
    with Keys() as keys:
        described = image_node.node([Image("/a", passphrase=KEY), Image("/b", "raw")], keys)
        assert described == {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": "/a"},
            "encrypt": {"format": "luks", "key-secret": "key0"},
            "backing": {"driver": "raw", "file": {"driver": "file", "filename": "/b"}},
        }
        (descriptor,) = keys.descriptors
        assert keys.arguments == ["--object", f"secret,id=key0,file=/dev/fd/{descriptor}"]
        assert Path(f"/dev/fd/{descriptor}").read_bytes() == KEY.value
    assert KEY.value.decode() not in repr([Image("/a", passphrase=KEY), KEY])


def test_a_layer_that_stands_on_nothing_says_so() -> None:
    with Keys() as keys:
        assert image_node.node([Image("/a")], keys)["backing"] is None


def test_commas_in_names_do_not_end_an_option() -> None:
    assert image_node.as_options({"driver": "raw", "file": {"filename": "/a,b"}, "backing": None}) == (
        "driver=raw,file.filename=/a,,b"
    )


@pytest.fixture(params=["plain", "zstd", "encrypted"])
def chain(request, tmp_path: Path) -> tuple[list[Image], bytes]:
    """An increment over a full, made as a backup makes them of what QEMU pushed; and what the guest saw."""
    if not all(shutil.which(program) for program in ("qemu-img", "qemu-io", "qemu-nbd")):
        pytest.skip("QEMU's tools are missing")
    compression = "zstd" if request.param == "zstd" else None
    passphrase = KEY if request.param == "encrypted" else None
    expected = bytearray(SIZE)
    writes = {
        "full": [("write -P 1 0 1M", 0, 1 << 20, 1), ("write -P 2 2M 128k", 2 << 20, 128 << 10, 2)],
        "increment": [("write -P 3 512k 64k", 512 << 10, 64 << 10, 3), ("write -z 2M 64k", 2 << 20, 64 << 10, 0)],
    }
    layers: list[Image] = []
    for name, commands in writes.items():
        pushed = Image(str(tmp_path / f"{name}.pushed"))
        qemu_img.create_layer(pushed, SIZE)
        words = [word for command, *_rest in commands for word in ("-c", command)]
        subprocess.run(["qemu-io", "-f", "qcow2", *words, pushed.path], check=True, capture_output=True)
        for _command, start, length, value in commands:
            expected[start : start + length] = bytes([value]) * length
        target = Image(str(tmp_path / name), "qcow2", passphrase)
        backing = "full" if layers else None
        qemu_img.create_layer(target, SIZE, backing=backing, compression=compression, milliseconds=10)
        if backing is None:
            qemu_img.copy_chain([pushed], target, compression=compression, doing="x")
        else:
            qemu_img.copy_layer(pushed, target, SIZE, backing=backing, compression=compression, doing="x")
        layers.insert(0, target)
    return layers, bytes(expected)


def test_a_copied_layer_holds_what_was_pushed_and_no_more(chain) -> None:
    layers, expected = chain
    extents = digests.extents_of(layers)
    own = [(extent.start, extent.length) for extent in extents if extent.depth == 0]
    assert own == [(512 << 10, 64 << 10), (2 << 20, 64 << 10)], "a cluster that became zero is stated"
    with digests.content_of(layers, extents) as content:
        sums = digests.sums_of(content, extents, SIZE, complete=True)
    chunks = {index: expected[index << 20 : (index + 1) << 20] for index in range(4)}
    assert sums.chunks == {
        index: hashlib.sha256(chunk).hexdigest() for index, chunk in chunks.items() if chunk.strip(b"\0")
    }
    with digests.content_of(layers, extents) as content:
        assert digests.differences(sums, content, extents) == []


@needs_qemu
@pytest.mark.parametrize("compression", ["zstd", "zlib", None])
@pytest.mark.parametrize("tail", [512, 32768])
def test_a_copied_layer_of_a_disk_that_ends_within_a_cluster_keeps_the_end_of_the_one_below(
    tmp_path: Path, compression: str | None, tail: int
) -> None:
    size = SIZE + tail
    full, pushed, layer = (Image(str(tmp_path / name)) for name in ("full", "pushed", "layer"))
    qemu_img.create_layer(full, size, compression=compression)
    qemu_img.create_layer(pushed, size)
    for image, command in ((full, f"write -P 7 {SIZE} {tail}"), (pushed, "write -P 3 0 64k")):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, image.path], check=True, capture_output=True)
    qemu_img.create_layer(layer, size, backing="full", compression=compression)
    qemu_img.copy_layer(pushed, layer, size, backing="full", below=[full], compression=compression, doing="x")
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer.path, raw], check=True)
    content = raw.read_bytes()
    assert content[:65536] == b"\3" * 65536
    assert content[SIZE:] == b"\7" * tail


def test_what_is_copied_over_something_is_flushed_in_the_order_that_a_power_cut_needs(monkeypatch) -> None:
    """qemu-img's convert flushes nothing by default."""
    asked: list[list[str]] = []
    monkeypatch.setattr(qemu_img, "run", lambda arguments, **_options: asked.append(arguments))
    for over in (True, False):
        qemu_img.copy_layer(Image("/a"), Image("/b"), SIZE, backing="c", over=over, doing="x")
    into, fresh = asked
    assert into[into.index("-t") + 1] == "writeback"
    assert "-t" not in fresh


@needs_qemu
def test_a_wrong_passphrase_is_told_from_a_right_one(tmp_path: Path) -> None:
    image = Image(str(tmp_path / "i"), "qcow2", KEY)
    qemu_img.create_layer(image, SIZE, milliseconds=10)
    assert os.stat(image.path).st_mode & 0o777 == 0o600
    assert qemu_img.opens(image)
    assert not qemu_img.opens(Image(image.path, "qcow2", Passphrase(b"incorrect horse")))
    (tmp_path / "i").write_bytes(b"")
    with pytest.raises(qemu_img.ImageToolFailed):
        qemu_img.opens(image)
