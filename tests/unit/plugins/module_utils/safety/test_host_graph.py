# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.host_graph import HostGraph, Reader, unneeded

WEB = Reader("domain", "web", "u1")
DB = Reader("domain", "db", "u2")
ONE = Reader("snapshot", "one", "u1", "web")

# base <- left <- top (web); base <- clone (db); one holds left; base <- stray
GRAPH = HostGraph(
    named={"/top": (WEB,), "/clone": (DB,), "/left": (ONE,)},
    below={"/top": "/left", "/left": "/base", "/clone": "/base", "/stray": "/base"},
)


def test_everybody_above_an_image_reads_it_and_an_image_that_nobody_names_stands_for_itself() -> None:
    assert set(GRAPH.readers("/base")) == {WEB, DB, ONE, Reader("file", "/stray")}
    assert set(GRAPH.readers("/left")) == {WEB, ONE}
    assert GRAPH.readers("/top") == (WEB,)


def test_strangers_are_readers_of_other_domains_and_of_none() -> None:
    assert set(GRAPH.strangers("/base", "u1")) == {DB, Reader("file", "/stray")}
    assert GRAPH.strangers("/left", "u1") == ()


def test_a_chain_ends_at_its_base_and_a_loop_ends_too() -> None:
    assert GRAPH.chain("/top") == ("/top", "/left", "/base")
    assert HostGraph(below={"/a": "/b", "/b": "/a"}).chain("/a") == ("/a", "/b")


def test_only_overlays_that_nobody_reads_are_unneeded_from_the_top_down() -> None:
    without = GRAPH.without([WEB])
    assert unneeded(without, ["/left", "/top", "/base"]) == ("/top",)
    assert unneeded(without.without([ONE]), ["/left", "/top", "/base"]) == ("/top", "/left")


def test_an_image_without_a_backing_file_is_never_unneeded() -> None:
    assert unneeded(HostGraph(), ["/base"]) == ()
