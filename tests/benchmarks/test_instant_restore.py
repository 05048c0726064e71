# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""An instantly restored guest answers as soon whether its disk has 1 GiB or 16 GiB."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import ok, point

ROUNDS = int(os.environ.get("VMK_BENCHMARK_ROUNDS", "3"))
SIZES = {"small": 1024 * MIB, "large": 16 * 1024 * MIB}


def test_the_answer_does_not_wait_for_the_size(module_guest_factory, make_repository, host, directory: Path) -> None:
    made: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, size in SIZES.items():
        disks = (DiskSpec("vda", size=16 * MIB), DiskSpec("vdb", size=size, fs=None, writer=False))
        guest = module_guest_factory(GuestSpec(name, disks=disks))
        points.fill(guest, "vdb", name, 0, 1024)
        repository = make_repository()
        made[name] = (repository, point(guest, repository))
        guest.destroy()
    seconds: dict[str, dict[str, list[float]]] = {name: {"task": [], "agent": []} for name in SIZES}
    for number in range(ROUNDS):
        order = list(made) if number % 2 else list(reversed(made))
        for name, (repository, stored) in ((name, made[name]) for name in order):
            restored = Guest(host, GuestSpec(f"{name}-{number}", disks=(DiskSpec("vda"), DiskSpec("vdb", fs=None))))
            began = time.monotonic()
            ok(
                "restore",
                repository=str(repository),
                id=stored["id"],
                domain=restored.name,
                directory=str(directory),
                mode="instant",
                bandwidth="64K",
                wait=False,
            )
            seconds[name]["task"].append(time.monotonic() - began)
            restored.wait_ready()
            seconds[name]["agent"].append(time.monotonic() - began)
            ok("domain_job", domain=restored.name, bandwidth="0", state="finished")
            points.forget_domain(restored, restored.name)
            for path in directory.iterdir():
                path.unlink()
    for what in ("task", "agent"):
        # What else the machine does meets both of a round; its changes between rounds drop out of the median.
        ratios = [seconds["large"][what][number] / seconds["small"][what][number] for number in range(ROUNDS)]
        best = {name: min(times[what]) for name, times in seconds.items()}
        ratio = statistics.median(ratios)
        print(
            f"\n{what}: best 1 GiB {best['small']:.2f} s, 16 GiB {best['large']:.2f} s; ratios {ratios}, median {ratio:.3f}"
        )
        assert ratio < 1.10, seconds
