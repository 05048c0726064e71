# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The libvirt bindings, or None where this interpreter lacks them.

``_module`` respawns into an interpreter that has them, or says what to install; nothing else needs to look.
"""

from __future__ import annotations

try:
    import libvirt
    import libvirt_qemu
except ImportError:
    libvirt = None
    libvirt_qemu = None

__all__ = ["libvirt", "libvirt_qemu"]
