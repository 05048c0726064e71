# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""One task on whichever libvirt and Python this host has."""

from __future__ import annotations

from typing import Any

from lab.ansible import Result, run_module


def ok(module: str, **arguments: Any) -> Result:
    """What a task answers that must not fail."""
    result = run_module(module, **arguments)
    assert not result["failed"], (result["msg"], result.get("exception"))
    return result
