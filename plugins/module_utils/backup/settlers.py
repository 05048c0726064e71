# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who finishes or undoes which interrupted operation of this trade."""

from __future__ import annotations

from ..safety.settlement import Settler
from . import boot_proof, instant_restore, settle

#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS: dict[str, Settler] = {
    **settle.SETTLERS,
    instant_restore.KIND: instant_restore.settle_instant,
    boot_proof.KIND: boot_proof.settle_proof,
}
