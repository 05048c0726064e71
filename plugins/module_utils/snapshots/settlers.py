# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who finishes or undoes which interrupted operation of this trade."""

from __future__ import annotations

from functools import partial

from ..safety.settlement import Settler
from . import merging, settle, way_back

#: For :func:`..safety.settlement.settle_before_change` and ``recover_domain``.
SETTLERS: dict[str, Settler] = {
    **settle.SETTLERS,
    merging.COMMIT: merging.settle,
    merging.REMOVAL: merging.settle,
    way_back.OPERATION: way_back.settle,
}

#: Kinds of operations that are finished by waiting for a copy, however long that takes.
LONG = (merging.COMMIT, merging.REMOVAL)


def within(seconds: float | None) -> dict[str, Settler]:
    """The same for a task that waits that long for each live job, which goes on all the same; None for no limit."""
    return {**SETTLERS, **dict.fromkeys(LONG, partial(merging.settle, seconds=seconds))}
