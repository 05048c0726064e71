# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from xml.etree import ElementTree

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import chain
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.definition import (
    with_backing,
    with_disk_layers,
    without_chains,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import Layer, parse_disk

XML = """<domain><metadata><a:b xmlns:a='urn:x'>kept</a:b></metadata><devices>
<disk type='volume' device='disk'><driver name='qemu' type='raw' cache='none'/>
<source pool='p' volume='v' index='1'><seclabel model='dac' relabel='no'/></source>
<backingStore type='file'><format type='raw'/><source file='/old'/></backingStore>
<target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/untouched'/><target dev='vdb'/></disk></devices></domain>"""


def disks(xml):
    return {disk.target: disk for disk in map(parse_disk, ElementTree.fromstring(xml).iterfind("devices/disk"))}


def test_a_disk_stands_on_its_new_image_and_all_else_stays():
    changed = with_disk_layers(XML, {"vda": Layer("/new.qcow2", "qcow2")})
    found = disks(changed)
    assert found["vda"].chain == (Layer("/new.qcow2", "qcow2"),)
    assert found["vda"].kind == "file"
    assert found["vda"].pool is None
    assert found["vdb"] == disks(XML)["vdb"]
    assert 'cache="none"' in changed
    assert 'relabel="no"' in changed
    assert "kept" in changed


def test_a_block_device_and_a_disk_without_a_driver():
    found = disks(with_disk_layers(XML, {"vdb": Layer("/dev/vg/lv", "raw", "block")}))
    assert found["vdb"].kind == "block"
    assert found["vdb"].chain == (Layer("/dev/vg/lv", "raw", "block"),)


def test_a_chain_that_is_lent_is_written_out_and_its_owners_are_left_alone() -> None:
    disks = "<disk type='file'><source file='/o'/><target dev='vda'/></disk><disk><target dev='vdb'/></disk>"
    xml = f"<domain><devices>{disks}</devices></domain>"
    layers = (Layer("/view/p2/vda.qcow2", "qcow2"), Layer("/view/p1/vda.qcow2", "qcow2"))
    root = ElementTree.fromstring(with_backing(xml, {"vda": layers}, ("apparmor", "dac")))
    disk = root.find("devices/disk")
    assert disk is not None
    assert [layer.path for layer in parse_disk(disk).chain] == ["/o", "/view/p2/vda.qcow2", "/view/p1/vda.qcow2"]
    labels = [(label.get("model"), label.get("relabel")) for label in disk.iter("seclabel")]
    assert labels == [("dac", "no"), ("dac", "no")]
    last = disk.find("backingStore/backingStore/backingStore")
    assert last is not None
    assert len(last) == 0, "without its end libvirt would look for more"
    assert root.findall("devices/disk")[1].find("backingStore") is None


def test_a_chain_that_leads_to_a_block_device_is_recorded(monkeypatch, tmp_path):
    top = Layer(str(tmp_path / "web.qcow2"), "qcow2")
    (tmp_path / "web.qcow2").touch()
    below = (Layer("/images/middle.qcow2", "qcow2"), Layer("/dev/vg0/web", "raw"))
    monkeypatch.setattr(chain, "follow", lambda _top: (top, *below))
    xml = (
        "<domain><devices><disk type='block'><source dev='/dev/vg0/web'/><target dev='vda'/></disk></devices></domain>"
    )
    assert "backingStore" not in with_disk_layers(xml, {"vda": top})
    monkeypatch.setattr(chain, "is_device", lambda path: path.startswith("/dev/"))
    disk = ElementTree.fromstring(with_disk_layers(xml, {"vda": top})).find("devices/disk")
    first = disk.find("backingStore")
    assert (first.get("type"), first.find("source").get("file")) == ("file", "/images/middle.qcow2")
    second = first.find("backingStore")
    assert (second.get("type"), second.find("source").get("dev"), second.find("format").get("type")) == (
        "block",
        "/dev/vg0/web",
        "raw",
    )
    assert len(second.find("backingStore")) == 0


def test_only_the_chains_of_the_disks_that_are_named_are_taken_out() -> None:
    both = XML.replace(
        "<source file='/untouched'/>", "<source file='/o'/><backingStore><source file='/b'/></backingStore>"
    )
    found = disks(without_chains(both, ["vda"]))
    assert len(disks(both)["vda"].chain) == 2
    assert found["vda"].chain == disks(both)["vda"].chain[:1]
    assert found["vda"].open_ended
    assert found["vdb"] == disks(both)["vdb"]
    assert without_chains(XML, ["vdb"]) == XML, "no other text where there is nothing to take out"
