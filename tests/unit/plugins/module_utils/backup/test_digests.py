# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import digests
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.digests import CHUNK, Extent, Sums


def hex_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_layer_over_another_gives_the_chains_digests() -> None:
    below = Sums(4 * CHUNK, True, {0: "a", 1: "b", 3: "d"})
    above = Sums(4 * CHUNK, False, {1: "B", 2: "C"})
    assert above.over(below) == Sums(4 * CHUNK, True, {0: "a", 1: "B", 2: "C", 3: "d"})
    full = Sums(CHUNK, True, {})
    assert full.over(below) is full


def test_chunks_are_put_together_from_layers_and_zeros(tmp_path: Path) -> None:
    top, base = tmp_path / "top", tmp_path / "base"
    top.write_bytes(b"T" * 65536)
    base.write_bytes(b"B" * CHUNK)
    size = CHUNK + 100
    extents = [
        Extent(0, 65536, 1, 0),
        Extent(65536, 65536, 0, 0),
        Extent(131072, CHUNK - 131072, 1, None),
        Extent(CHUNK, 100, 0, None),
    ]
    sums = digests.sums_of(digests.Files([str(top), str(base)]), extents, size, complete=False)
    expected = b"B" * 65536 + b"T" * 65536 + bytes(CHUNK - 131072)
    assert sums.chunks == {0: hex_of(expected), 1: hex_of(bytes(100))}
    full = digests.sums_of(digests.Files([str(top), str(base)]), extents, size, complete=True)
    assert full.chunks == {0: hex_of(expected)}
    assert digests.differences(full, digests.Files([str(top), str(base)]), extents) == []
    base.write_bytes(b"X" + b"B" * (CHUNK - 1))
    assert digests.differences(full, digests.Files([str(top), str(base)]), extents) == [0]


def test_data_where_zeros_should_be_is_a_difference(tmp_path: Path) -> None:
    image = tmp_path / "i"
    image.write_bytes(b"x" * 65536)
    assert digests.differences(Sums(CHUNK, True, {}), digests.Files([str(image)]), [Extent(0, 65536, 0, 0)]) == [0]


def test_a_sidecar_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    sums = Sums(3 * CHUNK, False, {2: "ff", 0: "00"})
    digests.write_sums(path, sums)
    assert digests.read_sums(path) == sums
    assert os.stat(path).st_mode & 0o777 == 0o600
    Path(path).write_text("nothing")
    with pytest.raises(Refused):
        digests.read_sums(path)


def test_every_byte_that_is_not_guest_data_counts_for_the_metadata(tmp_path: Path) -> None:
    image = tmp_path / "i"
    content = bytearray(os.urandom(4096))
    image.write_bytes(content)
    extents = [Extent(0, 1024, 0, 1024), Extent(1024, 512, 1, 0)]
    before = digests.metadata_digest(str(image), extents)
    for offset, same in ((0, False), (1023, False), (1024, True), (2047, True), (2048, False), (4095, False)):
        content[offset] ^= 1
        image.write_bytes(content)
        assert (digests.metadata_digest(str(image), extents) == before) is same, offset
        content[offset] ^= 1


def test_a_grown_disk_states_the_chunk_at_its_old_end(tmp_path: Path) -> None:
    image = tmp_path / "i"
    image.write_bytes(b"")
    sums = digests.sums_of(digests.Files([str(image)]), [], 2 * CHUNK, complete=False, grown_from=100)
    assert sums.chunks == {0: hex_of(bytes(CHUNK))}
