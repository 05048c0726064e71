# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

import json

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused, Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import manifest
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.manifest import Point, SourceLayer, StoredDisk

UUID = "8b2f4a3e-0000-4000-8000-000000000001"
ID = "20261120T201500Z-7f3a"


def sample(**changes) -> Point:
    disk = StoredDisk(
        "vda", "full", "first", None, 1 << 20, 70000, 65536, "ab", "qcow2", (SourceLayer("/i", "qcow2", 5, 1 << 20),)
    )
    fields = {"id": ID, "sequence": 1, "domain": "web", "domain_uuid": UUID, "created": "2026-11-20T20:15:00+00:00"}
    fields |= {
        "type": "full",
        "reason": "first",
        "parent": None,
        "consistency": "filesystem",
        "disks": (disk,),
        "tags": {"a": "b"},
    }
    return Point(**{**fields, **changes})


def test_what_is_written_is_read_back() -> None:
    point = sample(group=(ID,), not_captured=({"kind": "tpm", "name": "tpm", "reason": "tpm", "why": "x"},))
    assert manifest.from_json(json.loads(json.dumps(manifest.to_json(point))), "m") == point


def test_any_changed_byte_is_noticed() -> None:
    text = json.dumps(manifest.to_json(sample()))
    content = json.loads(text.replace('"web"', '"wab"'))
    with pytest.raises(Refused, match="digest"):
        manifest.from_json(content, "m")


def test_a_newer_format_is_told_from_damage() -> None:
    with pytest.raises(Unsupported, match="newer version"):
        manifest.from_json({"format": 2}, "m")
    with pytest.raises(Refused):
        manifest.from_json([], "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../../etc"},
        {"domain_uuid": "../x"},
        {"parent": "x/y"},
        {"created": "yesterday"},
        {"nvram": "../../x"},
        {"disks": (StoredDisk("../vda", "full", "first", None, 1, 1, 1),)},
        {"disks": (StoredDisk("vda", "full", "first", None, 1, 1, 1, compression="lzma"),)},
        {"disks": (StoredDisk("vda", "full", "first", None, 1, 1, 1, encryption={"format": "rot13"}),)},
        {"disks": (StoredDisk("vda", "incremental", "proved", "../..", 1, 1, 1),)},
        {"disks": (StoredDisk("vda", "incremental", "proved", None, 1, 1, 1),)},
    ],
)
def test_no_name_in_it_becomes_a_path_unchecked(changes) -> None:
    with pytest.raises(Refused):
        manifest.from_json(json.loads(json.dumps(manifest.to_json(sample(**changes)))), "m")
