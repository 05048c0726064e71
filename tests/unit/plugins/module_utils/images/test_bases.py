# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import bases
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.host_graph import HostGraph, Reader

BASE = bases.path_of("/srv/vms", "a" * 64, "vda")
DOMAIN = Reader("domain", "web01", "00000000-0000-4000-8000-000000000001")


def test_a_base_lies_below_the_directory_of_its_disks() -> None:
    assert f"/srv/vms/.vmkeeper-bases/{'a' * 64}-vda.qcow2" == BASE


def test_a_base_that_nothing_stands_on_has_no_user() -> None:
    assert bases.users(HostGraph(), BASE) == ()
    assert (
        bases.users(HostGraph(named={"/srv/vms/other": (DOMAIN,)}, below={"/srv/vms/other": "/srv/base"}), BASE) == ()
    )


def test_a_domain_at_any_distance_is_a_user() -> None:
    below = {"/srv/vms/web01.vda.qcow2": BASE, "/srv/vms/snapshot": "/srv/vms/web01.vda.qcow2"}
    assert bases.users(HostGraph(named={"/srv/vms/snapshot": (DOMAIN,)}, below=below), BASE) == (DOMAIN,)


def test_a_base_that_a_domain_names_itself_is_used() -> None:
    assert DOMAIN in bases.users(HostGraph(named={BASE: (DOMAIN,)}), BASE)


def test_a_disk_that_no_definition_names_is_a_user_too() -> None:
    (user,) = bases.users(HostGraph(below={"/srv/vms/kept.qcow2": BASE}), BASE)
    assert (user.kind, user.name) == ("file", "/srv/vms/kept.qcow2")
