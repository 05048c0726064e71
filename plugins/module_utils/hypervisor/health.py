# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a domain that was started is well: its agent answers, or a command in the guest succeeds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from .._errors import AgentSilent, VmkeeperError
from . import agent
from .domain_model import read_domain

_POLL_SECONDS = 0.2
_COMMAND_SECONDS = 60.0


def wait_until_well(
    handle: Any, command: Sequence[str] | None, seconds: float, *, option: str = "health_command"
) -> str | None:
    """None when it is well within ``seconds``, else what was missing. ``option`` is what the user calls ``command``."""
    give_up = time.monotonic() + seconds
    problem = "its guest agent did not answer"
    while True:
        state = read_domain(handle).state
        if not state.active:
            return f"it stopped ({state.reason})"
        with contextlib.suppress(AgentSilent):
            if state.running and read_domain(handle).agent_connected:
                agent.ask_info(handle)
                if command is None:
                    return None
                problem = _run(handle, command, option, max(1.0, min(_COMMAND_SECONDS, give_up - time.monotonic())))
                if not problem:
                    return None
        if time.monotonic() > give_up:
            return f"{problem} within {seconds:.0f} s"
        time.sleep(_POLL_SECONDS)


def _run(handle: Any, command: Sequence[str], option: str, seconds: float) -> str:
    try:
        done = agent.execute(handle, command, seconds=seconds)
    except VmkeeperError as error:
        return f"{option} did not end well ({error.problem})"
    return "" if done.status == 0 else f"{option} ended with status {done.status} and not with 0"
