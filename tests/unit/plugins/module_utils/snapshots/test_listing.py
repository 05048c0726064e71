# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import listing
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.model import Snapshot, SnapshotDisk


def snapshot(name, base, parent=None):
    disks = (SnapshotDisk("vda", "external", base, "raw", base + ".o"),)
    return Snapshot(name, datetime.datetime.now(datetime.timezone.utc), "disk-snapshot", disks, parent)


A, B = snapshot("a", "/base"), snapshot("b", "/base.o", "a")
STANDS_ON = {"a": ("/base",), "b": ("/base.o", "/base")}


def test_a_lower_layer_is_needed_by_everything_above_it():
    assert listing.needed_by(A, STANDS_ON, {"/top", "/base.o", "/base"}, "web") == [
        {"kind": "snapshot", "name": "b"},
        {"kind": "domain", "name": "web"},
    ]
    assert listing.needed_by(B, STANDS_ON, {"/elsewhere"}, "web") == []


def test_a_snapshot_is_bootable_only_with_all_its_files(tmp_path):
    (tmp_path / "x").touch()
    assert listing.bootable(A, [str(tmp_path / "x")])
    assert not listing.bootable(A, [str(tmp_path / "x"), str(tmp_path / "gone")])
    assert not listing.bootable(Snapshot("empty", A.created, "shutoff", ()), [])


def test_depth_ends_even_where_parents_go_in_circles():
    one, two = snapshot("one", "/x", "two"), snapshot("two", "/y", "one")
    assert listing._depth(B, (A, B)) == 1
    assert listing._depth(one, (one, two)) <= 2
