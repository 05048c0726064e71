# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmkeeper.libvirt.plugins.filter.names import names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("web01, db01", ["web01", "db01"]),
        ("web01,", ["web01"]),
        (" , ,web01", ["web01"]),
        ("web01", ["web01"]),
        ("", []),
        (None, []),
        (["web01", "a, b"], ["web01", "a, b"]),
        ([], []),
    ],
)
def test_names_are_what_stands_between_commas(given: object, expected: list[str]) -> None:
    assert names(given) == expected


@pytest.mark.parametrize("given", [7, {"web01": True}])
def test_anything_else_is_refused(given: object) -> None:
    with pytest.raises(AnsibleFilterError, match="takes a list of names"):
        names(given)
