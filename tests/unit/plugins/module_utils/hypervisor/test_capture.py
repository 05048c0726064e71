# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput, NotFound
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.capture import REASONS, choose
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Disk,
    Domain,
    DomainState,
    HostShare,
    Layer,
    Nvram,
)


def disk(target, path="/images/x", **options):
    device, kind = options.pop("device", "disk"), options.pop("kind", "file")
    return Disk(target, device, kind, "virtio", (Layer(path, "qcow2"),) if path else (), **options)


DOMAIN = Domain(
    "web",
    "uuid",
    DomainState("running"),
    True,
    (
        disk("vda"),
        disk("vdb", transient=True),
        disk("vdc", readonly=True),
        disk("vdd", shareable=True),
        disk("vde", snapshot="no"),
        disk("vdf", kind="network", path=None),
        disk("sda", device="cdrom", readonly=True),
        disk("fda", device="floppy"),
        disk("sdb", device="lun", kind="block"),
        disk("vdg"),
    ),
    nvram=Nvram("/vars.fd"),
    has_tpm=True,
    shares=(HostShare("/srv", "share"),),
    hostdevs=("pci 0000:01:02.0",),
    nvram_elsewhere="/dev/vg/vars",
    persistent_memory=("/var/lib/pmem",),
)


def reasons(capture):
    return {part.name: part.reason for part in capture.left_out}


def test_everything_is_captured_or_listed_with_its_reason():
    capture = choose(DOMAIN)
    assert [one.target for one in capture.disks] == ["vda", "vdg"]
    assert reasons(capture) == {
        "vdb": "transient",
        "vdc": "read-only",
        "vdd": "shareable",
        "vde": "snapshot-no",
        "vdf": "not-local",
        "sda": "cdrom",
        "fda": "floppy",
        "sdb": "passthrough",
        "/vars.fd": "nvram",
        "/dev/vg/vars": "nvram",
        "/var/lib/pmem": "nvdimm",
        "tpm": "tpm",
        "share": "host-shared",
        "pci 0000:01:02.0": "passthrough",
    }
    assert all(part.as_result()["why"] == REASONS[part.reason] for part in capture.left_out)


def test_nvram_that_is_carried_is_not_listed():
    assert "/vars.fd" not in reasons(choose(DOMAIN, carries_nvram=True))


def test_the_task_chooses_and_is_more_specific_than_the_definition():
    assert [one.target for one in choose(DOMAIN, disks=["vde"]).disks] == ["vde"]
    assert reasons(choose(DOMAIN, disks=["vde"]))["vda"] == "excluded"
    assert reasons(choose(DOMAIN, exclude=["vdg"]))["vdg"] == "excluded"


def test_removable_media_are_listed_and_not_warned_about():
    warning = choose(DOMAIN).warning("web")
    assert "vdb (transient)" in warning
    assert "sda" not in warning
    assert choose(Domain("x", "u", DomainState("running"), True, (disk("vda"),))).warning("x") is None


@pytest.mark.parametrize("target", ["vdb", "vdc", "vdd", "vdf", "sda", "fda", "sdb"])
def test_naming_what_cannot_be_captured_is_an_error(target):
    with pytest.raises(InvalidInput, match="cannot be captured"):
        choose(DOMAIN, disks=[target])


def test_unknown_and_contradictory_names_are_errors():
    with pytest.raises(NotFound) as error:
        choose(DOMAIN, exclude=["vdz"])
    assert error.value.facts["existing"][0] == "vda"
    with pytest.raises(InvalidInput, match="both name vda"):
        choose(DOMAIN, disks=["vda"], exclude=["vda"])


def test_a_slice_is_left_out_and_refused_by_name():
    """What copies the image of a stopped domain, or stands on it, would take the whole file for the disk."""
    domain = replace(DOMAIN, disks=(disk("vda"), disk("vdb", sliced=True)))
    assert reasons(choose(domain))["vdb"] == "slice"
    with pytest.raises(InvalidInput, match="only a part"):
        choose(domain, disks=["vdb"])


@pytest.mark.parametrize(("storage", "word"), [("thin-lvm", "thin LVM"), ("zfs", "ZFS")])
def test_thin_and_zfs_volumes_are_left_out_and_refused_by_name(storage, word):
    domain = replace(DOMAIN, disks=(disk("vda"), disk("vdb", "/dev/vg0/web", kind="block", storage=storage)))
    capture = choose(domain)
    assert reasons(capture)["vdb"] == storage
    assert f"vdb ({storage})" in capture.warning("web")
    with pytest.raises(InvalidInput, match=f"it is a {word} volume, which is not handled yet"):
        choose(domain, disks=["vdb"])
