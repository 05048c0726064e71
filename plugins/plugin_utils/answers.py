# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers of surveys, which arrive as text whatever is meant: the filters ``answer``, ``names``, ``structure`` and ``words``.

What each takes for what is in its documentation (``ansible-doc -t filter vmkeeper.libvirt.names``, and so on).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleFilterError


def answer(given: Any, default: Any) -> Any:
    """What is ``given``, or ``default`` where a question was left open."""
    return default if _says_nothing(given) else given


def names(given: Any) -> list[Any]:
    """The names between commas."""
    if isinstance(given, str):
        return [name.strip() for name in given.split(",") if name.strip()]
    return _listed(given, "names", "text with commas between them")


def words(given: Any) -> list[Any]:
    """The words between blanks, or those of a JSON list."""
    if isinstance(given, str):
        return structure(given, []) if given.lstrip().startswith("[") else given.split()
    return _listed(given, "words", "text with blanks between them, or a JSON list")


def structure(given: Any, default: Any) -> Any:
    """The list or dictionary, whichever ``default`` is, that is ``given`` as itself or as JSON."""
    if _says_nothing(given):
        return default
    kind, accepted = ("dictionary", Mapping) if isinstance(default, Mapping) else ("list", (list, tuple))
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise AnsibleFilterError(f"A {kind} as JSON is wanted, not {given!r:.200}: {error}") from error
    if not isinstance(found, accepted):
        raise AnsibleFilterError(f"A {kind} is wanted, not {given!r:.200}")
    return found


def _says_nothing(given: Any) -> bool:
    return given is None or (isinstance(given, str) and not given.strip())


def _listed(given: Any, what: str, text: str) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, (list, tuple)):
        return list(given)
    raise AnsibleFilterError(f"vmkeeper.libvirt.{what} takes a list of {what}, or {text}, not {given!r}")
