# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import importlib
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError

from ansible_collections.vmkeeper.libvirt.plugins.plugin_utils.answers import answer, names, structure, words


@pytest.mark.parametrize("name", ["answer", "names", "structure", "words"])
def test_each_is_a_filter_of_that_name(name: str) -> None:
    module = importlib.import_module(f"ansible_collections.vmkeeper.libvirt.plugins.filter.{name}")
    assert yaml.safe_load(module.DOCUMENTATION)["name"] == name
    assert list(module.FilterModule().filters()) == [name]


@pytest.mark.parametrize("nothing", ["", "  ", None])
def test_an_open_question_has_the_default(nothing: str | None) -> None:
    assert answer(nothing, True) is True
    assert structure(nothing, {"last": 7}) == {"last": 7}
    assert words(nothing) == names(nothing) == structure(nothing, []) == []


@pytest.mark.parametrize("said", [0, False, "0", "false", "no", [], {}])
def test_what_is_said_stays_what_it_is(said: Any) -> None:
    assert answer(said, "default") is said


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("web01, db01", ["web01", "db01"]),
        ("web01,", ["web01"]),
        (" , ,web01", ["web01"]),
        ("web01", ["web01"]),
        (["web01", "a, b"], ["web01", "a, b"]),
        ([], []),
    ],
)
def test_names_are_what_stands_between_commas(given: object, expected: list[str]) -> None:
    assert names(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("systemctl is-active nginx", ["systemctl", "is-active", "nginx"]),
        (' ["sh", "-c", "test -e /srv/data"]', ["sh", "-c", "test -e /srv/data"]),
        (["test", "-e", "/srv/my data"], ["test", "-e", "/srv/my data"]),
        ([], []),
    ],
)
def test_words_stand_between_blanks_or_in_a_json_list(given: object, expected: list[str]) -> None:
    assert words(given) == expected


@pytest.mark.parametrize(
    ("given", "default", "expected"),
    [
        ('{"daily": 7}', {}, {"daily": 7}),
        ({"daily": 7}, {}, {"daily": 7}),
        ({}, {"last": 7}, {}),
        ('[{"target": "vda"}]', [], [{"target": "vda"}]),
        (["vda"], [], ["vda"]),
    ],
)
def test_a_structure_is_itself_or_its_json(given: object, default: Any, expected: Any) -> None:
    assert structure(given, default) == expected


@pytest.mark.parametrize("given", [7, {"web01": True}])
def test_anything_else_is_no_list(given: object) -> None:
    with pytest.raises(AnsibleFilterError, match="takes a list of names"):
        names(given)
    with pytest.raises(AnsibleFilterError, match="takes a list of words"):
        words(given)


@pytest.mark.parametrize(
    ("given", "default", "said"),
    [
        ("daily=7", {}, "A dictionary as JSON is wanted, not 'daily=7': Expecting value"),
        ("[]", {}, r"A dictionary is wanted, not '\[\]'"),
        ('{"target": "vda"}', [], "A list is wanted"),
        ("7", [], "A list is wanted, not '7'"),
        (7, {}, "A dictionary is wanted, not 7"),
    ],
)
def test_another_kind_is_refused_and_shown(given: object, default: Any, said: str) -> None:
    with pytest.raises(AnsibleFilterError, match=said):
        structure(given, default)


def test_a_command_that_begins_as_a_json_list_must_be_one() -> None:
    with pytest.raises(AnsibleFilterError, match="A list as JSON is wanted"):
        words('["sh", "-c"')
