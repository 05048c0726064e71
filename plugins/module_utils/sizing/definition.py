# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another size in a domain's definition: pure edits of its XML that keep maximum, topology and NUMA in step.

https://libvirt.org/formatdomain.html#cpu-allocation, #memory-allocation, #guest-numa-topology
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

from ..hypervisor.domain_model import Domain, DomainState, cell_bytes, cpu_list, parse_domain, read_bytes

_MIB = 1 << 20
_KIB = 1 << 10

#: Slots of a domain that is given room for memory; QEMU allows 256, and each costs a little address space only.
SLOTS = 16


@dataclass(frozen=True)
class Wish:
    """What the definition shall say; None leaves a thing as it is. Memory in bytes."""

    vcpus: int | None = None
    max_vcpus: int | None = None
    memory: int | None = None
    max_memory: int | None = None


def configured_memory(domain: Domain) -> int:
    """Bytes that the guest gets from this definition, virtio-mem with what it requests."""
    devices = [device for device in domain.memory_devices if device.model == "virtio-mem"]
    fixed = domain.memory_max - sum(device.size for device in devices)
    return min(domain.memory_current, fixed) + sum(device.requested for device in devices)


def resized(xml: str, wish: Wish) -> str:
    """The definition with another size, or the very same text when it has that size already."""
    domain = parse_domain(xml, DomainState("shutoff"))
    root = ElementTree.fromstring(xml)
    changed = False
    maximum = wish.max_vcpus or max(domain.vcpus_max, wish.vcpus or 0)
    current = wish.vcpus or domain.vcpus_current
    if (maximum, current) != (domain.vcpus_max, domain.vcpus_current):
        _set_vcpus(root, domain, current, maximum)
        changed = True
    if wish.max_memory is not None and wish.max_memory != domain.memory_limit:
        _set_limit(root, domain, wish.max_memory)
        changed = True
    if wish.memory is not None and wish.memory != configured_memory(domain):
        _set_memory(root, domain, wish.memory)
        changed = True
    return ElementTree.tostring(root, encoding="unicode") if changed else xml


#: What :func:`resized` writes into.
_SIZES = ("vcpu", "vcpus", "memory", "currentMemory", "maxMemory", "cpu/topology", "cpu/numa", "devices/memory")


def is_resized(old: str, now: str, new: str) -> bool:
    """Whether ``now`` is ``new`` as libvirt keeps it: of that size, and apart from its size as ``old``."""
    return _rest(now) == _rest(old) and _size(now) == _size(new)


def _size(xml: str) -> tuple[int | None, ...]:
    domain = parse_domain(xml, DomainState("shutoff"))
    return (domain.vcpus_current, domain.vcpus_max, configured_memory(domain), domain.memory_max, domain.memory_limit)


def _rest(xml: str) -> str:
    root = ElementTree.fromstring(xml)
    for path in (*_SIZES, "cputune/vcpupin", "cputune/vcpusched"):
        above, _slash, name = path.rpartition("/")
        for parent in root.findall(above) if above else [root]:
            for element in parent.findall(name):
                parent.remove(element)
    for name in ("cpu", "cputune"):  # made for what was taken out, or empty without it
        for element in root.findall(name):
            if not len(element) and not element.attrib:
                root.remove(element)
    for element in root.iter():
        element.text, element.tail = (element.text or "").strip(), ""
    return ElementTree.tostring(root, encoding="unicode")


# --- vCPUs -------------------------------------------------------------------------------------------


def _set_vcpus(root: ElementTree.Element, domain: Domain, current: int, maximum: int) -> None:
    vcpu = root.find("vcpu")
    if vcpu is None:
        vcpu = ElementTree.SubElement(root, "vcpu", placement="static")
    vcpu.text = str(maximum)
    vcpu.attrib.pop("current", None)
    if current < maximum:
        vcpu.set("current", str(current))
    listed = root.find("vcpus")
    if listed is not None:
        root.remove(listed)
    if domain.arch in ("x86_64", "i686", None):
        # What is added is defined hot-pluggable, so that it can be unplugged again. Elsewhere (ppc64) vCPUs come by cores,
        # and libvirt's default is the only safe choice.
        root.insert(list(root).index(vcpu) + 1, _vcpu_list(domain, current, maximum))
    if maximum != domain.vcpus_max:
        _fit_topology(root, maximum)
        _fit_numa(root, maximum)
        for pin in root.findall("cputune/vcpupin") + root.findall("cputune/vcpusched"):
            _trim_cpus(root, pin, maximum)


def _vcpu_list(domain: Domain, current: int, maximum: int) -> ElementTree.Element:
    # Plugged vCPUs are not the first ones: those that the domain boots with come first and stay as they are.
    fixed = {vcpu.id for vcpu in domain.vcpus if not vcpu.hotpluggable and vcpu.enabled}
    if not domain.vcpus:
        fixed = set(range(domain.vcpus_current))
    fixed |= {0}
    element = ElementTree.Element("vcpus")
    for number in range(maximum):
        enabled = number < current
        ElementTree.SubElement(
            element,
            "vcpu",
            id=str(number),
            enabled="yes" if enabled else "no",
            hotpluggable="no" if enabled and number in fixed else "yes",
        )
    return element


def _fit_topology(root: ElementTree.Element, maximum: int) -> None:
    """Keep threads, cores and dies where the number allows it, else fall back to plain sockets."""
    topology = root.find("cpu/topology")
    if topology is None:
        return
    per_socket = 1
    for name in ("dies", "clusters", "cores", "threads"):
        per_socket *= int(topology.get(name, "1"))
    if maximum % per_socket == 0:
        topology.set("sockets", str(maximum // per_socket))
        return
    threads = int(topology.get("threads", "1"))
    topology.set("sockets", "1")
    for name in ("dies", "clusters"):
        if topology.get(name):
            topology.set(name, "1")
    threads = threads if maximum % threads == 0 else 1
    topology.set("threads", str(threads))
    topology.set("cores", str(maximum // threads))


def _fit_numa(root: ElementTree.Element, maximum: int) -> None:
    """New vCPUs join the last cell that has any; those that are gone leave theirs."""
    cells = root.findall("cpu/numa/cell")
    placed = {number for cell in cells for number in cpu_list(cell.get("cpus", ""))}
    with_cpus = [cell for cell in cells if cell.get("cpus")]
    for cell in cells:
        kept = {number for number in cpu_list(cell.get("cpus", "")) if number < maximum}
        if with_cpus and cell is with_cpus[-1]:
            kept |= set(range(maximum)) - placed
        _set_list(cell, "cpus", kept)


def _trim_cpus(root: ElementTree.Element, pin: ElementTree.Element, maximum: int) -> None:
    name = "vcpu" if pin.tag == "vcpupin" else "vcpus"
    kept = {number for number in cpu_list(pin.get(name, "")) if number < maximum}
    if kept:
        _set_list(pin, name, kept)
        return
    for parent in root.iterfind("cputune"):
        if pin in list(parent):
            parent.remove(pin)


def _set_list(element: ElementTree.Element, name: str, numbers: Iterable[int]) -> None:
    text = cpu_text(numbers)
    if text:
        element.set(name, text)
    else:
        element.attrib.pop(name, None)


def cpu_text(numbers: Iterable[int]) -> str:
    """CPUs as libvirt writes them: ``0-3,6``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


# --- memory ------------------------------------------------------------------------------------------


def _set_memory(root: ElementTree.Element, domain: Domain, wanted: int) -> None:
    """Let the guest get ``wanted`` bytes at its next start.

    Room below ``<memory>`` that the definition keeps for the balloon stays.  virtio-mem keeps its part.  DIMMs become
    ordinary memory when the guest gets less than them: not every guest brings a DIMM online at boot.
    """
    virtio = [device for device in domain.memory_devices if device.model == "virtio-mem"]
    dimms = sum(device.size for device in domain.memory_devices if device.model != "virtio-mem")
    capacity = sum(device.size for device in virtio)
    fixed = domain.memory_max - capacity
    if virtio:
        _request_virtio_mem(root, domain, max(0, wanted - fixed))
        wanted -= sum(_requested(element) for element in _devices(root, "virtio-mem"))
    if domain.memory_current < fixed and wanted <= fixed:
        _set_bytes(root, "currentMemory", wanted)
        return
    boot = wanted - dimms
    if boot < fixed - dimms and dimms:
        for element in _devices(root, "dimm"):
            _parent(root, "devices").remove(element)
        boot, dimms = wanted, 0
    _set_bytes(root, "memory", boot + dimms + capacity)
    _set_bytes(root, "currentMemory", boot + dimms)
    limit = root.find("maxMemory")
    if limit is not None and read_bytes(root, "maxMemory") < boot + dimms + capacity:
        _set_bytes(root, "maxMemory", boot + dimms + capacity)
    _fit_cells(root, boot)


def _request_virtio_mem(root: ElementTree.Element, domain: Domain, wanted: int) -> None:
    for element in _devices(root, "virtio-mem"):
        target = element.find("target")
        if target is None:
            continue
        device = next((one for one in domain.memory_devices if one.model == "virtio-mem"), None)
        size = read_bytes(target, "size")
        block = read_bytes(target, "block") or (device.block if device else 1) or 1
        take = min(size, wanted)
        take -= take % block
        _set_bytes(target, "requested", take)
        wanted -= take


def _requested(element: ElementTree.Element) -> int:
    target = element.find("target")
    return read_bytes(target, "requested") if target is not None else 0


def _devices(root: ElementTree.Element, model: str) -> list[ElementTree.Element]:
    return [element for element in root.iterfind("devices/memory") if element.get("model") == model]


def _parent(root: ElementTree.Element, path: str) -> ElementTree.Element:
    found = root.find(path)
    return found if found is not None else root


def _fit_cells(root: ElementTree.Element, boot: int) -> None:
    """Share boot memory out to the NUMA cells as before, in whole MiB; the last cell takes the rest."""
    cells = root.findall("cpu/numa/cell")
    if not cells:
        return
    shares = [cell_bytes(cell) for cell in cells]
    total = sum(shares) or 1
    given = 0
    for cell, share in zip(cells[:-1], shares[:-1]):
        size = boot * share // total // _MIB * _MIB
        _set_cell(cell, size)
        given += size
    _set_cell(cells[-1], boot - given)


def _set_cell(cell: ElementTree.Element, size: int) -> None:
    cell.set("memory", str(size // _KIB))
    cell.set("unit", "KiB")


def _set_limit(root: ElementTree.Element, domain: Domain, wanted: int) -> None:
    """Give room for memory to be plugged. libvirt plugs into NUMA cells only and makes none itself before 9.6."""
    _set_bytes(root, "maxMemory", wanted)
    limit = _parent(root, "maxMemory")
    if not limit.get("slots"):
        limit.set("slots", str(max(SLOTS, domain.memory_slots)))
    if root.find("cpu/numa/cell") is not None:
        return
    cpu = root.find("cpu")
    if cpu is None:
        cpu = ElementTree.SubElement(root, "cpu")
    numa = cpu.find("numa")
    if numa is None:
        numa = ElementTree.SubElement(cpu, "numa")
    vcpu = root.find("vcpu")
    maximum = int((vcpu.text or "1").strip()) if vcpu is not None else 1
    devices = sum(device.size for device in domain.memory_devices)
    cell = ElementTree.SubElement(numa, "cell", id="0", cpus=cpu_text(range(maximum)))
    _set_cell(cell, domain.memory_max - devices)


def _set_bytes(root: ElementTree.Element, tag: str, size: int) -> None:
    element = root.find(tag)
    if element is None:
        element = ElementTree.SubElement(root, tag)
    element.set("unit", "KiB")
    element.text = str(size // _KIB)
