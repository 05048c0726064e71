# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bad options are refused with a way out; good ones become bytes and seconds."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.request import DiskRequest, check_request

DEFAULTS: dict[str, Any] = {
    "vcpus": None,
    "max_vcpus": None,
    "memory": None,
    "max_memory": None,
    "disks": None,
    "apply": "auto",
    "allow_restart": False,
    "allow_shrink": False,
    "overcommit": False,
    "rollback": True,
    "health_command": None,
    "health_timeout": "5m",
    "shutdown_timeout": "5m",
}


def test_sizes_and_durations_become_bytes_and_seconds():
    request = check_request(
        {**DEFAULTS, "memory": "4G", "disks": [{"target": "vda", "size": "10G", "grow_filesystem": True}]}
    )
    assert request.memory == 4 << 30
    assert request.disks == (DiskRequest("vda", 10 << 30, True),)
    assert request.health_timeout == 300


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "Nothing to resize"),
        ({"vcpus": 0}, "vCPUs"),
        ({"memory": "1"}, "MiB"),
        ({"memory": "much"}, "size"),
        ({"vcpus": 4, "max_vcpus": 2}, "max_vcpus"),
        ({"memory": "4G", "max_memory": "2G"}, "max_memory"),
        ({"vcpus": 2, "apply": "live", "allow_restart": True}, "contradict"),
        ({"vcpus": 2, "health_command": []}, "health_command"),
        ({"vcpus": 2, "health_timeout": "0s"}, "health_timeout"),
        ({"disks": [{"target": "../x", "size": "1G", "grow_filesystem": True}]}, "safe name"),
        ({"disks": [{"target": "vda", "size": "100", "grow_filesystem": True}]}, "sectors"),
        ({"disks": [{"target": "vda", "size": None, "grow_filesystem": False}]}, "anything to do"),
        ({"disks": [{"target": "vda", "size": "1G", "grow_filesystem": True}] * 2}, "twice"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(options, says):
    with pytest.raises(InvalidInput, match=says):
        check_request({**DEFAULTS, **options})
