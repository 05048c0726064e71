# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An empty answer of a survey means that nothing was said: for every optional option of every role, up to its modules."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ansible_collections.vmkeeper.libvirt.tests.unit.templating import OMIT, templated, templates

ROLES = Path(__file__).resolve().parents[2] / "roles"
COLLECTION = "vmkeeper.libvirt."
EMPTY = ("", None)
"""An empty answer is text; marked as typed by a user (``!unsafe``), as AWX marks it, Ansible reads it as none."""

REFUSED = {"consistent_backup_passphrase"}
"""An empty one is refused: what was to be encrypted must not become readable."""

ON_THE_WAY = {
    "ansible_check_mode": False,
    "consistent_backup_level": "digest",
    "consistent_backup_members": ["web01"],
    "consistent_backup_point": {"id": "20261121T201500Z-0000", "domain_uuid": "u"},
    "consistent_backup_succeeded": ["u"],
    "consistent_backup_found": {"domains": []},
    "restore_domain_chosen": "20261121T201500Z-0000",
    "image_share_machine": "web01",
    "image_share_image": "golden",
    "image_share_reference": "registry.example.com/golden:1",
    "image_share_with": "group:ops",
    "snapshot_guard_domain_list": ["web01"],
    "vertical_scale_domain": "web01",
    "vertical_scale_wanted": {"vcpus": None, "memory": None},
    "vertical_scale_present": {"domains": [{"snapshots": []}]},
}
"""What the roles' own tasks have set before, and what is said so that a task is not skipped."""


def read(path: Path) -> Any:
    """What a file of the role holds; nothing where there is none."""
    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}


def entry_points() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each role, its entry point, and the options of that."""
    for role in sorted(path.name for path in ROLES.iterdir()):
        specs = read(ROLES / role / "meta/argument_specs.yml")["argument_specs"]
        for name, spec in specs.items():
            options = spec["options"].items()
            yield role, name, {option: {**given, "description": None} for option, given in options}


def without_documentation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options as the validator takes them."""
    known = ("type", "elements", "choices", "default", "required", "no_log")
    return {name: {key: spec[key] for key in known if key in spec} for name, spec in options.items()}


OPTIONAL = [
    pytest.param(options, name, id=f"{role}:{entry}:{name}")
    for role, entry, options in entry_points()
    for name, option in options.items()
    if not option.get("required")
]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(("options", "name"), OPTIONAL)
def test_an_empty_answer_is_taken(options: dict[str, Any], name: str, empty: str | None) -> None:
    required = {other: "said" for other, option in options.items() if option.get("required")}
    found = ArgumentSpecValidator(without_documentation(options)).validate({**required, name: empty})
    assert not found.error_messages


def module_calls(tasks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The collection's modules in these tasks, with their arguments and the tasks' variables."""
    for task in tasks:
        for part in ("block", "rescue", "always"):
            yield from module_calls(task.get(part, []))
        for name, arguments in task.items():
            if name.startswith(COLLECTION):
                yield name.removeprefix(COLLECTION), arguments or {}, task.get("vars", {})


CALLS = [
    pytest.param(
        path.parents[1].name, module, arguments, variables, id=f"{path.parents[1].name}:{path.stem}:{module}:{number}"
    )
    for path in sorted(ROLES.glob("*/tasks/*.yml"))
    for number, (module, arguments, variables) in enumerate(module_calls(read(path)))
    if arguments
]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(("role", "module", "arguments", "task_variables"), CALLS)
def test_no_module_hears_of_empty_answers(
    role: str, module: str, arguments: dict[str, Any], task_variables: dict[str, Any], empty: str | None
) -> None:
    answers = {
        name: "said" if option.get("required") else empty
        for owner, _entry, options in entry_points()
        for name, option in options.items()
        if owner == role and name not in REFUSED
    }
    variables = {
        **answers,
        **templates(read(ROLES / role / "vars/main.yml")),
        **templates(task_variables),
        **ON_THE_WAY,
    }
    passed = {name: templated(value, variables) for name, value in arguments.items()}
    given = {name: value for name, value in passed.items() if value != OMIT}
    assert [name for name, value in given.items() if value in ("", None, [])] == []
    documented = importlib.import_module(f"ansible_collections.vmkeeper.libvirt.plugins.modules.{module}").DOCUMENTATION
    options = without_documentation(yaml.safe_load(documented).get("options", {}))
    for option in options.values():
        option.pop("required", None)
    found = ArgumentSpecValidator(options).validate({name: given[name] for name in given if name in options})
    assert not found.error_messages


def role_variable(role: str, name: str, **given: Any) -> Any:
    """What one of the role's own variables is with these answers, and else the role's defaults."""
    parts = [templates(read(ROLES / role / part / "main.yml")) for part in ("defaults", "vars")]
    return templated("{{ " + name + " }}", {**parts[0], **given, **parts[1]})


COMMANDS = [
    ("systemctl is-active nginx", ["systemctl", "is-active", "nginx"]),
    (' ["sh", "-c", "test -e /srv/data"]', ["sh", "-c", "test -e /srv/data"]),
    (["test", "-e", "/srv/my data"], ["test", "-e", "/srv/my data"]),
    ("", []),
    ([], []),
]


@pytest.mark.parametrize(("answer", "argv"), COMMANDS)
@pytest.mark.parametrize(
    ("role", "option", "name"),
    [
        ("restore_domain", "restore_domain_boot_check", "restore_domain_boot_list"),
        ("vertical_scale", "vertical_scale_health_command", "vertical_scale_health_list"),
    ],
)
def test_a_command_as_text_is_a_program_and_its_arguments(
    role: str, option: str, name: str, answer: Any, argv: list[str]
) -> None:
    assert role_variable(role, name, **{option: answer}) == argv


@pytest.mark.parametrize(("answer", "argv"), COMMANDS)
def test_the_playbook_verify_reads_a_command_in_the_same_way(answer: Any, argv: list[str]) -> None:
    (play,) = read(ROLES.parent / "playbooks/verify.yml")
    assert templated("{{ verify_boot_check }}", {**templates(play["vars"]), "boot_check": answer}) == argv


def test_empty_sizes_are_the_standard_ones() -> None:
    usual = role_variable("vertical_scale", "vertical_scale_size_table")
    assert usual["large"] == {"vcpus": 4, "memory": "8G"}
    assert role_variable("vertical_scale", "vertical_scale_size_table", vertical_scale_sizes="") == usual
    own = {"vertical_scale_sizes": '{"huge": {"vcpus": 64, "memory": "1T"}}'}
    assert list(role_variable("vertical_scale", "vertical_scale_size_table", **own)) == ["huge"]


SEEN = [
    {"name": "web01", "uuid": "u1", "disks": [{"target": "vda"}, {"target": "vdb"}]},
    {"name": "db01", "uuid": "u2", "disks": [{"target": "vda"}]},
]


@pytest.mark.parametrize(
    ("members", "left_out"),
    [(["web01"], ["vdb"]), (["u1"], ["vdb"]), (["db01"], OMIT), (["web01", "db01"], ["vdb"]), (["nobody"], OMIT)],
)
def test_a_backup_leaves_out_disks_that_the_domain_has(members: list[str], left_out: Any) -> None:
    (task,) = [one for one in read(ROLES / "consistent_backup/tasks/main.yml") if "vmkeeper.libvirt.backup" in one]
    variables = {
        **templates(task["vars"]),
        "consistent_backup_found": {"domains": SEEN},
        "consistent_backup_exclude_disk_list": ["vdb", "vdz"],
        "consistent_backup_members": members,
    }
    assert templated(task["vmkeeper.libvirt.backup"]["exclude_disks"], variables) == left_out


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_passphrase_makes_no_readable_backup(empty: str | None) -> None:
    (task,) = [one for one in read(ROLES / "consistent_backup/tasks/main.yml") if "vmkeeper.libvirt.backup" in one]
    encryption = task["vmkeeper.libvirt.backup"]["encryption"]
    refused = {"passphrase": ""}
    assert templated(encryption, {"consistent_backup_passphrase": empty}) == refused, "by the module"
    assert templated(encryption, {}) == OMIT


@pytest.mark.parametrize(
    ("role", "name", "answer"),
    [
        ("consistent_backup", "consistent_backup_keep_table", '{"daily": 7,}'),
        ("consistent_backup", "consistent_backup_group_list", "web01, db01"),
        ("vertical_scale", "vertical_scale_disk_list", '{"target": "vda"}'),
        ("vertical_scale", "vertical_scale_guest_table", "[]"),
    ],
)
def test_a_wrong_structure_is_shown(role: str, name: str, answer: str) -> None:
    option = name.rpartition("_")[0]
    plural = option if option in read(ROLES / role / "defaults/main.yml") else f"{option}s"
    with pytest.raises(AnsibleError, match=r"(?s)A (list|dictionary)( as JSON)? is wanted.*" + re.escape(repr(answer))):
        role_variable(role, name, **{plural: answer})


@pytest.mark.parametrize(("answer", "jobs"), [("", "2"), (None, "2"), (3, "3"), ("1", "1"), (0, "0")])
def test_no_jobs_are_not_the_default_number_of_jobs(answer: Any, jobs: str) -> None:
    given = {"consistent_backup_jobs_per_repository": answer}
    assert role_variable("consistent_backup", "consistent_backup_jobs", **given) == jobs


def test_a_share_can_name_the_scratch_that_an_export_asks_for() -> None:
    (task,) = [one for one in read(ROLES / "image_share/tasks/machine.yml") if "vmkeeper.libvirt.export_image" in one]
    scratch = task["vmkeeper.libvirt.export_image"]["scratch"]
    assert templated(scratch, {"image_share_scratch": "/srv/scratch"}) == "/srv/scratch"
    assert role_variable("image_share", "image_share_scratch") == ""
