# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import machine
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.machine import HostMachine, Launch
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.manifest import ImageDisk, Machine

UUID = "00000000-0000-4000-8000-000000000002"


def disk(target: str, bus: str) -> ImageDisk:
    return ImageDisk(target, bus, f"{target}.qcow2", "qcow2", "none", 1 << 20, 1, 1, "a" * 64)


def built(
    *disks: ImageDisk, linked: bool = False, network: str | None = None, firmware: str = "bios"
) -> ElementTree.Element:
    launch = Launch(
        name="new", uuid=UUID, digest="d" * 64, vcpus=4, memory=2 << 30, network=network,
        paths={one.target: f"/images/new.{one.target}.qcow2" for one in disks},
        bases={one.target: f"/images/base-{one.target}.qcow2" for one in disks} if linked else {},
    )  # fmt: skip
    facts = Machine("x86_64", "q35", firmware, 1, 1 << 30, 2)
    return ElementTree.fromstring(machine.definition(launch, facts, disks, HostMachine("kvm", "host-model")))


def test_a_definition_is_built_from_the_launch_s_own_values() -> None:
    root = built(disk("vda", "virtio"))
    assert (root.findtext("name"), root.findtext("uuid"), root.findtext("vcpu")) == ("new", UUID, "4")
    assert root.findtext("memory") == str(2 << 20)
    assert root.find("devices/interface") is None
    xml = ElementTree.tostring(root, encoding="unicode")
    assert machine.launched_from(xml) == "d" * 64
    root.find("vcpu").text = "8"
    assert machine.launched_with(ElementTree.tostring(root, encoding="unicode")) == {"vcpus": 4, "memory": 2 << 30}


def test_nothing_that_runs_or_reaches_the_host_is_in_it() -> None:
    root = built(disk("vda", "virtio"), network="default", firmware="uefi")
    for path in (
        "devices/emulator",
        "os/loader",
        "os/nvram",
        "devices/hostdev",
        "devices/filesystem",
        "devices/interface/script",
    ):
        assert root.find(path) is None, path
    assert not [element.tag for element in root.iter() if "qemu" in element.tag]
    assert {element.get("file") for element in root.iter("source") if element.get("file")} == {"/images/new.vda.qcow2"}
    assert root.find("os").get("firmware") == "efi"


def test_interfaces_join_the_named_network_only() -> None:
    sources = built(disk("vda", "virtio"), network="lan").findall("devices/interface/source")
    assert [source.get("network") for source in sources] == ["lan", "lan"]


@pytest.mark.parametrize(
    ("target", "bus", "new_target", "new_bus"),
    [
        ("vda", "virtio", "vda", "virtio"),
        ("hda", "ide", "sda", "sata"),
        ("sdb", "scsi", "sdb", "scsi"),
        ("sda", "usb", "sda", "usb"),
    ],
)
def test_a_disk_keeps_its_place_on_a_bus_that_the_machine_has(
    target: str, bus: str, new_target: str, new_bus: str
) -> None:
    found = built(disk(target, bus)).find("devices/disk/target")
    assert (found.get("dev"), found.get("bus")) == (new_target, new_bus)


def test_a_disk_keeps_the_serial_number_that_its_guest_may_know_it_by() -> None:
    named = replace(disk("vda", "virtio"), serial="disk-1")
    assert built(named).findtext("devices/disk/serial") == "disk-1"
    assert built(disk("vda", "virtio")).find("devices/disk/serial") is None


def test_a_linked_disk_leaves_its_base_s_owner_alone() -> None:
    source = built(disk("vda", "virtio"), linked=True).find("devices/disk/backingStore/source")
    assert source.get("file") == "/images/base-vda.qcow2"
    assert source.find("seclabel").attrib == {"model": "dac", "relabel": "no"}


def test_a_domain_of_somebody_else_was_not_launched_from_an_image() -> None:
    assert machine.launched_from("<domain><name>x</name></domain>") is None
    assert machine.launched_with("<domain><name>x</name></domain>") == {}


def test_a_launch_of_an_older_version_does_not_tell_its_size() -> None:
    image = f"<image xmlns='{machine.NAMESPACE}'>{'d' * 64}</image>"
    assert machine.launched_with(f"<domain><metadata>{image}</metadata></domain>") == {}
