# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible.template import trust_as_template

from ansible_collections.vmkeeper.libvirt.plugins.filter import select as module

DOMAINS = [
    {"name": "web01", "state": "running", "vcpus": {"configured": 4}, "tags": {"tier": "gold"}},
    {"name": "db01", "state": "shutoff", "vcpus": {"configured": 2}, "tags": {}},
]


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("[?state=='running']", ["web01"]),
        ("[?vcpus.configured < `4`].name", ["db01"]),
        ("sort_by(@, &name)", ["db01", "web01"]),
        ("[?starts_with(name, 'web')]", ["web01"]),
        ("[?tags.tier=='gold'] | [0]", ["web01"]),
        ("[?state=='paused']", []),
    ],
)
def test_it_chooses_names(expression: str, names: list[str]) -> None:
    assert module.select(DOMAINS, expression, "name") == names


def test_without_an_attribute_it_is_jmespath() -> None:
    assert module.select({"domains": DOMAINS}, "length(domains)") == 2


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("[?state=", "does not work"),
        ("", "needs a JMESPath expression"),
        ("domains[?state=='running']", "it gave null"),
        ("[].vcpus", 'it gave {"configured": 4}'),
        ("length(@)", "it gave 2"),
        ("[?contains(vcpus, 'x')]", "does not work"),
    ],
)
def test_what_chooses_no_names_is_said(expression: str, problem: str) -> None:
    with pytest.raises(AnsibleFilterError, match="JMESPath") as caught:
        module.select(DOMAINS, expression, "name")
    assert problem in str(caught.value)


def test_without_the_library_it_says_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "jmespath", None)
    with pytest.raises(AnsibleFilterError, match="jmespath on the controller"):
        module.select(DOMAINS, "[]")


def test_ansibles_own_types_are_understood() -> None:
    # JMESPath's functions tell text by the name of its type, which is another one when it comes from a variable.
    tagged = [{"name": trust_as_template(entry["name"])} for entry in DOMAINS]
    assert type(tagged[0]["name"]).__name__ != "str"
    assert module.select(tagged, trust_as_template("[?starts_with(name, 'web')]"), "name") == ["web01"]
