# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What proves that a guest lives and that an image is good: never the collection's own report."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from lab import evidence
from lab.evidence import WriterLog
from lab.guest import Guest
from lab.spec import AGENT_PORT
from lab.waiting import until

in_test_long = pytest.mark.skipif(int(os.environ.get("VMK_SCALE", "1")) < 2, reason="runs in make test-long")
"""For what waits long and has a relative in the normal run."""

PORT = f"/dev/virtio-ports/{AGENT_PORT}"


def whole(log: WriterLog) -> WriterLog:
    """The log, if no record is missing or damaged. Two records in one tick are only a late wake-up of the guest."""
    lost = [problem for problem in log.problems if not problem.startswith("tick ")]
    assert not lost, lost
    assert log.records
    return log


def clean(image: Path | str) -> WriterLog:
    """The writer's log in an image that was frozen or cleanly shut down: no journal to replay, nothing torn."""
    found = evidence.fsck(Path(image))
    assert found.clean, found.output
    assert not found.needs_recovery
    log = whole(evidence.writer_log(Path(image)))
    assert log.torn == 0
    return log


def is_paused(guest: Guest) -> bool:
    """Whether libvirt shows the guest as paused."""
    return bool(guest.state()[0] == libvirt.VIR_DOMAIN_PAUSED)


def alive(guest: Guest, timeout: float = 60) -> None:
    """Neither paused nor frozen: every writer goes on, as the guest itself tells."""
    until(lambda: not is_paused(guest), f"{guest.name} being resumed", timeout)
    before = {disk.target: guest.gaps(disk.target).count for disk in guest.spec.disks if disk.writer and disk.fs}
    for target, count in before.items():
        until(lambda t=target, c=count: guest.gaps(t).count > c + 2, f"{guest.name} writing on {target}", timeout)


def use_agent(guest: Guest, mode: str) -> None:
    """Put another agent behind the guest's channel: ``real``, ``hooks`` (real, with freeze hooks) or a mode of labagent.c."""
    stop_agent(guest)
    if mode in ("real", "hooks"):
        hook = "-F/etc/qemu/fsfreeze-hook" if mode == "hooks" else ""
        guest.exec(f"qemu-ga -m virtio-serial -p {PORT} -t /run/qga -f /run/qga/pid -l /run/qga/log {hook} -d")
    else:
        guest.exec(f"setsid labagent {PORT} {mode} >/dev/null 2>&1 </dev/null &")
    until(guest.agent_connected, f"the agent {mode} connecting")
    if mode in ("real", "hooks"):
        guest.wait_agent()


def stop_agent(guest: Guest) -> None:
    """End the agent and, so that a test may begin, any freeze that it leaves."""
    guest.exec(
        "killall -9 labagent 2>/dev/null; test -e /run/qga/pid && kill -9 $(cat /run/qga/pid); rm -f /run/qga/pid;"
        " for d in /disk/*; do fsfreeze -u $d; done 2>/dev/null; true"
    )
    until(lambda: not guest.agent_connected(), "the old agent disconnecting")


@contextlib.contextmanager
def agent(guest: Guest, mode: str) -> Iterator[None]:
    """Another agent for the length of a ``with`` block."""
    use_agent(guest, mode)
    try:
        yield
    finally:
        use_agent(guest, "real")


def guard_pids() -> list[int]:
    """The thaw guards of this host."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"safety.watch" in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
    return found


def holders_of_pipe(target: str) -> set[int]:
    """pids that have the pipe ``pipe:[n]`` open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == target:
                found.add(int(link.parts[2]))
    return found


@contextlib.contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """A directory in which nobody can write, root included; what was in it is there again afterwards."""
    away = directory.with_name(f"{directory.name}.away")
    directory.rename(away)
    directory.touch()
    try:
        yield
    finally:
        directory.unlink()
        away.rename(directory)
