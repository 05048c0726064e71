# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    DomainState,
    Layer,
    parse_disk,
    parse_domain,
    qemu_owner,
    resolve_volumes,
    volume_path,
    with_storage,
)

XML = """
<domain type='kvm' id='7'>
  <name>web</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
  <memory unit='GiB'>2</memory><currentMemory unit='KiB'>1048576</currentMemory><vcpu current='2'>4</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><loader type='pflash' readonly='yes'>/code.fd</loader>
    <nvram>/vars.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/top' index='2'/>
      <backingStore type='file' index='1'><format type='raw'/><source file='/base'/><backingStore/></backingStore>
      <mirror type='file' job='active-commit' ready='yes'><source file='/base'/></mirror>
      <target dev='vda' bus='virtio'/><serial>one</serial></disk>
    <disk type='block' device='disk' snapshot='no'><driver name='qemu' type='raw'/><source dev='/dev/vg/lv'/>
      <target dev='vdb' bus='virtio'/><shareable/></disk>
    <disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='p' volume='v'/><target dev='vdc'/></disk>
    <disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='rbd' name='x/y'/><target dev='vdd'/></disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <filesystem type='mount'><source dir='/srv'/><target dir='share'/></filesystem>
    <hostdev mode='subsystem' type='pci'><source><address domain='0x0' bus='0x1' slot='0x2' function='0x0'/></source></hostdev>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <tpm model='tpm-crb'><backend type='emulator'/></tpm>
  </devices>
</domain>"""


@pytest.fixture
def domain():
    return parse_domain(XML, DomainState("running"))


@pytest.mark.parametrize("backend", ["emulator", "passthrough", "external"])
def test_every_tpm_has_a_state(backend):
    assert parse_domain(XML.replace("type='emulator'", f"type='{backend}'"), DomainState("running")).has_tpm


def test_the_definition_becomes_data(domain):
    assert (domain.name, domain.runtime_id, domain.firmware) == ("web", 7, "uefi")
    assert (domain.memory_max, domain.memory_current) == (2 << 30, 1 << 30)
    assert (domain.vcpus_max, domain.vcpus_current) == (4, 2)
    assert domain.nvram.path == "/vars.fd"
    assert domain.nvram.format == "raw"
    assert domain.has_tpm
    assert domain.agent_configured
    assert domain.agent_connected
    assert [share.source for share in domain.shares] == ["/srv"]
    assert len(domain.hostdevs) == 1


def test_what_lies_where_no_file_is_read_is_known():
    xml = """<domain><name>x</name><uuid>u</uuid><os><nvram type='block'><source dev='/dev/vg/vars'/></nvram></os><devices>
    <memory model='nvdimm'><source><path>/pmem</path></source></memory><memory model='dimm'/></devices></domain>"""
    domain = parse_domain(xml, DomainState("running"))
    assert (domain.nvram, domain.nvram_elsewhere) == (None, "/dev/vg/vars")
    assert domain.persistent_memory == ("/pmem",)


def test_a_disk_has_its_chain_its_job_and_its_flags(domain):
    disk = domain.disk("vda")
    assert disk.chain == (Layer("/top", "qcow2"), Layer("/base", "raw"))
    assert (disk.job.job, disk.job.ready, disk.job.destination) == ("active-commit", True, "/base")
    assert disk.serial == "one"
    assert domain.disk("vdb").shareable
    assert domain.disk("vdb").snapshot == "no"
    assert domain.disk("vdd").path is None
    assert domain.disk("sda").active is None
    assert domain.disk("nope") is None


@pytest.mark.parametrize(
    ("below", "alone", "open_ended", "sliced"),
    [
        ("", False, True, False),
        ("<backingStore/>", True, False, False),
        ("<backingStore type='network'><source protocol='nbd'/></backingStore>", False, True, False),
        ("<backingStore type='file'><source file='/b'/><backingStore/></backingStore>", False, False, False),
        ("<backingStore type='file'><source file='/b'><slices/></source></backingStore>", False, True, True),
    ],
)
def test_what_a_definition_says_lies_below_an_image(below, alone, open_ended, sliced):
    element = f"<disk type='file'><source file='/o'/>{below}<target dev='vda'/></disk>"
    found = parse_disk(ElementTree.fromstring(element))
    assert (found.alone, found.open_ended, found.sliced) == (alone, open_ended, sliced)


def test_a_volume_that_is_no_file_here_has_no_path():
    volume = SimpleNamespace(path=lambda: "rbdpool/web")
    pool = SimpleNamespace(storageVolLookupByName=lambda _name: volume)
    connection = SimpleNamespace(storagePoolLookupByName=lambda _name: pool)
    assert volume_path(connection, "ceph", "web") is None
    volume.path = lambda: "/dev/vg0/web"
    assert volume_path(connection, "vg0", "web") == "/dev/vg0/web"


@pytest.mark.parametrize(
    ("kind", "volume", "there"),
    [
        ("dir", "web", True),
        ("logical", "web", True),
        ("iscsi", "web", False),
        ("dir", "missing", False),
        ("dir", "../web", False),
    ],
)
def test_a_volume_of_a_stopped_pool_lies_where_the_pools_definition_says(tmp_path, kind, volume, there):
    libvirt = pytest.importorskip("libvirt")
    (tmp_path / "web").touch()

    def look_up(_name):
        raise libvirt.libvirtError("storage pool 'one' is not active")

    xml = f"<pool type='{kind}'><name>one</name><target><path>{tmp_path}</path></target></pool>"
    pool = SimpleNamespace(storageVolLookupByName=look_up, XMLDesc=lambda _flags: xml)
    connection = SimpleNamespace(storagePoolLookupByName=lambda _name: pool)
    assert volume_path(connection, "one", volume) == (str(tmp_path / "web") if there else None)


def test_any_layer_tells_what_a_disk_is_made_of(domain):
    told = with_storage(domain, lambda path: "zfs" if path == domain.disk("vda").chain[-1].path else None)
    assert told.disk("vda").storage == "zfs"
    assert told.disk("vdc").storage is None


def test_volumes_get_their_path_and_keep_without_one_when_the_pool_is_away(domain):
    assert resolve_volumes(domain, lambda pool, volume: f"/{pool}/{volume}").disk("vdc").path == "/p/v"
    assert resolve_volumes(domain, lambda _pool, _volume: None).disk("vdc").path is None


@pytest.mark.parametrize(
    ("name", "running", "active"),
    [
        ("running", True, True),
        ("blocked", True, True),
        ("paused", False, True),
        ("pmsuspended", False, True),
        ("shutdown", False, True),
        ("crashed", False, True),  # kept by on_crash=preserve: QEMU still holds the images
        ("shutoff", False, False),
    ],
)
def test_states(name, running, active):
    assert (DomainState(name).running, DomainState(name).active) == (running, active)


def test_qemus_owner_is_read_from_the_baselabel_and_never_guessed():
    xml = (
        "<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model>"
        "<baselabel type='kvm'>+64055:+108</baselabel></secmodel></host></capabilities>"
    )
    assert qemu_owner(xml) == (64055, 108)
    assert qemu_owner("<capabilities><host/></capabilities>")[0] >= 0


def test_the_limit_at_which_the_kernel_ends_qemu_is_read_in_bytes():
    xml = XML.replace("<devices>", "<memtune><hard_limit unit='MiB'>3000</hard_limit></memtune><devices>", 1)
    assert parse_domain(xml, DomainState("running")).hard_limit == 3000 << 20
    assert parse_domain(XML, DomainState("running")).hard_limit is None
