# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check what no linter checks: licence headers, and examples against the documented options.

Prints one `file: message` line a finding and fails if there is any.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
COLLECTION = "vmkeeper.libvirt"
HEADER_LINES = 15
# REUSE-IgnoreStart
SPDX = "SPDX-License-Identifier: GPL-3.0-or-later"
# REUSE-IgnoreEnd
GNU = "GNU General Public License v3.0+"  # what ansible-test looks for in modules

# The options of one module: name or alias -> its documentation, with "name" added.
Options = Mapping[str, Mapping[str, Any]]


def is_source(path: Path) -> bool:
    """Tell whether a file is a program, so that it needs a licence header."""
    if path.suffix in (".py", ".sh", ".c"):
        return True
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def licence_findings(path: Path, name: str) -> Iterator[str]:
    """Yield what the header of the source at `path`, called `name` in messages, lacks."""
    header = "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:HEADER_LINES])
    if not header:
        return  # an empty __init__.py
    if SPDX not in header:
        yield f"{name}: no '{SPDX}' in the first {HEADER_LINES} lines"
    if name.startswith("plugins/") and GNU not in header:
        yield f"{name}: no '# {GNU} (see LICENSE or ...)' in the first {HEADER_LINES} lines"


def tasks_of(items: object) -> Iterator[Mapping[str, Any]]:
    """Yield all tasks in a parsed list of tasks or plays, those in blocks too."""
    for item in items if isinstance(items, list) else []:
        if not isinstance(item, dict):
            continue
        yield item
        for key in ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks", "handlers"):
            yield from tasks_of(item.get(key))


def is_template(value: object) -> bool:
    """Tell whether a value is only known at run time."""
    return isinstance(value, str) and "{{" in value


def argument_findings(arguments: Mapping[str, Any], options: Options) -> Iterator[str]:
    """Yield how a task's arguments contradict the options, suboptions included."""
    given = set()
    for key, value in arguments.items():
        if key not in options:
            yield f"there is no option '{key}'"
            continue
        option = options[key]
        given.add(option["name"])
        if "choices" in option and not is_template(value):
            for choice in value if isinstance(value, list) else [value]:
                if choice not in option["choices"] and not is_template(choice):
                    yield f"{key}: {choice!r} is none of {', '.join(map(str, option['choices']))}"
        if "suboptions" in option:
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, dict):
                    for finding in argument_findings(entry, with_aliases(option["suboptions"])):
                        yield f"{key}: {finding}"
    for option in options.values():
        if option.get("required") and option["name"] not in given:
            given.add(option["name"])
            yield f"the required option '{option['name']}' is missing"


def with_aliases(documented: Mapping[str, Mapping[str, Any]]) -> Options:
    """Index documented options by their names and aliases."""
    return {
        name: {**option, "name": option_name}
        for option_name, option in documented.items()
        for name in (option_name, *option.get("aliases", []))
    }


def example_findings(examples: str, documented: Mapping[str, Options]) -> Iterator[str]:
    """Yield what is wrong in an EXAMPLES text; `documented` maps a module's full name to its options."""
    try:
        parsed = yaml.safe_load(examples)
    except yaml.YAMLError as error:
        yield f"the examples are not YAML: {error}"
        return
    tasks = [
        (module, task[module]) for task in tasks_of(parsed) for module in task if module.startswith(f"{COLLECTION}.")
    ]
    if not tasks:
        yield f"no task in the examples uses a module of {COLLECTION}"
    for module, arguments in tasks:
        if module not in documented:
            yield f"example: there is no module {module}"
        elif isinstance(arguments, dict):
            for finding in argument_findings(arguments, documented[module]):
                yield f"example of {module}: {finding}"
        elif arguments is not None:
            yield f"example of {module}: arguments are a mapping, not {arguments!r}"


def module_documentation() -> dict[str, dict[str, Any]]:
    """Return what ansible-doc knows of our modules, doc fragments merged in, by full name."""
    dump = subprocess.run(
        ["ansible-doc", "--metadata-dump", "--no-fail-on-errors", "--json", "--type", "module", COLLECTION],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    modules = json.loads(dump).get("all", {}).get("module", {})
    return {name: doc for name, doc in modules.items() if name.startswith(f"{COLLECTION}.")}


def main() -> int:
    """Check all files that git knows of or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    findings: list[str] = []
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and is_source(path):
            findings += licence_findings(path, name)

    modules = module_documentation()
    documented = {
        name: with_aliases(module["doc"].get("options", {})) for name, module in modules.items() if "doc" in module
    }
    for name, module in modules.items():
        file = f"plugins/modules/{name.rpartition('.')[2]}.py"
        if "doc" not in module:
            findings.append(f"{file}: ansible-doc cannot read it: {module.get('error', 'no reason given')}")
        else:
            findings += (f"{file}: {finding}" for finding in example_findings(module["examples"] or "", documented))

    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings in {len(modules)} modules and all sources")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
