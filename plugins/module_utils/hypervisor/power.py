# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ask guests to shut down, and wait for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from .binding import libvirt
from .connection import explaining

#: How long a guest may take to shut down before a task gives up and leaves it running.
SHUTDOWN_SECONDS = 300.0
_ASK_AGAIN_SECONDS = 15.0

#: How long one waits for a guest that a run which has ended had told to shut down.
LATE_SECONDS = 30.0
_LATE = "It was told to shut down, and may be off."

#: libvirt's reasons for being off that nobody has chosen: what was running before is started again.
ENDED_BY_ITSELF = ("shutdown", "unknown", "crashed", "failed")
_POLL_SECONDS = 0.2


def shut_down(handles: Sequence[Any], *, state: str, seconds: float = SHUTDOWN_SECONDS) -> list[str]:
    """Shut guests down cleanly, all at once; the names of those that still run after ``seconds``.

    ``state`` is what is true of them where libvirt fails, or goes away: they may be on their way down.
    """
    going = [handle for handle in handles if _runs(handle, state)]
    for handle in going:
        with explaining(f"Shutting down domain {handle.name()!r}", state=state):
            _tell(handle)
    give_up = time.monotonic() + seconds
    ask_again = time.monotonic() + _ASK_AGAIN_SECONDS
    while going := [handle for handle in going if _runs(handle, state)]:
        if time.monotonic() >= ask_again:
            # A guest that was only just started does not hear the first press of its power button.
            ask_again = time.monotonic() + _ASK_AGAIN_SECONDS
            for handle in going:
                with contextlib.suppress(libvirt.libvirtError):
                    handle.shutdown()
        if time.monotonic() > give_up:
            return [handle.name() for handle in going]
        time.sleep(_POLL_SECONDS)
    return []


def wait_for_late(handles: Sequence[Any], *, seconds: float = LATE_SECONDS) -> None:
    """Wait until guests that may be shutting down are off, or it takes too long: then they have not heard it."""
    give_up = time.monotonic() + seconds
    while any(_runs(handle, _LATE) for handle in handles) and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS)


def _tell(handle: Any) -> None:
    try:
        handle.shutdown()
    except libvirt.libvirtError:
        # libvirt presses the power button where the agent does not answer, which one that is off already does not.
        if handle.isActive():
            raise


def _runs(handle: Any, state: str) -> bool:
    with explaining(f"Waiting for domain {handle.name()!r} to shut down", state=state):
        return bool(handle.isActive())
