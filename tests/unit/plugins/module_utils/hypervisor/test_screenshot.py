# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Pictures of screens."""

from __future__ import annotations

import struct
import zlib

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.screenshot import PNG, png_of

PIXELS = bytes(range(3 * 2 * 3))  # three wide, two high


def chunks(png: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG by kind, each checked."""
    found, position = {}, len(PNG)
    while position < len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        body = png[position + 8 : position + 8 + length]
        assert struct.unpack(">I", png[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        found[kind] = body
        position += 12 + length
    return found


def test_a_pixmap_becomes_a_png_of_the_same_pixels() -> None:
    png = png_of(b"P6\n3 2\n255\n" + PIXELS)
    assert png.startswith(PNG)
    found = chunks(png)
    assert list(found) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", found[b"IHDR"]) == (3, 2, 8, 2, 0, 0, 0)
    assert zlib.decompress(found[b"IDAT"]) == b"\0" + PIXELS[:9] + b"\0" + PIXELS[9:]


def test_a_png_stays_as_it_is() -> None:
    assert png_of(PNG + b"rest") == PNG + b"rest"


@pytest.mark.parametrize(
    "image", [b"", b"P5\n3 2\n255\n" + PIXELS, b"P6\n3 2\n65535\n" + PIXELS, b"P6\n3 2\n255\n" + PIXELS[:-1]]
)
def test_anything_else_is_refused(image: bytes) -> None:
    with pytest.raises(Unsupported):
        png_of(image)
