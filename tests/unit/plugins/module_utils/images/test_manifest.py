# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused, Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import manifest
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.manifest import (
    ImageDisk,
    Machine,
    Manifest,
    Source,
)

DISK = ImageDisk("vda", "virtio", "vda.qcow2", "qcow2", "zstd", 1 << 30, 4096, 8192, "a" * 64, "lab-vda")
MANIFEST = Manifest(
    name="golden",
    created="2026-11-20T20:15:00+00:00",
    source=Source("web01", "00000000-0000-4000-8000-000000000001", None),
    consistency="filesystem",
    frozen_ms=12,
    machine=Machine("x86_64", "q35", "bios", 2, 1 << 30, 1),
    disks=(DISK,),
    nvram=None,
    not_captured=({"kind": "tpm", "name": "tpm", "reason": "tpm", "why": "TPM state is not part of it"},),
    tags={"app": "web"},
)


def spoiled(*path: Any, value: Any) -> bytes:
    content = copy.deepcopy(json.loads(MANIFEST.to_bytes()))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(content).encode()


def test_what_is_written_is_read_back_the_same() -> None:
    assert manifest.parse(MANIFEST.to_bytes()) == MANIFEST


def test_every_key_is_needed() -> None:
    for key in json.loads(MANIFEST.to_bytes()):
        content = json.loads(MANIFEST.to_bytes())
        del content[key]
        with pytest.raises(Refused, match=key):
            manifest.parse(json.dumps(content).encode())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"),
        (("name",), "../x"),
        (("created",), "now"),
        (("consistency",), "perfect"),
        (("frozen_ms",), -1),
        (("frozen_ms",), True),
        (("more",), 1),
        (("source", "uuid"), "x"),
        (("source", "domain"), "a\u0000b"),
        (("machine", "family"), "microvm'/>"),
        (("machine", "vcpus"), 0),
        (("disks", 0, "encryption"), "aes"),
        (("disks", 0, "encryption"), "luks"),  # of a disk that is compressed
        (("disks", 0, "unsealed_sha256"), "x"),
        (("sealed",), ["../x"]),
        (("sealed",), [1]),
        (("machine", "vcpus"), "2"),
        (("machine", "memory"), 1 << 60),
        (("machine", "arch"), "x86_64\n"),
        (("machine", "emulator"), "/bin/sh"),
        (("disks",), []),
        (("disks",), {}),
        (("disks", 0, "file"), "/etc/shadow"),
        (("disks", 0, "file"), "../vda.qcow2"),
        (("disks", 0, "file"), "vdb.qcow2"),
        (("disks", 0, "file"), "vda.raw"),
        (("disks", 0, "target"), "vda\n"),
        (("disks", 0, "format"), "luks"),
        (("disks", 0, "bus"), "nbd"),
        (("disks", 0, "virtual_size"), 513),
        (("disks", 0, "virtual_size"), manifest.LARGEST_DISK + 512),
        (("disks", 0, "stored_size"), -1),
        (("disks", 0, "sha256"), "A" * 64),
        (("disks", 0, "backing"), "x"),
        (("disks", 0, "serial"), "a b"),
        (("disks", 0, "serial"), "x'/>"),
        (("nvram",), {"file": "../x", "size": 1, "sha256": "a" * 64}),
        (("not_captured",), [{"kind": "x"}]),
        (("tags",), {"a": {}}),
        (("tags",), {"../": "x"}),
    ],
)
def test_anything_out_of_the_ordinary_is_refused(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(Refused):
        manifest.parse(spoiled(*path, value=value))


def test_two_disks_of_one_name_are_refused() -> None:
    with pytest.raises(Refused, match="same name"):
        manifest.parse(spoiled("disks", value=[DISK.as_json(), DISK.as_json()]))


def test_a_later_version_is_told_from_a_broken_one() -> None:
    with pytest.raises(Unsupported, match="version 2"):
        manifest.parse(spoiled("version", value=2))
