# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a task asks for, checked before anything is read or changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import InvalidInput
from ..safety import names

MIB = 1 << 20

#: libvirt's own unit is KiB; QEMU's boot memory and most guests' wishes are whole MiB.
_LEAST_MEMORY = MIB

_MOST_VCPUS = 4096


@dataclass(frozen=True)
class DiskRequest:
    """One disk: its new virtual size in bytes, None to leave it and only grow what is on it."""

    target: str
    size: int | None
    grow_filesystem: bool = True


@dataclass(frozen=True)
class Request:
    """The options. Sizes in bytes, times in seconds; None where the task leaves a thing as it is."""

    vcpus: int | None = None
    max_vcpus: int | None = None
    memory: int | None = None
    max_memory: int | None = None
    disks: tuple[DiskRequest, ...] = ()
    apply: str = "auto"
    allow_restart: bool = False
    allow_shrink: bool = False
    overcommit: bool = False
    rollback: bool = True
    health_command: tuple[str, ...] | None = None
    health_timeout: float = 300.0
    shutdown_timeout: float = 300.0


def check_request(params: Mapping[str, Any]) -> Request:
    """The module's options as a :class:`Request`; raises :class:`InvalidInput`."""
    request = Request(
        vcpus=_count(params["vcpus"], "vcpus"),
        max_vcpus=_count(params["max_vcpus"], "max_vcpus"),
        memory=_memory(params["memory"], "memory"),
        max_memory=_memory(params["max_memory"], "max_memory"),
        disks=_disks(params["disks"] or ()),
        apply=params["apply"],
        allow_restart=params["allow_restart"],
        allow_shrink=params["allow_shrink"],
        overcommit=params["overcommit"],
        rollback=params["rollback"],
        health_command=_command(params["health_command"]),
        health_timeout=_positive(params["health_timeout"], "health_timeout"),
        shutdown_timeout=_positive(params["shutdown_timeout"], "shutdown_timeout"),
    )
    asked = (request.vcpus, request.max_vcpus, request.memory, request.max_memory, request.disks or None)
    if all(one is None for one in asked):
        raise InvalidInput("Nothing to resize was named", advice="Give vcpus, memory, disks, max_vcpus or max_memory")
    if request.vcpus and request.max_vcpus and request.vcpus > request.max_vcpus:
        raise InvalidInput(
            f"vcpus {request.vcpus} is more than max_vcpus {request.max_vcpus}", advice="Raise max_vcpus"
        )
    if request.memory and request.max_memory and request.memory > request.max_memory:
        raise InvalidInput("memory is more than max_memory", advice="Raise max_memory")
    if request.apply == "live" and request.allow_restart:
        raise InvalidInput(
            "apply: live and allow_restart contradict each other",
            advice="Use apply: auto to restart where live is not possible",
        )
    return request


def _count(value: int | None, what: str) -> int | None:
    if value is not None and not 1 <= value <= _MOST_VCPUS:
        raise InvalidInput(f"{what} {value} is not a number of vCPUs", advice=f"Give 1 to {_MOST_VCPUS}")
    return value


def _memory(value: str | None, what: str) -> int | None:
    if value is None:
        return None
    size = names.parse_size(value, what)
    if size < _LEAST_MEMORY or size % MIB:
        raise InvalidInput(f"{what} {value} is not a whole number of MiB", advice="Give a size such as 4G or 4608M")
    return size


def _disks(entries: Sequence[Mapping[str, Any]]) -> tuple[DiskRequest, ...]:
    disks: list[DiskRequest] = []
    for entry in entries:
        target = names.check_name(entry["target"], "disk target")
        size = names.parse_size(entry["size"], f"size of disk {target}") if entry["size"] is not None else None
        if size is not None and (size <= 0 or size % 512):
            raise InvalidInput(
                f"The size of disk {target} is not a whole number of sectors", advice="Give a multiple of 512 bytes"
            )
        if any(disk.target == target for disk in disks):
            raise InvalidInput(f"disks names {target} twice", advice="Name each disk once")
        if size is None and not entry["grow_filesystem"]:
            raise InvalidInput(
                f"disks names {target} without anything to do", advice="Give its size, or grow_filesystem: true"
            )
        disks.append(DiskRequest(target, size, entry["grow_filesystem"]))
    return tuple(disks)


def _command(argv: Sequence[str] | None) -> tuple[str, ...] | None:
    if argv is None:
        return None
    if not argv or not all(argv):
        raise InvalidInput("health_command is empty", advice="Give a program and its arguments as a list")
    if len(argv) == 1 and any(blank in argv[0].strip() for blank in " \t"):
        raise InvalidInput(
            f"health_command {argv[0]!r} is one word with blanks in it; it is run without a shell",
            advice="Give the program and each of its arguments as a list",
        )
    return tuple(argv)


def _positive(value: str, what: str) -> float:
    seconds = names.parse_duration(value, what)
    if seconds <= 0:
        raise InvalidInput(f"{what} {value} is too short", advice="Give a duration such as 5m")
    return seconds
