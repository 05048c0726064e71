# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read JSON that a stranger may have written.

Python's own reader takes the last of duplicate keys, numbers of any length, ``NaN``, and nesting as deep as the stack.
Two readers that disagree about one document are how a check is walked around, so everything doubtful is refused here.
"""

from __future__ import annotations

import json
from typing import Any

from .._errors import Refused

#: A manifest of a hundred disks is far below this.
LARGEST = 1 << 20
DEEPEST = 16
LARGEST_NUMBER = (1 << 63) - 1
LONGEST_TEXT = 1 << 16


def read(content: bytes, what: str) -> Any:
    """The value in ``content``; raises :class:`Refused` naming ``what`` for anything that two readers could take differently."""
    if len(content) > LARGEST:
        raise _bad(what, f"it is larger than {LARGEST} bytes")
    _check_depth(content, what)
    try:
        text = content.decode("utf-8")
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: _object(pairs, what),
            parse_int=lambda digits: _integer(digits, what),
            parse_float=lambda digits: _no_float(digits, what),
            parse_constant=lambda name: _no_float(name, what),
        )
    except UnicodeDecodeError as error:
        raise _bad(what, "it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _bad(what, f"it is not JSON: {error}") from error


def _check_depth(content: bytes, what: str) -> None:
    """Brackets outside texts, counted before the parser sees them: it recurses."""
    depth, inside, escaped = 0, False, False
    for byte in content:
        if inside:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in b"[{":
            depth += 1
            if depth > DEEPEST:
                raise _bad(what, f"it is nested deeper than {DEEPEST} levels")
        elif byte in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _bad(what, f"the key {key[:64]!r} is there twice")
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise _bad(what, f"the text of {key[:64]!r} is too long")
        found[key] = value
    return found


def _integer(digits: str, what: str) -> int:
    # The length first: converting a million digits is slow in itself.
    if len(digits) > 20 or not -LARGEST_NUMBER <= int(digits) <= LARGEST_NUMBER:
        raise _bad(what, "a number is out of range")
    return int(digits)


def _no_float(digits: str, what: str) -> int:
    raise _bad(what, f"{digits[:32]} is not a whole number")


def _bad(what: str, why: str) -> Refused:
    return Refused(
        f"{what} is refused: {why}",
        advice="Get the image again from where it was exported, and do not repair it by hand",
    )
