# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One domain after the other: each by facts of its own time, and a failure that tells of those before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from .._errors import UNCHANGED, VmkeeperError

_Facts = TypeVar("_Facts")
_Result = TypeVar("_Result")


def in_turn(
    handles: Sequence[Any],
    known: Sequence[_Facts],
    run: Callable[[Any, _Facts], _Result],
    *,
    read: Callable[[Any], _Facts],
    tell: Callable[[Sequence[_Result]], Mapping[str, Any]] | None = None,
) -> list[_Result]:
    """Run one domain after the other, from the second on by facts read anew: those before it may have taken hours.

    A failure says which domains were worked on before, and has what ``tell`` makes of their results among its facts.
    """
    done: list[_Result] = []
    for handle, facts in zip(handles, known):
        with _after([one.name() for one in handles[: len(done)]], tell(done) if tell is not None else {}):
            done.append(run(handle, read(handle) if done else facts))
    return done


@contextlib.contextmanager
def _after(domains: Sequence[str], told: Mapping[str, Any]) -> Iterator[None]:
    """Say of a domain's failure that others of the same task were worked on before it."""
    try:
        yield
    except VmkeeperError as error:
        error.facts.update(told)
        if domains:
            state = "Nothing was changed on this one" if error.state == UNCHANGED else error.state.rstrip(".")
            stays = f"What was done on {', '.join(domains)} before stays."
            error.now(f"{state}. {stays}" if state else stays)
        raise
