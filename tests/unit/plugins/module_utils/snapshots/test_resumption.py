# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The drives of a guest that is resumed, from its moment's definition and today's."""

from __future__ import annotations

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    DomainState,
    Layer,
    parse_domain,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.resumption import fitted

OFF = DomainState("shutoff", "destroyed")


def drive(target: str, path: str, device: str = "disk") -> str:
    source = f"<source file='{path}'/>" if path else ""
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='qcow2'/>{source}<target dev='{target}'/></disk>"
    )


def domain(*drives: str) -> str:
    return f"<domain><name>web</name><uuid>u</uuid><devices>{''.join(drives)}</devices></domain>"


def test_drives_are_where_they_are_today_else_where_they_were_and_media_that_have_gone_are_out() -> None:
    saved = domain(
        drive("vda", "/old/a"),
        drive("vdb", "/old/b"),
        drive("vdc", "/old/c"),
        *(drive(target, "/old.iso", "cdrom") for target in ("sda", "sdb", "sdc", "sdd")),
    )
    today = domain(
        drive("vda", "/today/a"),
        drive("vdb", "/today/b"),
        drive("sda", "", "cdrom"),
        drive("sdb", "/other.iso", "cdrom"),
        drive("sdc", "/gone.iso", "cdrom"),
    )
    held = {"vda": Layer("/fresh/a", "qcow2")}
    done = fitted(saved, held, parse_domain(today, OFF), exists=lambda path: path != "/gone.iso")
    assert {disk.target: disk.path for disk in parse_domain(done, OFF).disks} == {
        "vda": "/fresh/a",
        "vdb": "/today/b",
        "vdc": "/old/c",  # detached since
        "sda": None,
        "sdb": "/other.iso",
        "sdc": None,
        "sdd": None,
    }
