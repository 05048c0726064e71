# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What a lab guest is to look like: frozen dataclasses, and the domain XML made of them (no effects)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

PREFIX = "lab-"
"""Every domain, pool and directory that the lab makes has a name that starts so."""

AGENT_PORT = "org.qemu.guest_agent.0"
LAB_PORT = "org.vmkeeper.lab.0"

MIB = 1 << 20
UEFI_MINIMUM = 256  # in MiB; with less, OVMF crashes while it loads the initramfs
XFS_MINIMUM = 300 * MIB  # mkfs.xfs since 5.19 refuses less

OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
OVMF_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


@dataclasses.dataclass(frozen=True)
class DiskSpec:
    """One disk. ``size`` is in bytes. ``fs`` is made on the host before the first start, unless ``backing`` is given:
    then the disk is a qcow2 overlay over that file and is mounted as it is."""

    target: str
    size: int = 128 * MIB
    format: Literal["qcow2", "raw"] = "qcow2"
    kind: Literal["file", "block", "volume"] = "file"
    fs: Literal["ext4", "xfs"] | None = "ext4"
    partitioned: bool = False
    writer: bool | Literal["sync"] = True
    bus: Literal["virtio", "scsi"] = "virtio"
    transient: bool = False
    readonly: bool = False
    shareable: bool = False
    snapshot: Literal["no", "internal", "external", "manual"] | None = None
    cache: str | None = None
    discard: str | None = None
    backing: Path | None = None
    backing_format: Literal["qcow2", "raw"] = "qcow2"
    directory: Path | None = None
    """Where the image lies; default: the guest's own directory."""
    boot: bool = False
    """The guest boots from this disk (BIOS), as real machines do, not from a kernel file of the host: a DOS partition table,
    partition 1 with boot loader, kernel and initramfs, partition 2 (from 65 MiB) with ``fs``."""

    def __post_init__(self) -> None:
        if self.fs == "xfs" and self.backing is None and self.size < XFS_MINIMUM + (2 * MIB if self.partitioned else 0):
            raise ValueError(f"disk {self.target}: XFS needs {XFS_MINIMUM // MIB} MiB and more")
        if self.backing is not None and self.format != "qcow2":
            raise ValueError(f"disk {self.target}: only qcow2 can have a backing file")
        if self.boot and self.size < 80 * MIB:
            raise ValueError(f"disk {self.target}: a disk to boot from needs 80 MiB and more")
        if (self.bus == "scsi") != self.target.startswith("sd"):
            raise ValueError(f"disk {self.target}: the target name does not fit the bus {self.bus}")

    @property
    def partition(self) -> int | None:
        """The number of the partition that holds ``fs``, None when it is on the whole disk."""
        return 2 if self.boot else 1 if self.partitioned else None


@dataclasses.dataclass(frozen=True)
class GuestSpec:
    """One guest. Memory is in MiB. ``agent``:

    - ``real``: qemu-ga on the libvirt channel; ``real:guest-exec guest-file-open ...``: with these commands disabled
    - ``none``: a channel in the definition, nobody behind it
    - ``absent``: no channel at all
    - ``fake:<mode>``: see guestfs/labagent.c for the modes
    """

    name: str
    disks: tuple[DiskSpec, ...] = (DiskSpec("vda"),)
    memory: int = 160
    vcpus: int = 1
    max_vcpus: int | None = None
    max_memory: int | None = None
    memory_slots: int = 4
    agent: str = "real"
    machine: str = "q35"
    firmware: Literal["uefi"] | None = None
    cpu_xml: str = ""
    extra_cmdline: str = ""
    extra_devices: str = ""
    metadata_xml: str = ""
    spare_ports: int = 4
    hooks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """fsfreeze hooks of the guest: file name -> script, called with ``freeze`` or ``thaw``."""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """More files of the guest's initramfs: absolute path -> content (all executable)."""

    def __post_init__(self) -> None:
        """Refuse what cannot boot."""
        if self.firmware == "uefi" and self.memory < UEFI_MINIMUM:
            raise ValueError(f"guest {self.name}: UEFI firmware needs {UEFI_MINIMUM} MiB of memory")
        if self.boots_from_disk and (self.firmware == "uefi" or not self.disks[0].boot):
            raise ValueError(f"guest {self.name}: only the first disk can be booted from, and only by the BIOS")

    @property
    def boots_from_disk(self) -> bool:
        """Whether it needs no kernel file of the host."""
        return any(disk.boot for disk in self.disks)


@dataclasses.dataclass(frozen=True)
class Boot:
    """What the host has laid out for the guest before it is defined."""

    accel: str
    kernel: Path
    initramfs: Path
    serial_log: Path
    sources: Mapping[str, str]
    """Disk target -> its ``<source .../>`` element."""


def agent_word(agent: str) -> str:
    """The agent as guestfs/lab-agent takes it: one word."""
    return "none" if agent == "absent" else agent.replace(" ", ",")


def command_line(spec: GuestSpec) -> str:
    """The guest's kernel command line: read by guestfs/init."""
    words = ["console=ttyS0", "quiet", "panic=-1", "random.trust_cpu=1"]
    # A freeze waits for RCU grace periods, which emulation stretches to tens of milliseconds for each file system.
    words.append("rcupdate.rcu_expedited=1")
    # What costs emulated time and tests nothing of ours.
    words += ["mitigations=off", "nokaslr", "audit=0", "lsm=", "cryptomgr.notests", "no_timer_check"]
    # Room for hot-plugged memory above 4 GiB would make the kernel set 64 MiB of bounce buffers aside.
    words.append("swiotlb=noforce")
    words.append(f"lab.agent={agent_word(spec.agent)}")
    for disk in spec.disks:
        writer = {True: "plain", False: "none"}.get(disk.writer, "sync") if not disk.readonly else "none"  # type: ignore[arg-type]
        fs = disk.fs or "none"
        words.append(f"lab.disk={disk.target},{fs},{disk.partition or 0},{writer}")
    if spec.extra_cmdline:
        words.append(spec.extra_cmdline)
    return " ".join(words)


def domain_xml(spec: GuestSpec, boot: Boot) -> str:
    """The domain definition of ``spec``."""
    max_vcpus = spec.max_vcpus or spec.vcpus
    parts = [
        f"<domain type={quoteattr(boot.accel)}>",
        f"<name>{escape(PREFIX + spec.name)}</name>",
        f"<metadata>{spec.metadata_xml}</metadata>" if spec.metadata_xml else "",
        f"<maxMemory slots='{spec.memory_slots}' unit='MiB'>{spec.max_memory}</maxMemory>" if spec.max_memory else "",
        f"<memory unit='MiB'>{spec.memory}</memory>",
        f"<vcpu current='{spec.vcpus}'>{max_vcpus}</vcpu>",
        f"<os><type arch='x86_64' machine={quoteattr(spec.machine)}>hvm</type>",
    ]
    if spec.firmware == "uefi":
        parts.append(f"<loader readonly='yes' type='pflash'>{OVMF_CODE}</loader><nvram template='{OVMF_VARS}'/>")
    if spec.boots_from_disk:
        parts.append("<boot dev='hd'/></os>")
    else:
        parts.append(f"<kernel>{boot.kernel}</kernel><initrd>{boot.initramfs}</initrd>")
        parts.append(f"<cmdline>{escape(command_line(spec))}</cmdline></os>")
    parts += [
        "<features><acpi/><apic/></features>",
        _cpu(spec, max_vcpus),
        "<clock offset='utc'/>",
        "<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>",
        "<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>",
    ]
    if any(disk.bus == "scsi" for disk in spec.disks):
        parts.append("<controller type='scsi' model='virtio-scsi'/>")
    if spec.machine.startswith(("q35", "pc-q35")):
        parts += ["<controller type='pci' model='pcie-root'/>"]
        parts += ["<controller type='pci' model='pcie-root-port'/>"] * (spec.spare_ports + len(spec.disks) + 5)
    parts += [_disk(disk, boot.sources[disk.target]) for disk in spec.disks]
    parts.append(f"<serial type='file'><source path='{boot.serial_log}' append='on'/></serial>")
    parts.append(f"<channel type='unix'><target type='virtio' name='{LAB_PORT}'/></channel>")
    if spec.agent != "absent":
        parts.append(f"<channel type='unix'><target type='virtio' name='{AGENT_PORT}'/></channel>")
    parts += ["<memballoon model='virtio'/>", spec.extra_devices, "</devices></domain>"]
    return "\n".join(part for part in parts if part)


def _cpu(spec: GuestSpec, max_vcpus: int) -> str:
    if spec.cpu_xml or not spec.max_memory:
        return spec.cpu_xml
    # libvirt hot-plugs memory into NUMA cells only
    return f"<cpu><numa><cell id='0' cpus='0-{max_vcpus - 1}' memory='{spec.memory}' unit='MiB'/></numa></cpu>"


def _disk(disk: DiskSpec, source: str) -> str:
    driver = f"<driver name='qemu' type='{disk.format}'"
    driver += f" cache='{disk.cache}'" if disk.cache else ""
    driver += f" discard='{disk.discard}'" if disk.discard else ""
    flags = "".join(
        f"<{name}/>"
        for name, is_set in (("transient", disk.transient), ("readonly", disk.readonly), ("shareable", disk.shareable))
        if is_set
    )
    snapshot = f" snapshot='{disk.snapshot}'" if disk.snapshot else ""
    return (
        f"<disk type='{disk.kind}' device='disk'{snapshot}>{driver}/>{source}"
        f"<target dev='{disk.target}' bus='{disk.bus}'/>{flags}<serial>lab-{disk.target}</serial></disk>"
    )
