# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a domain's first screen shows, as PNG.

QEMU gives PNG only from version 7.1 on and where it was built with it; its PPM (binary pixmap, netpbm's P6) is turned
into PNG here, with nothing but zlib.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Any

from .._errors import LibvirtFailed, Unsupported
from .binding import libvirt
from .connection import message_of

PNG = b"\x89PNG\r\n\x1a\n"

#: A screen of 8K in 24 bits is 100 MB.
_LARGEST = 128 << 20
_HEADER = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")


def png_of(image: bytes) -> bytes:
    """A screenshot, PNG or PPM, as PNG; raises :class:`Unsupported` for anything else. Pure."""
    if image.startswith(PNG):
        return image
    header = _HEADER.match(image)
    if header is None:
        raise Unsupported("The screenshot is neither PNG nor PPM")
    width, height = int(header.group(1)), int(header.group(2))
    line = width * 3
    pixels = image[header.end() :]
    if not width or not height or len(pixels) < line * height:
        raise Unsupported("The screenshot is cut short")
    # Every line begins with its filter: none.
    rows = b"".join(b"\0" + pixels[row * line : (row + 1) * line] for row in range(height))
    # Eight bits a sample, colour type 2 (RGB); compression, filter and interlace methods 0.
    facts = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + _chunk(b"IHDR", facts) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def take(domain: Any) -> bytes:
    """A screenshot of the running domain's first screen, as PNG."""
    parts: list[bytes] = []
    size = 0

    def keep(_stream: Any, data: bytes, _opaque: Any) -> int:
        nonlocal size
        size += len(data)
        if size > _LARGEST:
            return -1
        parts.append(data)
        return len(data)

    try:
        stream = domain.connect().newStream(0)
        domain.screenshot(stream, 0, 0)
        stream.recvAll(keep, None)
        stream.finish()
    except (libvirt.libvirtError, RuntimeError) as error:
        raise LibvirtFailed(f"Taking a screenshot of domain {domain.name()!r}: {message_of(error)}") from error
    return png_of(b"".join(parts))
