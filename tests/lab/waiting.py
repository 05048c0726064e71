# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Polling with a deadline, so that no test sleeps a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 180.0
"""Default deadline in seconds: generous, since emulated guests share the machine with other work."""


def until(condition: Callable[[], T], what: str, timeout: float = PATIENCE, interval: float = 0.05) -> T:
    """Call ``condition`` every ``interval`` seconds until it returns something true, and return that.

    Raises TimeoutError naming ``what`` after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout:.0f} s")
        time.sleep(interval)
