# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Which images a restore in place must leave alone."""

from __future__ import annotations

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.restore_plan import users_besides
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.host_graph import HostGraph, Reader

OWN = Reader("domain", "web", "u-web")
IMAGE = "/images/web.qcow2"


def test_an_image_that_only_its_domain_uses_is_its_own() -> None:
    graph = HostGraph(named={IMAGE: (OWN,)}, below={IMAGE: "/images/base.qcow2"})
    assert users_besides(graph, IMAGE, "u-web") == ()


def test_whoever_stands_on_it_at_whatever_distance_is_named() -> None:
    held = Reader("snapshot", "s1", "u-clone", "clone")
    saved = Reader("saved", "clone", "u-clone")
    graph = HostGraph(
        named={IMAGE: (OWN,), "/images/clone.qcow2": (held,), "/images/top.qcow2": (saved,)},
        below={"/images/clone.qcow2": IMAGE, "/images/top.qcow2": "/images/clone.qcow2"},
    )
    assert users_besides(graph, IMAGE, "u-web") == (
        "snapshot 's1' of domain 'clone'",
        "the saved state of domain 'clone'",
        "the image /images/clone.qcow2",
    )


def test_its_own_snapshots_and_an_overlay_that_nobody_names_count() -> None:
    graph = HostGraph(
        named={IMAGE: (OWN, Reader("snapshot", "s1", "u-web", "web"))}, below={"/images/loose.qcow2": IMAGE}
    )
    assert users_besides(graph, IMAGE, "u-web") == ("snapshot 's1' of domain 'web'", "the image /images/loose.qcow2")
