# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A definition fitted to another host or identity: what is changed is told."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.mapping import Host, Target, fit
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import Layer

XML = """<domain type='kvm' id='3'><name>web</name><uuid>8b2f4a3e-0000-4000-8000-000000000001</uuid>
<os><type arch='x86_64' machine='pc-q35-9.2'>hvm</type>
<loader type='pflash'>/gone/OVMF.fd</loader><nvram template='/gone/V'>/old/VARS.fd</nvram></os>
<cpu mode='custom'><model>Granite</model><topology sockets='1' cores='2' threads='1'/></cpu>
<devices><emulator>/gone/qemu</emulator>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/web'/><target dev='vda'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/here/data.qcow2'/><target dev='vdb'/></disk>
<disk type='file' device='disk'><source file='/here/shared.img'/><target dev='vdc'/><shareable/></disk>
<disk type='network' device='lun'><source protocol='iscsi' name='iqn'/><target dev='sdb'/><shareable/></disk>
<disk type='file' device='disk'><source file='/here/read.img'/><target dev='vdd'/><readonly/></disk>
<disk type='file' device='cdrom'><source file='/gone/install.iso'/><target dev='sda'/></disk>
<interface type='network'><mac address='52:54:00:00:00:01'/><source network='prod'/></interface>
<interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br9'/></interface>
<hostdev mode='subsystem' type='pci'/><graphics type='vnc' port='5901' autoport='no'/>
<serial type='file'><source path='/log/web'/></serial>
</devices></domain>"""

HOST = Host(
    domain_types=frozenset({"qemu"}),
    machines={"pc-q35-7.2": "pc-q35-7.2", "q35": "pc-q35-7.2"},
    networks=frozenset({"default"}),
    bridges=frozenset(),
    exists=lambda path: path.startswith("/here/"),
    cpu_fits=False,
)
SAME = Host(
    frozenset({"kvm"}), {"pc-q35-9.2": "pc-q35-9.2"}, frozenset({"prod"}), frozenset({"br9"}), lambda _path: True
)


def target(**changes) -> Target:
    fields = {"name": "web2", "uuid": "8b2f4a3e-0000-4000-8000-000000000002", "fresh": True}
    fields |= {"disks": {"vda": Layer("/new/vda.raw", "raw")}, "nvram": "/new/VARS.fd"}
    return Target(**{**fields, **changes})


def test_what_the_host_lacks_is_mapped_and_told() -> None:
    mapped = fit(XML, target(), HOST)
    root = ElementTree.fromstring(mapped.xml)
    told = " | ".join(mapped.notes)
    assert root.get("type") == "qemu"
    assert "id" not in root.attrib
    assert root.find("os/type").get("machine") == "pc-q35-7.2"
    assert "pc-q35-9.2" in told
    assert root.find("cpu").get("mode") == "host-model"
    assert root.find("cpu/topology") is not None
    assert "CPU" in told
    assert root.find("os").get("firmware") == "efi"
    assert root.findtext("os/nvram") == "/new/VARS.fd"
    assert root.find("devices/emulator") is None
    assert "/gone/qemu" in told
    kinds = [interface.get("type") for interface in root.iterfind("devices/interface")]
    assert kinds == ["user", "user"]
    assert "prod" in told
    assert "br9" in told
    assert all(one.find("link").get("state") == "down" for one in root.iterfind("devices/interface"))
    assert root.find("devices/disk[@device='cdrom']/source") is None
    assert "install.iso" in told


def test_a_new_identity_shares_nothing_writable_with_the_original() -> None:
    root = ElementTree.fromstring(fit(XML, target(), SAME).xml)
    assert root.findtext("name") == "web2"
    assert root.findtext("uuid").endswith("2")
    assert root.findall("devices/interface/mac") == []
    assert root.findall("devices/hostdev") == []
    sources = {disk.find("target").get("dev"): disk.find("source") for disk in root.iterfind("devices/disk")}
    assert sources["vda"].get("file") == "/new/vda.raw"
    assert sorted(sources) == ["sda", "vda", "vdd"], "the drive, the point's, and one that nobody writes"
    assert root.find("devices/graphics").get("autoport") == "yes"
    assert root.find("devices/serial/source").get("path") != "/log/web"


ATTACHED = """<domain type='kvm'><name>web</name><uuid>8b2f4a3e-0000-4000-8000-000000000001</uuid>
<os><type arch='x86_64' machine='pc-q35-9.2'>hvm</type>
<nvram type='block' format='raw'><source dev='/dev/vg/web_VARS'/></nvram></os>
<devices><interface type='hostdev' managed='yes'><source><address type='pci'/></source></interface>
<interface type='network'><source network='prod'/><target dev='tap-web'/></interface>
<filesystem type='mount'><driver type='virtiofs'/><source dir='/srv/web'/><target dir='web'/></filesystem>
<filesystem type='mount'><source dir='/srv/media'/><target dir='media'/><readonly/></filesystem>
<memory model='nvdimm' access='shared'><source><path>/pmem/web</path></source><target><size>1</size></target></memory>
<memory model='dimm'><target><size>1</size></target></memory>
<tpm model='tpm-crb'><backend type='emulator'><source type='dir' path='/tpm/web'/></backend></tpm>
<shmem name='cluster'/><vsock model='virtio'><cid auto='no' address='3'/></vsock>
<serial type='unix'><source mode='bind' path='/run/web.sock'/><log file='/log/web' append='off'/><target port='0'/></serial>
<serial type='tcp'><source mode='bind' host='::' service='4555'/><protocol type='telnet'/><target port='1'/></serial>
<console type='unix'><source mode='bind' path='/run/web.sock'/><target type='serial' port='0'/></console>
<parallel type='file'><source path='/out/lpt'/><target port='0'/></parallel>
<channel type='unix'><source mode='bind' path='/run/agent'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
</devices></domain>"""


@pytest.mark.parametrize("backend", ["passthrough", "external"])
def test_a_tpm_that_is_not_libvirts_stays_with_the_original(backend: str) -> None:
    mapped = fit(ATTACHED.replace("<backend type='emulator'>", f"<backend type='{backend}'>"), target(nvram=None), SAME)
    assert ElementTree.fromstring(mapped.xml).find("devices/tpm") is None
    assert any("the TPM of" in note for note in mapped.notes)


def test_a_copy_is_attached_to_nothing_that_the_original_writes() -> None:
    mapped = fit(ATTACHED, target(nvram=None), SAME)
    devices = ElementTree.fromstring(mapped.xml).find("devices")
    assert [one.get("type") for one in devices.iterfind("interface")] == ["network"]
    assert devices.find("interface/target") is None
    assert [one.find("source").get("dir") for one in devices.iterfind("filesystem")] == ["/srv/media"]
    assert [one.get("model") for one in devices.iterfind("memory")] == ["dimm"]
    assert devices.find("tpm/backend/source") is None
    assert devices.find("shmem") is None
    assert devices.find("vsock/cid").attrib == {"auto": "yes"}
    assert [one.get("type") for one in [*devices.iterfind("serial"), *devices.iterfind("console")]] == ["pty"] * 3
    assert devices.find("serial/source") is None
    assert devices.find("serial/protocol") is None
    assert devices.find("serial/log").get("file") == "/log/web.web2"
    assert devices.find("parallel/source").get("path") == "/out/lpt.web2"
    assert devices.find("channel/source") is None
    nvram = ElementTree.fromstring(mapped.xml).find("os/nvram")
    assert (list(nvram), nvram.get("type"), nvram.text) == ([], None, None)
    told = " | ".join(mapped.notes)
    for what in ("type hostdev", "/srv/web", "/pmem/web", "TPM", "unix end", "tcp end", "/out/lpt.web2", "fresh ones"):
        assert what in told, what


def test_the_same_identity_keeps_all_that_is_attached() -> None:
    mapped = fit(
        ATTACHED, target(name="web", uuid="8b2f4a3e-0000-4000-8000-000000000001", fresh=False, nvram=None), SAME
    )
    assert mapped.notes == []
    before, after = ElementTree.fromstring(ATTACHED), ElementTree.fromstring(mapped.xml)
    assert [one.tag for one in after.find("devices")] == [one.tag for one in before.find("devices")]
    assert after.find("os/nvram/source").get("dev") == "/dev/vg/web_VARS"


def test_the_same_identity_on_the_same_host_changes_only_the_disks() -> None:
    mapped = fit(XML, target(name="web", uuid="8b2f4a3e-0000-4000-8000-000000000001", fresh=False, nvram=None), SAME)
    root = ElementTree.fromstring(mapped.xml)
    assert mapped.notes == []
    assert [one.get("address") for one in root.iterfind("devices/interface/mac")] == [
        "52:54:00:00:00:01",
        "52:54:00:00:00:02",
    ]
    assert root.findtext("os/nvram") == "/old/VARS.fd"
    assert len(root.findall("devices/disk")) == 6, "also those that it shares"


def test_networks_are_connected_only_where_asked() -> None:
    named = ElementTree.fromstring(fit(XML, target(network="lab"), HOST).xml)
    assert [one.find("source").get("network") for one in named.iterfind("devices/interface")] == ["lab", "lab"]
    down = ElementTree.fromstring(fit(XML, target(network="disconnected"), SAME).xml)
    assert [one.find("link").get("state") for one in down.iterfind("devices/interface")] == ["down", "down"]
    assert down.find("devices/interface/source").get("network") == "prod"
