# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import backup_job


def running(directory: str) -> str:
    root = ElementTree.Element("domainbackup", mode="push")
    disk = ElementTree.SubElement(ElementTree.SubElement(root, "disks"), "disk", name="vda", backup="yes", type="file")
    ElementTree.SubElement(disk, "target", file=f"{directory}/vda.qcow2")
    ElementTree.SubElement(root[0], "disk", name="vdb", backup="no")
    # libvirt escapes apostrophes and quotation marks, too.
    return ElementTree.tostring(root, encoding="unicode").replace("'", "&apos;")


@pytest.mark.parametrize("directory", ["/srv/backup/.new-1", "/srv/R&D 'a' \"b\" <c>/.new-1"])
def test_a_job_is_known_by_the_directory_that_it_writes_into(directory: str) -> None:
    assert backup_job.writes_into(running(directory), directory)
    assert not backup_job.writes_into(running(f"{directory}2"), directory)
    assert not backup_job.writes_into(running(f"{directory}/deeper"), directory)
    assert not backup_job.writes_into("<domainbackup mode='pull'><disks/></domainbackup>", directory)
