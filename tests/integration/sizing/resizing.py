# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Run resize_domain, and watch what its guest does meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.ansible import CHECKOUT, ModuleProcess, Result, run_module_process
from lab.evidence import host_state
from lab.guest import Guest

MIB = 1 << 20
JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")
KILLHOOK = CHECKOUT / "tests" / "lab" / "killhook"


def start(
    guest: Guest, *, kill_at: str = "", log: Path | None = None, check: bool = False, **options: Any
) -> ModuleProcess:
    """Start the module; ``kill_at`` names the journalled step at which it is to die."""
    env = {}
    if kill_at or log:
        env = {"PYTHONPATH": str(KILLHOOK), "VMK_KILL_AT": kill_at, "VMK_KILL_LOG": str(log or "")}
    options.setdefault("overcommit", True)  # the test's host is a small one
    return run_module_process("resize_domain", check=check, env=env, domain=guest.name, **options)


def resize(guest: Guest, **options: Any) -> Result:
    """The module's result; it must not fail."""
    result = start(guest, **options).result()
    assert not result["failed"], result["msg"]
    return result


def refused(guest: Guest, **options: Any) -> Result:
    """The module's result; it must fail and change nothing."""
    before = host_state(guest.connection(), [guest.directory], content=False)
    result = start(guest, **options).result()
    assert result["failed"], result
    assert (
        not before.differences(host_state(guest.connection(), [guest.directory], content=False)) or guest.is_running()
    )
    return result


def twice(guest: Guest, **options: Any) -> Result:
    """Check mode foresees a change and makes none, the run makes it, the second run finds nothing to do."""
    before = host_state(guest.connection())
    foreseen = resize(guest, check=True, **options)
    assert foreseen["changed"], foreseen
    assert before.differences(host_state(guest.connection())) == []
    made = resize(guest, **options)
    assert made["changed"]
    assert [one["what"] for one in made["changes"]] == [one["what"] for one in foreseen["changes"]]
    again = resize(guest, **options)
    assert not again["changed"], again["changes"]
    return made


def change(result: Result, what: str) -> dict[str, Any]:
    """The one entry of ``changes`` about ``what``."""
    found = [one for one in result["changes"] if one["what"] == what]
    assert len(found) == 1, result["changes"]
    return dict(found[0])


def unfinished(guest: Guest) -> bool:
    """Whether the journal still holds an operation of this guest."""
    return (JOURNAL / f"{guest.domain().UUIDString()}.json").exists()


def online_cpus(guest: Guest) -> int:
    """By the guest's /proc."""
    return int(guest.exec("grep -c ^processor /proc/cpuinfo").text)


def memory_total(guest: Guest) -> int:
    """MemTotal of the guest's /proc, in bytes."""
    return int(guest.exec("grep MemTotal /proc/meminfo").text.split()[1]) * 1024


@dataclass
class Window:
    """The longest time without a completed write of one writer, in seconds."""

    longest: float = 0.0
    records: int = 0


@contextlib.contextmanager
def writes(guest: Guest, target: str = "vda") -> Iterator[Window]:
    """Watch the writer of a disk for the length of a block."""
    window = Window()
    first = guest.gaps(target).count
    yield window
    last = guest.gaps(target).count
    during = [record for record in guest.writer_log(target).records if first < record.count <= last]
    window.records = len(during)
    window.longest = max((record.gap_ns for record in during), default=0) / 1e9


def ordinary_gap(guest: Guest, seconds: float = 3.0, target: str = "vda") -> float:
    """The longest gap while nothing is done but looking: what this machine's load does to the guest."""
    with writes(guest, target) as window:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            guest.exec(["/bin/cat", "/proc/uptime"])
    return window.longest
