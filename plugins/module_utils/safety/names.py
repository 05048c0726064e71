# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names, sizes, durations and tags from a task, checked before they become paths, XML or numbers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from .._errors import InvalidInput

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@=-]{0,99}")
_UNSAFE_IN_FILE = re.compile(r"[^A-Za-z0-9._+@=-]")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, None: 1.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?B)?", re.IGNORECASE)
_SIZE_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}

#: What cannot be in XML 1.0 text.
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

#: NAME_MAX of the filesystems in use is 255 bytes; room is left for a suffix.
_LONGEST_FILE_NAME = 200


def check_name(value: str, what: str = "name") -> str:
    """A name that may become part of a path and of XML."""
    if not _NAME.fullmatch(value):
        raise InvalidInput(
            f"{what} {value!r} is not a safe name",
            advice="Use up to 100 letters, digits and . _ + @ = -, beginning with a letter or a digit",
        )
    return value


def check_text(value: str, what: str, *, limit: int = 4096) -> str:
    """Free text that is stored in XML."""
    if len(value) > limit or _NOT_XML.search(value):
        raise InvalidInput(
            f"{what} cannot be stored", advice=f"Use at most {limit} characters, without control characters"
        )
    return value


def check_tags(value: Mapping[str, Any] | str | None) -> dict[str, str] | None:
    """Tags as ``{name: text}``; a JSON object in a string is accepted, as AWX surveys send it. None when not given."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InvalidInput(
                f"tags is not a dictionary: {value!r}",
                advice='Use a dictionary, or JSON such as {"app": "web"}',
            ) from error
    if not isinstance(value, Mapping):
        raise InvalidInput(
            f"tags is not a dictionary: {value!r}", advice='Use a dictionary, or JSON such as {"app": "web"}'
        )
    tags: dict[str, str] = {}
    for key, content in value.items():
        if isinstance(content, (dict, list)):
            raise InvalidInput(f"tag {key!r} is not a text", advice="Tags are a flat dictionary of texts")
        text = str(content).lower() if isinstance(content, bool) else str(content)
        tags[check_name(str(key), "tag")] = check_text(text, f"tag {key!r}", limit=1024)
    return tags


def parse_duration(value: str | float, what: str) -> float:
    """``12h``, ``90s``, ``500ms`` or a plain number of seconds, as seconds."""
    match = _DURATION.fullmatch(str(value).strip())
    if not match:
        raise InvalidInput(
            f"{what} {value!r} is not a duration",
            advice="Use seconds, or a number with ms, s, m, h, d or w such as 90s",
        )
    return float(match.group(1)) * _SECONDS[match.group(2)]


def parse_size(value: str | int, what: str) -> int:
    """``4G``, ``512M`` (powers of 1024) or a plain number of bytes, as bytes."""
    match = _SIZE.fullmatch(str(value).strip())
    if not match:
        raise InvalidInput(
            f"{what} {value!r} is not a size", advice="Use bytes, or a number with K, M, G or T such as 4G"
        )
    return int(float(match.group(1)) * _SIZE_FACTOR[match.group(2).upper()])


def file_stem(*parts: str) -> str:
    """A file name made of ``parts`` that a person recognises: unsafe characters replaced, length bounded.

    A shortened or altered name carries a digest of the original, so that two different names never meet.
    """
    original = ".".join(parts)
    stem = _UNSAFE_IN_FILE.sub("_", original).lstrip(".-") or "_"
    if stem != original or len(stem) > _LONGEST_FILE_NAME:
        digest = hashlib.sha256(original.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        stem = f"{stem[:_LONGEST_FILE_NAME]}-{digest}"
    return stem


def check_directory(value: str, what: str = "directory") -> str:
    """An existing directory, by an absolute path, as a canonical path."""
    if not os.path.isabs(value):
        raise InvalidInput(f"{what} {value!r} is not an absolute path", advice="Give the whole path on the hypervisor")
    if not os.path.isdir(value):
        raise InvalidInput(
            f"{what} {value!r} is not a directory on the hypervisor",
            advice="Make it first, or mount what belongs there",
        )
    return os.path.realpath(value)
