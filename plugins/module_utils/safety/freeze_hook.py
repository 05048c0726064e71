# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Did the application really go along with the freeze?

The agent runs freeze hooks but does not report them.  Our documented hook (docs/guides/application-consistency.md) copies a
nonce, which we write before the freeze, into a stamp once every application has been made ready.  Reading the same nonce
back after the thaw proves it; anything else proves nothing.
"""

from __future__ import annotations

import secrets
from typing import Any

from ..hypervisor import agent

HOOK = "/etc/qemu/fsfreeze-hook.d/50-vmkeeper"
#: Files, not a directory: nothing has to be made in the guest at boot. /run is never frozen.
NONCE = "/run/vmkeeper.nonce"
STAMP = "/run/vmkeeper.stamp"


def prepare(domain: Any, info: agent.AgentInfo | None) -> str | None:
    """Leave a fresh nonce for the hook; None when the guest has no such hook or the agent may not use files."""
    if info is None or not info.can_use_files or agent.read_file(domain, HOOK, limit=64) is None:
        return None
    nonce = secrets.token_hex(16)
    return nonce if agent.write_file(domain, NONCE, nonce.encode()) else None


def proved(domain: Any, nonce: str | None) -> bool:
    """Whether the hook stamped this very freeze."""
    if nonce is None:
        return False
    stamp = agent.read_file(domain, STAMP, limit=256)
    return stamp is not None and stamp.strip() == nonce.encode()
