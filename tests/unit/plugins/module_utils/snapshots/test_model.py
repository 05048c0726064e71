# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import model
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.model import (
    Labels,
    parse_snapshot,
    with_labels,
)

XML = """<domainsnapshot><name>before</name><description>old</description><state>disk-snapshot</state>
<parent><name>first</name></parent><creationTime>1795000000</creationTime><memory snapshot='no'/>
<disks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='/top'/></disk>
<disk name='vdb' snapshot='no'/></disks>
<domain type='kvm'><name>web</name><metadata><other:x xmlns:other='urn:other'>kept</other:x></metadata><devices>
<disk type='file' device='disk'><driver type='raw'/><source file='/base'/><target dev='vda'/></disk>
<disk type='block' device='disk'><driver type='raw'/><source dev='/dev/x'/><target dev='vdb'/></disk>
<graphics type='vnc' passwd='secret'/></devices></domain></domainsnapshot>"""

LABELS = Labels(
    "application",
    frozen_ms=120,
    paused_ms=3,
    mode_reason="because",
    tags={"a": "<b> & ümlaut"},
    not_captured=({"kind": "disk", "name": "vdb", "reason": "excluded", "why": "x"},),
    protected=True,
)


def test_labels_survive_the_way_through_text():
    assert Labels.from_text(LABELS.to_text()) == LABELS


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "7", '"x"', "{}", '{"consistency": "crash"}'])
def test_labels_that_cannot_be_understood_are_none(text):
    assert Labels.from_text(text) is None


def test_a_snapshot_becomes_data():
    found = parse_snapshot(XML, current=True)
    assert (found.name, found.parent, found.description, found.state) == ("before", "first", "old", "disk-snapshot")
    assert (found.mode, found.consistency, found.labels) == ("external", "crash", None)
    assert [(one.target, one.base, one.base_format, one.overlay) for one in found.captured] == [
        ("vda", "/base", "raw", "/top")
    ]
    assert found.created.utcoffset().total_seconds() == 0
    assert found.as_result("web")["current"] is True


def test_labels_live_in_the_snapshots_xml_and_nothing_in_it_is_lost():
    once = with_labels(XML, Labels("crash"))
    twice = with_labels(once, LABELS, description="new")
    found = parse_snapshot(twice)
    assert found.labels == LABELS
    assert found.description == "new"
    assert found.consistency == "application"
    assert twice.count(f"{model.NAMESPACE}") == 1
    assert "kept" in twice
    assert 'passwd="secret"' in twice
    assert found.as_result("web")["tags"] == {"a": "<b> & ümlaut"}


def test_labels_and_description_where_there_was_no_place_for_them():
    bare = "<domainsnapshot><name>a</name><domain/></domainsnapshot>"
    found = parse_snapshot(with_labels(bare, LABELS, description="d"))
    assert (found.labels, found.description) == (LABELS, "d")


@pytest.mark.parametrize(
    ("memory", "state", "level"),
    [
        ("no", "disk-snapshot", "crash"),
        ("no", "shutoff", "crash"),
        ("external", "running", "memory"),
        ("internal", "paused", "memory"),
    ],
)
def test_what_is_said_of_a_snapshot_that_is_not_ours(memory, state, level):
    found = parse_snapshot(
        f"<domainsnapshot><name>a</name><state>{state}</state><memory snapshot='{memory}' file='/m'/></domainsnapshot>"
    )
    assert found.consistency == level
    assert found.mode == ("internal" if memory == "internal" else "external")


@pytest.fixture
def domain():
    """A domain of libvirt's own test driver."""
    libvirt = pytest.importorskip("libvirt")
    libvirt.registerErrorHandler(lambda *_: None, None)
    connection = libvirt.open("test:///default")
    domain = connection.lookupByName("test")
    yield domain
    for one in domain.listAllSnapshots():
        one.delete()
    connection.close()


def test_labels_are_stored_in_libvirt_and_the_current_snapshot_stays_current(domain):
    domain.snapshotCreateXML("<domainsnapshot><name>a</name></domainsnapshot>", 0)
    domain.snapshotCreateXML("<domainsnapshot><name>b</name></domainsnapshot>", 0)
    model.write_labels(domain, "a", LABELS, description="d")
    model.write_labels(domain, "b", Labels("crash"))
    first, second = model.read_snapshots(domain)
    assert (first.name, first.labels, first.description, first.current) == ("a", LABELS, "d", False)
    assert (second.name, second.parent, second.current) == ("b", "a", True)
    assert model.by_name((first, second), "c") is None
