# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import strict_json


def test_a_plain_document_is_read() -> None:
    assert strict_json.read(b'{"a": [1, "x", null, true]}', "it") == {"a": [1, "x", None, True]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"x": {"a": 1, "a": 2}}', "twice"),
        (b"[" * 17 + b"]" * 17, "nested deeper"),
        (b"[" * 1_000_000, "nested deeper"),
        (b"9" * 21, "out of range"),
        (b"9223372036854775808", "out of range"),
        (b"1.5", "whole number"),
        (b"1e3", "whole number"),
        (b"NaN", "whole number"),
        (b"-Infinity", "whole number"),
        (b"\xff", "UTF-8"),
        (b"{} {}", "not JSON"),
        (b"", "not JSON"),
        (b" " * (strict_json.LARGEST + 1), "larger than"),
        (b'{"a": "' + b"x" * (strict_json.LONGEST_TEXT + 1) + b'"}', "too long"),
    ],
)
def test_what_two_readers_could_take_differently_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(Refused, match=why):
        strict_json.read(content, "it")


def test_brackets_in_texts_are_no_nesting() -> None:
    assert strict_json.read(b'"' + b'[\\"' * 100 + b'"', "it") == '["' * 100
