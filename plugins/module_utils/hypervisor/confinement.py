# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Limits for a program that works on an image from outside."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Confinement:
    """As whom the program runs, and how much it may take (bytes, CPU seconds)."""

    uid: int
    gid: int
    file_size: int
    memory: int = 2 << 30
    cpu_seconds: int = 24 * 3600
    open_files: int = 64

    def apply(self) -> None:
        """Called in the child, before the program."""
        for what, limit in (
            (resource.RLIMIT_FSIZE, self.file_size),
            (resource.RLIMIT_AS, self.memory),
            (resource.RLIMIT_CPU, self.cpu_seconds),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (limit, limit))
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(self.gid)
            os.setuid(self.uid)
