# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The lab's tiny guests, defined inside a nested hypervisor."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from lab import assets, images
from lab.spec import PREFIX, Boot, GuestSpec, command_line, domain_xml
from lab.waiting import until

from .machine import Machine, MachineError

IMAGES = "/var/lib/libvirt/images/lab"
IN_GUEST = Path(__file__).resolve().parents[2] / "extensions/molecule/shared/in_guest.py"
BOOT = "/var/lib/libvirt/boot"
KEPT = ("/srv/backup", "/srv/images", "/tmp/*.raw")
"""Where scenarios keep what is not a guest's."""

JOURNAL = "/var/lib/vmkeeper.libvirt/journal"
OURS = ("/var/lib/vmkeeper.libvirt", "/var/lib/libvirt/vmkeeper")
"""Where the collection keeps what is its own."""

BOOT_SECONDS = 1800.0
"""How long guests may take to boot: half a minute in an emulated hypervisor on an idle computer, many minutes on a busy one."""


def place(machine: Machine, spec: GuestSpec, *, start: bool = True) -> str:
    """Define ``spec`` in ``machine`` and start it; the domain's name. Does not wait for the guest to boot.

    Its images, made here, are ``/var/lib/libvirt/images/lab/NAME/TARGET.FORMAT`` there. Only disks of kind ``file`` without
    backing are known here. The domain is of type ``kvm`` wherever the machine has ``/dev/kvm``.
    """
    built = assets.guest_assets()
    boot_files = {f"{BOOT}/lab-{built.digest}-{file.name}": file for file in (built.kernel, built.initramfs)}
    for place_there, file in boot_files.items():
        if machine.ssh(f"test -e {place_there}").returncode != 0:
            machine.put(file, place_there)
    boot_disk = images.BootFiles(built.kernel, built.initramfs, command_line(spec))
    directory = f"{IMAGES}/{spec.name}"
    with tempfile.TemporaryDirectory(prefix="nested-") as scratch:
        for disk in spec.disks:
            image = Path(scratch) / f"{disk.target}.{disk.format}"
            images.make_image(disk, image, boot_disk)
            machine.put(image, f"{directory}/{image.name}")
        kernel, initramfs = (Path(name) for name in boot_files)
        sources = {disk.target: f"<source file='{directory}/{disk.target}.{disk.format}'/>" for disk in spec.disks}
        accelerated = machine.ssh("test -w /dev/kvm").returncode == 0
        boot = Boot("kvm" if accelerated else "qemu", kernel, initramfs, serial_log(spec.name), sources)
        definition = Path(scratch) / "domain.xml"
        definition.write_text(domain_xml(spec, boot))
        machine.put(definition, f"/tmp/{PREFIX}{spec.name}.xml")
    machine.run(f"chmod 711 {IMAGES} {directory}; virsh --quiet define /tmp/{PREFIX}{spec.name}.xml")
    if start:
        machine.run(f"virsh --quiet start {PREFIX}{spec.name}")
    return PREFIX + spec.name


def wait_agent(machine: Machine, domain: str) -> None:
    """Wait until the guest's agent answers, which it does once the disks are mounted.

    Raises TimeoutError, or MachineError when the hypervisor has ended.
    """
    ask = f'virsh --quiet qemu-agent-command {domain} \'{{"execute":"guest-ping"}}\''

    def answers() -> bool:
        machine.require_running()
        return machine.ssh(ask).returncode == 0

    until(answers, f"the agent of {domain}", timeout=BOOT_SECONDS, interval=1)


def execute(machine: Machine, domain: str, command: str) -> str:
    """Run a shell command line in the guest, through its agent and without the collection; its stdout. Raises MachineError."""
    program = f"/tmp/{IN_GUEST.name}"
    machine.put(IN_GUEST, program)
    return machine.run(f"/usr/bin/python3 {program} {domain} /bin/sh -c {shlex.quote(command)}")


def acceleration(machine: Machine, domain: str) -> str:
    """The domain's type: ``kvm`` or ``qemu``."""
    return machine.run(f"virsh dumpxml {domain} --xpath /domain/@type").strip().split('"')[1]


def running(machine: Machine) -> list[str]:
    """The names of the guests that run."""
    return [name for name in machine.run("virsh list --name").split() if name.startswith(PREFIX)]


def clear(machine: Machine) -> None:
    """Remove all guests, as an operator would who has to, what was kept beside them, and all that the collection remembers.

    Raises MachineError, once that is done, when tasks had left something unfinished: no scenario ends so.
    """
    left = unfinished(machine)
    machine.run(
        f"for domain in $(virsh list --all --name | grep ^{PREFIX}); do"
        "  virsh destroy $domain >/dev/null 2>&1;"
        "  virsh undefine $domain --managed-save --snapshots-metadata --checkpoints-metadata --nvram || exit 1;"
        "done; findmnt --noheadings --raw --output TARGET | grep ^/var/lib/libvirt/vmkeeper/ | xargs -r umount;"
        f"rm -rf {IMAGES} {' '.join((*KEPT, *OURS))} /var/log/libvirt/qemu/{PREFIX}*"
    )
    if left:
        raise MachineError(f"{machine.name}: tasks had left this unfinished, which is removed now:\n{left}")


def unfinished(machine: Machine) -> str:
    """What tasks have left: journals, and guards that do not go home within a minute; empty where that is nothing."""
    guards = "systemctl list-units --plain --no-legend --state=active 'vmkeeper-guard-*'"
    return machine.run(
        f"find {JOURNAL} -type f -exec grep -H . {{}} + 2>/dev/null;"
        f'for i in $(seq 60); do guards=$({guards}); [ -n "$guards" ] || exit 0; sleep 1; done; echo "$guards"'
    ).strip()


def serial_log(name: str) -> Path:
    """Where the guest's console is written, inside the machine."""
    return Path(f"/var/log/libvirt/qemu/{PREFIX}{name}-serial.log")
