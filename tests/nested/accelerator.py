# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Which accelerator runs a machine here: KVM where it boots a real kernel, else emulation (TCG)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Literal

Accelerator = Literal["kvm", "tcg"]

PROBE_SECONDS = 15
"""How long a kernel may take to say its first word under KVM. It takes about one second where KVM works."""


def accelerator(kernel: Path, cache: Path) -> Accelerator:
    """Return what to run machines with; probe once per boot of this computer and remember the answer in `cache`.

    The device node alone proves nothing: a host can offer ``/dev/kvm`` in which a stock kernel never starts.
    """
    answer_file = cache / "accelerator.json"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        answer = json.loads(answer_file.read_text())
        if answer["boot_id"] == boot_id:
            return "kvm" if answer["accelerator"] == "kvm" else "tcg"
    except (OSError, ValueError, KeyError):
        pass
    found: Accelerator = "kvm" if _kernel_starts_under_kvm(kernel) else "tcg"
    temporary = answer_file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"boot_id": boot_id, "accelerator": found}))
    temporary.rename(answer_file)
    return found


def _kernel_starts_under_kvm(kernel: Path) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    # Without a root file system the kernel panics, and panic=-1 with -no-reboot makes QEMU end: that is the success.
    command = [
        "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display", "none",
        "-serial", "stdio", "-no-reboot", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1",
    ]  # fmt: skip
    try:
        probe = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return b"Linux version" in probe.stdout
