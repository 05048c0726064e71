# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""On which hosts the playbooks run, and with which arguments their modules, whatever a survey has sent or left empty."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.vmkeeper.libvirt.tests.unit.templating import OMIT, templated

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = {path.stem: yaml.safe_load(path.read_text())[0] for path in sorted((ROOT / "playbooks").glob("*.yml"))}
EVERYWHERE = ("backup", "restore")
"""These were run on all hosts before they knew ``target``, and took ``hosts`` then."""


def passed(value: Any, **variables: Any) -> Any:
    """The value as Ansible sees it with these variables; an argument that is left out is missing, an undefined one an error."""
    if isinstance(value, dict):
        found = {name: templated(entry, variables) for name, entry in value.items()}
        return {name: entry for name, entry in found.items() if entry != OMIT}
    return templated(value, variables)


def task(playbook: str, module: str) -> dict[str, Any]:
    """The arguments that the playbook gives to the module."""
    (found,) = [one[module] for one in PLAYBOOKS[playbook]["tasks"] if module in one]
    return found


@pytest.mark.parametrize("name", PLAYBOOKS)
def test_every_playbook_takes_target_and_an_empty_one_is_the_default(name: str) -> None:
    hosts = PLAYBOOKS[name]["hosts"]
    usual = "all" if name in EVERYWHERE else "hypervisors"
    assert passed(hosts, target="kvm01") == "kvm01"
    assert [passed(hosts), passed(hosts, target=""), passed(hosts, target=None)] == [usual] * 3


@pytest.mark.parametrize("name", EVERYWHERE)
def test_hosts_still_stands_in_for_target(name: str) -> None:
    hosts = PLAYBOOKS[name]["hosts"]
    assert passed(hosts, hosts="kvm02") == passed(hosts, hosts="kvm02", target="") == "kvm02"
    assert passed(hosts, hosts="kvm02", target="kvm01") == "kvm01"


@pytest.mark.parametrize("name", PLAYBOOKS)
def test_an_empty_serial_is_the_default(name: str) -> None:
    serial = PLAYBOOKS[name].get("serial", "100%")
    empty = {"batch": "", "scale_serial": ""}
    assert passed(serial, **empty) == passed(serial) == (1 if name == "scale" else "100%")


@pytest.mark.parametrize("name", ["launch", "restore"])
def test_what_must_be_there_once_is_made_by_one_host(name: str) -> None:
    first = PLAYBOOKS[name]["tasks"][0]
    assert first["ansible.builtin.assert"]["that"] == "ansible_play_hosts_all | length == 1"
    assert first["run_once"] is True, "no host may go on alone"
    said = passed(first["ansible.builtin.assert"]["fail_msg"], ansible_play_hosts_all=["kvm01", "kvm02"])
    assert "2 hosts (kvm01, kvm02)" in said
    assert "-e target=" in said


@pytest.mark.parametrize(
    ("playbook", "module", "given", "expected"),
    [
        ("snapshot", "snapshot", {"snapshot": "s"}, {"name": "s"}),
        ("snapshot", "snapshot", {"snapshot": "s", "state": "absent"}, {"name": "s", "state": "absent"}),
        ("snapshot", "snapshot", {"snapshot": "s", "allow_restart": False}, {"name": "s", "allow_restart": False}),
        ("flatten", "blockcommit", {}, {"keep": 1}),
        ("flatten", "blockcommit", {"keep": 0}, {"keep": 0}),
        ("flatten", "blockcommit", {"keep": "0"}, {"keep": "0"}),
    ],
)
def test_empty_answers_are_not_passed_on(
    playbook: str, module: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    arguments = {**task(playbook, f"vmkeeper.libvirt.{module}")}
    names = arguments.pop("domains")
    assert names == "{{ domains | vmkeeper.libvirt.names }}"
    optional = ("state", "quiesce", "allow_restart", "keep_present_as", "keep", "bandwidth")
    for empty in ("", None):
        assert passed(arguments, **{**dict.fromkeys(optional, empty), **given}) == expected
    assert passed(arguments, **given) == expected


def test_the_guide_names_every_variable_of_the_playbooks() -> None:
    guide = (ROOT / "docs/guides/awx.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in guide.splitlines() if line.startswith("|")}
    for name, play in PLAYBOOKS.items():
        own = {*play.get("vars", {}), *(one.get("register") for one in play["tasks"]), "hosts", "target"}
        text = (ROOT / f"playbooks/{name}.yml").read_text(encoding="utf-8")
        for variable in set(re.findall(r"(?<!\.)\b(\w+) \| default\(", text)) - own:
            assert f"`{variable}`" in rows[name], f"{variable} of {name} is in no table"
