# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one way to thaw a guest: call, then ask; believe only the answer."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from .._errors import VmkeeperError
from ..hypervisor import agent
from ..hypervisor.binding import libvirt
from ..hypervisor.domain_model import DomainState

#: An agent that answers and says ``frozen`` is asked again: a thaw can fail once (a hook, a busy filesystem).
_RETRIES = 2


def thaw(handle: Any, *, times: int = 1) -> tuple[bool, float]:
    """Thaw and prove it; returns whether the agent says ``thawed`` (or the domain has stopped), and when the calls ended.

    ``times`` is 2 after a freeze that failed or timed out: it may have frozen all the same, and the first thaw may meet
    the agent still at it.  An agent that is silent costs at most ``(times + 1) * agent.PROMPT_SECONDS``; raises nothing.
    """
    with contextlib.suppress(VmkeeperError):
        agent.set_response_timeout(handle, agent.PROMPT_SECONDS)
    ended = time.monotonic()
    for number in range(1, times + _RETRIES + 1):
        with contextlib.suppress(libvirt.libvirtError):
            handle.fsThaw()
        ended = time.monotonic()
        if number < times:
            continue
        try:
            if not agent.is_frozen(handle):
                return True, ended
        except VmkeeperError:
            return not _runs(handle), ended
    return False, ended


def comes_back_frozen(state: DomainState, *, managed_save: bool) -> bool:
    """Whether a domain whose guest was frozen, and that runs no more, takes the freeze along into its next run. Pure.

    The agent's state is memory, and what is saved is restored.  libvirt forgets, when its daemon restarts, that a domain was
    saved to a file (``virsh save``); of its own managed save it always knows.
    """
    return not state.active and (managed_save or state.reason == "saved")


def _runs(handle: Any) -> bool:
    try:
        return bool(handle.isActive())
    except libvirt.libvirtError:
        return True
