# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Overlays that libvirt does not mention: on real files, with a libvirt that mentions nothing."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Refused
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import qemu_img
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import Domain, DomainState
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.host_graph import HostGraph, Reader
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import retract

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-img and qemu-io are not installed")

OFF = Domain("web", "u", DomainState("shutoff", "shutdown"), True, ())
ON = Domain("web", "u", DomainState("running"), True, ())
WRITTEN = b"\x55" * 512


class Handle:
    def connect(self):
        return None

    def name(self):
        return "web"

    def UUIDString(self):
        return "u"


@pytest.fixture(autouse=True)
def mentioned(monkeypatch):
    """path -> domain, as libvirt's definitions would have it; empty unless a test fills it."""
    found: dict[str, str] = {}

    def graph(_connection):
        return HostGraph({path: (Reader("domain", name, f"uuid of {name}"),) for path, name in found.items()})

    monkeypatch.setattr(retract, "read_graph", graph)
    return found


@pytest.fixture
def stray(tmp_path):
    base, path = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(bytes(1 << 20))
    owner = (os.geteuid(), os.getegid())
    qemu_img.create_overlay(str(path), backing=str(base), backing_format="raw", size=1 << 20, owner=owner)
    return {"target": "vda", "path": str(path), "base": str(base), "base_format": "raw"}


def guest_writes(stray):
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 0x55 4096 512", stray["path"]], check=True, stdout=subprocess.DEVNULL
    )


def content(stray):
    with open(stray["base"], "rb") as base:
        return base.read()[4096:4608]


def merge(domain, stray):
    retract._merge_strays(Handle(), domain, [stray])


def test_an_empty_overlay_is_left_to_be_removed(stray):
    for domain in (OFF, ON):
        merge(domain, stray)
        assert os.path.exists(stray["path"])
    retract.remove_files(Handle(), [stray["path"]])
    assert os.listdir(os.path.dirname(stray["path"])) == ["base.raw"]


def test_what_a_guest_wrote_to_it_is_brought_home(stray):
    guest_writes(stray)
    merge(OFF, stray)
    assert content(stray) == WRITTEN
    assert os.listdir(os.path.dirname(stray["path"])) == ["base.raw"]
    merge(OFF, stray)


def test_a_merge_that_was_interrupted_is_done_again_though_the_base_is_newer(stray):
    guest_writes(stray)
    os.rename(stray["path"], stray["path"] + ".merging")
    os.utime(stray["base"])
    merge(OFF, stray)
    assert content(stray) == WRITTEN
    assert os.listdir(os.path.dirname(stray["path"])) == ["base.raw"]


@pytest.mark.parametrize("domain", [ON, OFF])
def test_two_that_have_parted_are_both_kept(stray, domain):
    guest_writes(stray)
    after = os.stat(stray["path"]).st_mtime_ns + 1
    os.utime(stray["base"], ns=(after, after))
    with pytest.raises(Refused, match="has been written since"):
        merge(domain, stray)
    assert os.path.exists(stray["path"])
    assert content(stray) == bytes(512)


def test_a_base_that_another_domain_uses_is_not_written(stray, mentioned):
    guest_writes(stray)
    mentioned[stray["base"]] = "clone"
    with pytest.raises(Refused, match="also read by domain 'clone'"):
        merge(OFF, stray)
    assert content(stray) == bytes(512)


def test_an_overlay_that_qemu_writes_to_is_not_touched(stray):
    guest_writes(stray)
    with open(stray["path"], "rb"), pytest.raises(Refused, match="Shut the guest down"):
        merge(ON, stray)


def test_what_somebody_holds_or_mentions_is_not_removed(stray, mentioned):
    with open(stray["path"], "rb"), pytest.raises(Refused, match=f"process {os.getpid()}"):
        retract.remove_files(Handle(), [stray["path"]])
    assert os.path.exists(stray["path"])
    mentioned[stray["path"]] = "web"
    with pytest.raises(Refused, match="domain 'web'"):
        retract.remove_files(Handle(), [stray["path"]])
    assert os.path.exists(stray["path"])


def test_a_removal_that_was_interrupted_is_finished(stray):
    os.rename(stray["path"], stray["path"] + ".removed")
    retract.remove_files(Handle(), [stray["path"]])
    assert os.listdir(os.path.dirname(stray["path"])) == ["base.raw"]
