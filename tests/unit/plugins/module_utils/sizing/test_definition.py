# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another size in a definition keeps everything else in step."""

from __future__ import annotations

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Domain,
    DomainState,
    cpu_list,
    parse_domain,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.sizing.definition import (
    Wish,
    configured_memory,
    cpu_text,
    is_resized,
    resized,
)

MIB = 1 << 20


def definition(body: str = "", vcpu: str = "<vcpu>2</vcpu>", devices: str = "") -> str:
    return (
        "<domain type='kvm'><name>d</name><uuid>1</uuid><memory unit='MiB'>512</memory>"
        f"<currentMemory unit='MiB'>512</currentMemory>{vcpu}<os><type arch='x86_64'>hvm</type></os>{body}"
        f"<devices>{devices}</devices></domain>"
    )


def after(xml: str, wish: Wish) -> Domain:
    return parse_domain(resized(xml, wish), DomainState("shutoff"))


def test_a_definition_that_has_the_size_is_returned_as_it_is():
    xml = definition()
    assert resized(xml, Wish(vcpus=2, memory=512 * MIB)) is xml


def test_more_vcpus_than_the_maximum_raise_it_and_come_hot_pluggable():
    domain = after(definition(), Wish(vcpus=4))
    assert (domain.vcpus_current, domain.vcpus_max) == (4, 4)
    assert [vcpu.hotpluggable for vcpu in domain.vcpus] == [False, False, True, True]


def test_fewer_vcpus_keep_the_maximum():
    domain = after(definition(), Wish(vcpus=1))
    assert (domain.vcpus_current, domain.vcpus_max) == (1, 2)


@pytest.mark.parametrize(
    ("before", "maximum", "expected"),
    [
        ("sockets='1' cores='2' threads='1'", 8, (4, 1, 2, 1)),
        ("sockets='1' dies='1' cores='2' threads='2'", 8, (2, 1, 2, 2)),
        ("sockets='1' cores='2' threads='2'", 6, (1, 1, 3, 2)),
        ("sockets='1' cores='2' threads='2'", 5, (1, 1, 5, 1)),
    ],
)
def test_the_topology_always_multiplies_to_the_maximum(before, maximum, expected):
    domain = after(definition(f"<cpu><topology {before}/></cpu>"), Wish(max_vcpus=maximum))
    found = domain.topology
    assert (found.sockets, found.dies, found.cores, found.threads) == expected


def test_new_vcpus_join_the_last_numa_cell_and_gone_ones_leave_theirs():
    cells = "<cpu><numa><cell id='0' cpus='0' memory='256' unit='MiB'/><cell id='1' cpus='1' memory='256' unit='MiB'/></numa></cpu>"
    grown = after(definition(cells), Wish(max_vcpus=4))
    assert [cell.cpus for cell in grown.numa_cells] == [(0,), (1, 2, 3)]
    smaller = after(definition(cells), Wish(vcpus=1, max_vcpus=1))
    assert [cell.cpus for cell in smaller.numa_cells] == [(0,), ()]


def test_pinning_of_vcpus_that_are_gone_goes_too():
    tune = "<cputune><vcpupin vcpu='0' cpuset='0'/><vcpupin vcpu='1' cpuset='1'/></cputune>"
    xml = resized(definition(tune), Wish(vcpus=1, max_vcpus=1))
    assert "vcpupin" in xml
    assert 'vcpu="1"' not in xml


def test_memory_is_shared_out_to_the_numa_cells_as_before():
    cells = "<cpu><numa><cell id='0' cpus='0' memory='384' unit='MiB'/><cell id='1' cpus='1' memory='128' unit='MiB'/></numa></cpu>"
    domain = after(definition(cells), Wish(memory=1024 * MIB))
    assert [cell.memory for cell in domain.numa_cells] == [768 * MIB, 256 * MIB]
    assert domain.memory_max == domain.memory_current == 1024 * MIB


def test_room_for_memory_brings_a_numa_cell():
    domain = after(definition(), Wish(max_memory=4096 * MIB))
    assert domain.memory_limit == 4096 * MIB
    assert domain.memory_slots > 0
    assert [(cell.cpus, cell.memory) for cell in domain.numa_cells] == [((0, 1), 512 * MIB)]


def test_room_and_memory_at_once_agree():
    domain = after(definition(), Wish(memory=1024 * MIB, max_memory=4096 * MIB))
    assert (domain.memory_limit, domain.memory_max) == (4096 * MIB, 1024 * MIB)
    assert [cell.memory for cell in domain.numa_cells] == [1024 * MIB]


def test_memory_beyond_its_room_raises_the_room():
    domain = after(definition("<maxMemory slots='4' unit='MiB'>768</maxMemory>"), Wish(memory=1024 * MIB))
    assert domain.memory_limit == 1024 * MIB


def test_room_that_is_kept_for_the_balloon_stays():
    xml = definition().replace("<currentMemory unit='MiB'>512", "<currentMemory unit='MiB'>256")
    domain = after(xml, Wish(memory=384 * MIB))
    assert (domain.memory_max, domain.memory_current) == (512 * MIB, 384 * MIB)


DIMM = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>"


def test_a_dimm_stays_when_the_guest_grows_and_goes_when_it_gets_less():
    assert len(after(definition(devices=DIMM), Wish(memory=640 * MIB)).memory_devices) == 1
    smaller = after(definition(devices=DIMM), Wish(memory=256 * MIB))
    assert smaller.memory_devices == ()
    assert smaller.memory_max == 256 * MIB


VIRTIO = (
    "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node><block unit='MiB'>2</block>"
    "<requested unit='MiB'>0</requested></target></memory>"
)


@pytest.mark.parametrize(
    ("wanted", "requested", "boot"), [(256, 0, 256), (320, 64, 256), (321, 64, 257), (640, 256, 384)]
)
def test_virtio_mem_keeps_its_part(wanted, requested, boot):
    domain = after(definition(devices=VIRTIO), Wish(memory=wanted * MIB))
    assert configured_memory(domain) == wanted * MIB
    assert domain.memory_devices[0].requested == requested * MIB
    assert domain.memory_max == (boot + 256) * MIB


@pytest.mark.parametrize(("text", "numbers"), [("0-3,^2,6", (0, 1, 3, 6)), ("", ()), ("5", (5,))])
def test_lists_of_cpus_are_read_as_libvirt_writes_them(text, numbers):
    assert cpu_list(text) == numbers
    assert cpu_list(cpu_text(numbers)) == numbers


def test_what_a_run_has_stored_is_told_from_what_somebody_has_edited_since():
    old = definition(body="<on_crash>destroy</on_crash>")
    new = resized(old, Wish(vcpus=4, memory=1024 * MIB, max_memory=4096 * MIB))
    assert is_resized(old, new.replace("><", ">\n  <"), new), "libvirt writes it more beautifully"
    assert not is_resized(old, old, new), "another size"
    assert not is_resized(old, new.replace(">destroy<", ">preserve<"), new), "edited"


def test_sizes_in_units_of_ten_are_read_as_libvirt_means_them():
    xml = definition().replace("unit='MiB'>512", "unit='MB'>1000")
    limited = xml.replace("<memory", "<maxMemory unit='GB' slots='16'>2</maxMemory><memory", 1)
    assert after(limited, Wish(memory=1536 * MIB)).memory_limit == 2_000_000_000
