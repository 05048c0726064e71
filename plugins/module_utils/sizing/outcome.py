# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the guest took a change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

#: How long a guest may take to bring online, or give back, what it was asked to. Polled: mostly it takes a moment.
GUEST_SECONDS = 60.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """``guest_sees`` is the guest's own number, None where it does not tell (``note`` says why).

    ``taken`` is False when the guest, or QEMU, did not get to what was asked; ``altered`` when all is as it was before.
    """

    guest_sees: int | None
    taken: bool = True
    note: str = ""
    altered: bool = True


def wait_for(condition: Callable[[], bool], seconds: float = GUEST_SECONDS) -> bool:
    """Poll until the condition holds; False when it does not within ``seconds``."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(_POLL_SECONDS)
    return True
