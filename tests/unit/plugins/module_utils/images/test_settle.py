# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Busy, VmkeeperError
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import settle


def test_an_error_says_that_undoing_failed_and_nothing_else_of_the_state() -> None:
    def settling(_uri: str, _pending: Any) -> None:
        raise Busy("its file is in use")

    error = VmkeeperError("It failed", state="No image was made.", advice="Run this again")
    settle.undo(settling, "uri", None, error)
    assert str(error) == (
        "It failed. Undoing it failed (its file is in use. Nothing was changed.); the next run goes on with that."
        " Run this again."
    )
    assert error.args == (str(error),)
    assert error.as_result()["state"] == error.state


def test_what_is_undone_leaves_the_error_as_it_was() -> None:
    error = VmkeeperError("It failed", state="No image was made.")
    settle.undo(lambda _uri, _pending: None, "uri", None, error)
    assert str(error) == "It failed. No image was made."
