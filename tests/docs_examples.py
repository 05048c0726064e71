# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find the examples in Markdown pages, so that tests run what readers copy.

A fenced code block is an example when the line just above its fence is a comment that names it:

    <!-- example: first-snapshot -->
    ```yaml
    - name: Take a snapshot
    ```

Readers do not see the comment. A test gets the page's examples and runs the one it knows by name, or
one after another; what runs them (a lab, a playbook around them) is the test's affair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARKER = re.compile(r"^(?P<indent>\s*)<!--\s*example:\s*(?P<name>.*?)\s*-->\s*$")
NAME = re.compile(r"^[a-z0-9][a-z0-9_-]*$")
FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<lang>[^\s`]*)[^`]*$")


@dataclass(frozen=True)
class Example:
    """One named code block."""

    name: str
    lang: str  # what follows the fence, such as "yaml" or "console"; may be empty
    text: str  # without the fences and their indentation; ends with a newline
    line: int  # of its first line of text in the page, from 1


class DocumentationError(ValueError):
    """A page's examples cannot be told apart from its text; says where and why."""


def examples_in(path: Path) -> list[Example]:
    """Return the examples of the Markdown page at `path`, in its order.

    Raises DocumentationError when a marker has no code block or no proper name, a block has no end, or
    a name occurs twice: each would be an example that silently goes untested.
    """
    return examples_of(path.read_text(encoding="utf-8"), str(path))


def examples_of(page: str, source: str) -> list[Example]:
    """Like `examples_in`, for a page's text; `source` is its name in error messages."""
    found: dict[str, Example] = {}
    for example in _scan(page.splitlines(), source):
        if example.name in found:
            raise DocumentationError(
                f"{source}:{example.line}: example '{example.name}' is at line {found[example.name].line} already"
            )
        found[example.name] = example
    return list(found.values())


def _scan(lines: list[str], source: str) -> Iterator[Example]:
    marker: str | None = None  # the name given on the line before
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        fence = FENCE.match(line)
        if marker is not None and not fence:
            raise DocumentationError(f"{source}:{number}: no code block follows the marker of example '{marker}'")
        if fence:
            first = number
            # A fence ends with at least as many of the same characters and nothing after them.
            end = re.compile(rf"^\s*{re.escape(fence['fence'])}{re.escape(fence['fence'][0])}*\s*$")
            while number < len(lines) and not end.match(lines[number]):
                number += 1
            if number == len(lines):
                raise DocumentationError(f"{source}:{first}: this code block has no end")
            if marker is not None:
                block = [text.removeprefix(fence["indent"]) for text in lines[first:number]]
                yield Example(marker, fence["lang"], "".join(f"{text}\n" for text in block), first + 1)
            marker = None
            number += 1
        elif match := MARKER.match(line):
            marker = match["name"]
            if not NAME.match(marker):
                raise DocumentationError(
                    f"{source}:{number}: '{marker}' is no name for an example: use a-z, 0-9, '-' and '_'"
                )
    if marker is not None:
        raise DocumentationError(f"{source}:{number}: no code block follows the marker of example '{marker}'")
