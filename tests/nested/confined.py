# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A guest that AppArmor confines, in a nested hypervisor."""

from __future__ import annotations

from typing import Any

from lab.spec import DiskSpec, GuestSpec

from . import guest, task
from .machine import Machine


class Confined:
    """A guest with one disk, and what is done to it by virsh or by a task."""

    def __init__(self, hypervisor: Machine, name: str, *, writer: bool = True, start: bool = True) -> None:
        self.hypervisor = hypervisor
        self.directory = f"{guest.IMAGES}/{name}"
        self.base = f"{self.directory}/vda.qcow2"
        self.name = guest.place(hypervisor, GuestSpec(name, disks=(DiskSpec("vda", writer=writer),)), start=start)

    def virsh(self, command: str, *arguments: str) -> str:
        return self.hypervisor.run(f"virsh --quiet {command} {self.name} {' '.join(arguments)}").strip()

    def snapshot(self, overlay: str) -> str:
        self.virsh("snapshot-create-as", "--disk-only --atomic --no-metadata", f"--diskspec vda,file={overlay}")
        return overlay

    def restart(self, how: str = "") -> None:
        self.virsh("destroy")
        self.virsh(f"start {how}")

    def is_running(self) -> bool:
        return self.virsh("domstate") == "running"

    def task(self, module: str, **arguments: object) -> dict[str, Any]:
        return task.run(self.hypervisor, module, domain=self.name, **arguments)

    def active(self) -> str:
        return self.virsh("domblklist").split()[-1]

    def denied(self) -> list[str]:
        """The images that the profile forbids to write."""
        uuid = self.virsh("domuuid")
        lines = self.hypervisor.run(f"cat /etc/apparmor.d/libvirt/libvirt-{uuid}.files").splitlines()
        words = [line.split('"') for line in lines if line.strip().startswith("deny")]
        return [word[1] for word in words if word[1].endswith((".qcow2", ".s1", ".s2"))]
