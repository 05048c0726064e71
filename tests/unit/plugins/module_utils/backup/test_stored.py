# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Passphrases as options, and which layers of a chain need one."""

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import stored
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.manifest import LUKS, Point, StoredDisk
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import Repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import Passphrase

UUID = "8b2f4a3e-0000-4000-8000-000000000001"
KEY = Passphrase(b"correct horse")
REPOSITORY = Repository("/srv", UUID)


def point(encryption: dict | None) -> Point:
    disk = StoredDisk("vda", "full", "first", None, 1, 1, 1, encryption=encryption)
    identifier = "20261120T201500Z-7f3a"
    return Point(identifier, 1, "web", UUID, "2026-11-20T20:15:00+00:00", "full", "first", None, "crash", (disk,))


def test_a_passphrase_is_taken_as_it_is() -> None:
    assert image_node.passphrase_option(None, "passphrase") is None
    assert image_node.new_passphrase_option(None, "passphrase") is None
    assert image_node.new_passphrase_option(" pässword ", "passphrase") == Passphrase(" pässword ".encode())


@pytest.mark.parametrize("value", ["pw", "pw\n", " pässword ", "two\r\nlines"])
def test_what_a_libvirt_secret_holds_opens_what_it_has_encrypted(value: str) -> None:
    assert image_node.passphrase_option(value, "passphrase") == Passphrase(value.encode())


@pytest.mark.parametrize("value", ["", "1234567", "12345678\n", "12345678\r", "1234\x005678"])
def test_a_passphrase_that_would_not_be_typed_again_is_refused_without_telling_it(value: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        image_node.new_passphrase_option(value, "encryption.passphrase")
    assert not value or value not in str(refused.value)
    with pytest.raises(InvalidInput, match="empty"):
        image_node.passphrase_option("", "passphrase")


def test_a_line_break_that_does_not_belong_to_a_passphrase_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored.qemu_img, "opens", lambda _image: False)
    for value, said in (
        (b"correct\n", "ends with a line break, does not open"),
        (b"correct", "passphrase does not open"),
    ):
        with pytest.raises(InvalidInput, match=said):
            stored.require_opening(REPOSITORY, point(dict(LUKS)), ["vda"], Passphrase(value), advice="")


def test_only_encrypted_layers_get_the_passphrase() -> None:
    closed, plain = point(dict(LUKS)), point(None)
    layers = stored.images_of(REPOSITORY, [closed, plain], "vda", KEY)
    assert [layer.passphrase for layer in layers] == [KEY, None]
    assert stored.is_encrypted([plain, closed], "vda")
    assert not stored.is_encrypted([plain], "vda")
    with pytest.raises(InvalidInput, match="encrypted"):
        stored.images_of(REPOSITORY, [plain, closed], "vda", None)
