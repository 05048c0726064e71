# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput, Refused, Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import bundle, oci, registry
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.manifest import (
    ImageDisk,
    Machine,
    Manifest,
    Nvram,
    Source,
)

CONTENT = b"qcow2 or not" * 1000


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.mkdir()
    (path / "vda.qcow2").write_bytes(CONTENT)
    (path / "nvram.fd").write_bytes(b"variables")
    nvram = Nvram("nvram.fd", 9, bundle.sha256_of_bytes(b"variables"))
    disk = ImageDisk(
        "vda", "virtio", "vda.qcow2", "qcow2", "none", 1 << 20, len(CONTENT), 1, bundle.sha256_of_bytes(CONTENT)
    )
    manifest = Manifest(
        "golden", "2026-11-20T20:15:00+00:00", Source("web", "00000000-0000-4000-8000-000000000001", None), "offline",
        None, Machine("x86_64", "q35", "bios", 1, 1 << 30, 0), (disk,), nvram, (), {},
    )  # fmt: skip
    (path / "manifest.json").write_bytes(manifest.to_bytes())
    return path


def build(image: Path, layout: Path | None) -> oci.Blob:
    with bundle.Opened(str(image)) as opened:
        manifest, digest = opened.read_manifest()
        return oci.build(opened, manifest, digest, oci.Layout(str(layout) if layout else None))


def remote_of(layout: Path, blob: oci.Blob) -> oci.Remote:
    return oci.parse_remote((layout / "blobs/sha256" / blob.digest[7:]).read_bytes(), "r")


def test_equal_images_have_equal_digests_written_or_only_summed_up(image: Path, tmp_path: Path) -> None:
    first = build(image, tmp_path / "one")
    os.utime(image / "vda.qcow2", (1, 1))
    assert build(image, None) == first == build(image, tmp_path / "two")


def test_what_was_packed_comes_out_the_same(image: Path, tmp_path: Path) -> None:
    layout, out = tmp_path / "layout", tmp_path / "out"
    blob = build(image, layout)
    out.mkdir()
    oci.unpack(str(layout), remote_of(layout, blob), str(out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in image.iterdir()
    }


def test_a_damaged_file_is_not_packed(image: Path) -> None:
    (image / "vda.qcow2").write_bytes(b"X" + CONTENT[1:])
    with pytest.raises(Refused, match="sha256"):
        build(image, None)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "content",
    [
        archive((member("../../etc/cron.d/x"), b"x")),
        archive((member("/etc/passwd"), b"x")),
        archive((member("disk/vda.qcow2", tarfile.SYMTYPE, "/etc/shadow"), b"")),
        archive((member("disk/vda.qcow2", tarfile.LNKTYPE, "/etc/shadow"), b"")),
        archive((member("disk/vda.qcow2", tarfile.CHRTYPE), b"")),
        archive((member("disk/vda.qcow2", tarfile.FIFOTYPE), b"")),
        archive((member("disk/vda.qcow2"), CONTENT + b"more than promised")),
        archive((member("disk/vda.qcow2"), b"less")),
        archive((member("disk/other"), CONTENT)),
        archive((member("pax", tarfile.XHDTYPE), b"17 path=disk/vda\n"), (member("disk/vda.qcow2"), CONTENT)),
        archive((member("long", tarfile.GNUTYPE_LONGNAME), b"disk/vda.qcow2"), (member("disk/vda.qcow2"), CONTENT)),
        archive(),
        b"no tar at all",
    ],
)
def test_a_layer_with_anything_else_in_it_is_refused(image: Path, tmp_path: Path, content: bytes) -> None:
    layout, out = tmp_path / "layout", tmp_path / "out"
    remote = remote_of(layout, build(image, layout))
    (layout / "blobs/sha256" / remote.layers[0].digest[7:]).write_bytes(content)
    out.mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Refused):
        oci.unpack(str(layout), remote, str(out))
    assert sorted(tmp_path.iterdir()) == before


def test_an_image_of_others_is_told_from_a_broken_one() -> None:
    with pytest.raises(Unsupported, match="lacks our manifest"):
        oci.parse_remote(b'{"schemaVersion": 2, "layers": []}', "r")
    value = {"annotations": {oci.ANNOTATION: "sha256:" + "a" * 64}, "layers": [{"size": -1}] * 2}
    with pytest.raises(Refused):
        oci.parse_remote(json.dumps(value).encode(), "r")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("registry.example.com/a/b:v1", "registry.example.com/a/b:v1"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
        ("localhost/a@sha256:" + "a" * 64, "localhost/a@sha256:" + "a" * 64),
    ],
)
def test_a_reference_is_understood(text: str, shown: str) -> None:
    assert str(oci.parse_reference(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["busybox", "library/busybox", "r.example.com/", "r.example.com/A", "r.example.com/a b", "-x.com/a", "r.com/a\n"],
)
def test_a_reference_without_its_registry_or_with_anything_odd_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        oci.parse_reference(text)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("x509: certificate signed by unknown authority", "ca_cert"),
        ("unauthorized: authentication required", "password"),
        ("dial tcp: connection refused", "reaches"),
        ("http: server gave HTTP response to HTTPS client", "TLS"),
        ("something else", "again"),
    ],
)
def test_what_a_registry_says_is_turned_into_advice(said: str, word: str) -> None:
    assert word in registry.advice_for(said)
