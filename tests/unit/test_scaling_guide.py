# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the guide on scaling shows is what the module takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import check_request
from ansible_collections.vmkeeper.libvirt.plugins.modules import resize_domain
from ansible_collections.vmkeeper.libvirt.tests.docs_examples import Example, examples_in

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "scaling.md"
ROLE = GUIDE.parents[2] / "roles" / "vertical_scale" / "meta" / "argument_specs.yml"
ROLE_OPTIONS = yaml.safe_load(ROLE.read_text())["argument_specs"]["main"]["options"]
OPTIONS = yaml.safe_load(resize_domain.DOCUMENTATION)["options"]


@pytest.mark.parametrize("example", examples_in(GUIDE), ids=lambda example: example.name)
def test_an_example_of_the_guide_is_a_valid_wish(example: Example):
    for task in yaml.safe_load(example.text):
        if "vmkeeper.libvirt.resize_domain" not in task:
            assert task["ansible.builtin.include_role"]["name"] == "vmkeeper.libvirt.vertical_scale"
            assert set(task["vars"]) <= set(ROLE_OPTIONS)
            continue
        given = task["vmkeeper.libvirt.resize_domain"]
        assert given.pop("domain")
        assert set(given) <= set(OPTIONS)
        defaults = {name: option.get("default") for name, option in OPTIONS.items()}
        disks = [{"size": None, "grow_filesystem": True, **disk} for disk in given.pop("disks", [])]
        check_request({**defaults, **given, "disks": disks})
