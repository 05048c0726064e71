# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the parts of the collection say about each other."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = yaml.safe_load((ROOT / "meta/runtime.yml").read_text(encoding="utf-8"))


def python_names(directory):
    return {path.stem for path in (ROOT / directory).glob("*.py")} - {"__init__"}


def used_fragments():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "plugins").rglob("*.py"))
    return set(re.findall(r"^\s*- vmkeeper\.libvirt\.(\w+)(?:\.\w+)?\s*$", text, re.MULTILINE))


def test_every_module_is_in_the_action_group():
    assert python_names("plugins/modules") - set(RUNTIME["action_groups"]["all"]) == set()


def test_the_action_group_is_sorted_and_names_nothing_twice():
    group = RUNTIME["action_groups"]["all"]
    assert group == sorted(set(group))


def test_every_doc_fragment_is_used():
    assert python_names("plugins/doc_fragments") - used_fragments() == set()
