# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One domain after the other, each by facts of its own time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import UNCHANGED, Busy
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.turns import in_turn


@dataclass(frozen=True)
class Handle:
    called: str

    def name(self) -> str:
        return self.called


WEB, DB, MAIL = Handle("web"), Handle("db"), Handle("mail")


def test_the_first_uses_the_facts_that_were_checked_and_the_others_read_them_anew() -> None:
    done = in_turn(
        [WEB, DB, MAIL],
        ["checked"] * 3,
        lambda handle, facts: f"{handle.called} {facts}",
        read=lambda handle: "anew",
    )

    assert done == ["web checked", "db anew", "mail anew"]


def fail_on(one: Handle, state: str) -> Busy:
    """The failure of ``one``, as it comes out."""

    def run(handle: Handle, facts: str) -> str:
        if handle is one:
            raise Busy("a job", state=state)
        return handle.called

    with pytest.raises(Busy) as failed:
        in_turn([WEB, DB, MAIL], [""] * 3, run, read=lambda handle: "", tell=lambda done: {"done": list(done)})
    return failed.value


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (UNCHANGED, "Nothing was changed on this one. What was done on web, db before stays."),
        ("The guest runs on its overlay.", "The guest runs on its overlay. What was done on web, db before stays."),
        ("It is off", "It is off. What was done on web, db before stays."),
        ("", "What was done on web, db before stays."),
    ],
)
def test_a_failure_says_what_was_done_on_those_before_whatever_happened_to_its_own_domain(
    state: str, said: str
) -> None:
    failed = fail_on(MAIL, state)
    assert failed.state == said
    assert said in str(failed)
    assert failed.facts["done"] == ["web", "db"]


def test_the_failure_of_the_first_speaks_of_no_other() -> None:
    failed = fail_on(WEB, UNCHANGED)
    assert failed.state == UNCHANGED
    assert failed.facts["done"] == []
