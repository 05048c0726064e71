# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Definitions made harmless."""

from __future__ import annotations

from xml.etree import ElementTree

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.throwaway import throw_away

DEFINITION = """
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>n</name><uuid>u</uuid>
  <metadata><x xmlns='urn:x'/></metadata>
  <memory unit='MiB'>512</memory>
  <memoryBacking><hugepages/></memoryBacking>
  <cputune><vcpupin vcpu='0' cpuset='3'/></cputune>
  <numatune><memory nodeset='1'/></numatune>
  <cpu><numa><cell id='0' cpus='0' memory='512' memAccess='shared'/></numa></cpu>
  <on_crash>preserve</on_crash>
  <seclabel type='static' model='dac'><label>+0:+0</label></seclabel>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native'/>
      <source file='/p/vda.qcow2'/><target dev='vda'/><shareable/><transient/><iotune/></disk>
    <disk type='block' device='disk'><source dev='/dev/vg/quorum'/><target dev='vdb'/><shareable/></disk>
    <disk type='network' device='lun'><source protocol='iscsi' name='iqn'/><target dev='sdb'/><shareable/></disk>
    <disk type='file'><source file='/p/read.img'/><target dev='vdd'/><readonly/></disk>
    <disk type='network' device='cdrom'><source protocol='http' name='x'/><target dev='sda'/></disk>
    <interface type='network'><source network='default'/></interface>
    <hostdev mode='subsystem' type='pci'/>
    <filesystem type='mount'><source dir='/srv'/></filesystem>
    <graphics type='vnc' port='5900'/><tpm model='tpm-crb'/><redirdev/><shmem name='s'/><vsock/><sound/>
    <input type='passthrough'/><input type='keyboard'/>
    <rng model='virtio'><backend model='egd' type='udp'/></rng><rng model='virtio'><backend model='random'/></rng>
    <serial type='tcp'><source host='10.0.0.1' service='9'/><protocol type='raw'/><target port='0'/></serial>
    <console type='tcp'><target type='serial'/></console><console type='pty'><target type='virtio'/></console>
    <channel type='unix'><source path='/run/a'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><source path='/run/b'/><target type='virtio' name='com.example'/></channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <video><model type='qxl'/></video><watchdog model='itco' action='dump'/>
    <memory model='nvdimm'><source><path>/nv</path></source></memory>
  </devices>
  <qemu:commandline><qemu:arg value='-netdev'/></qemu:commandline>
</domain>
"""


def devices() -> ElementTree.Element:
    """The devices that are left."""
    found = ElementTree.fromstring(throw_away(DEFINITION, "a title", ["vda"])).find("devices")
    assert found is not None
    return found


def test_nothing_that_leads_out_of_the_guest_is_left() -> None:
    kinds = {device.tag for device in devices()}
    assert kinds == {"disk", "serial", "console", "channel", "video", "watchdog", "input", "rng"}
    assert [device.get("type") for device in devices().findall("input")] == ["keyboard"]
    assert [device.find("backend").get("model") for device in devices().findall("rng")] == ["random"]  # type: ignore[union-attr]
    text = throw_away(DEFINITION, "a title", ["vda"])
    assert "read.img" not in text
    for word in (
        "/dev/",
        "iscsi",
        "10.0.0.1",
        "/run/",
        "netdev",
        "/nv",
        "http:",
        "hugepages",
        "vcpupin",
        "memAccess",
        "seclabel",
    ):
        assert word not in text.replace("http://libvirt.org", ""), word


def test_ports_stay_and_only_the_agents_leads_anywhere() -> None:
    assert [device.get("type") for device in devices().findall("serial")] == ["null"]
    assert [device.get("type") for device in devices().findall("console")] == ["null"]
    channels = {device.find("target").get("name"): device.get("type") for device in devices().findall("channel")}  # type: ignore[union-attr]
    assert channels == {"org.qemu.guest_agent.0": "unix", "com.example": "null", "com.redhat.spice.0": "null"}


def test_disks_are_nobodys_and_drives_are_empty() -> None:
    disk, drive = devices().findall("disk")
    assert [child.tag for child in disk] == ["driver", "source", "target"]
    driver = disk.find("driver")
    assert driver is not None
    assert (driver.get("cache"), driver.get("io")) == ("unsafe", None)
    assert drive.find("source") is None
    assert drive.get("type") == "file"


def test_there_is_a_screen_and_a_crash_ends_it() -> None:
    root = ElementTree.fromstring(throw_away(DEFINITION, "a title", ["vda"]))
    assert [model.get("type") for model in root.iterfind("devices/video/model")] == ["vga"]
    assert (root.findtext("on_crash"), root.findtext("title")) == ("destroy", "a title")
    assert root.find("devices/watchdog").get("action") == "none"  # type: ignore[union-attr]
