# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Does KVM work here? Asked by booting, since a device node proves nothing: some hosts hang every guest in it.

``python3 -m lab.probe`` prints the answer.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

from . import assets

_LIMIT = 20.0  # seconds; a KVM guest of this size says its first word after about one


@functools.cache
def acceleration() -> str:
    """The domain type that guests of this machine can have: ``kvm`` or ``qemu``.

    ``$VMK_LAB_ACCEL`` overrides; else the answer is remembered in the cache until the next boot.
    """
    configured = os.environ.get("VMK_LAB_ACCEL")
    if configured in ("kvm", "qemu"):
        return configured
    if configured:
        raise ValueError(f"VMK_LAB_ACCEL is {configured!r}; it must be kvm or qemu")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered = assets.cache_directory() / f"acceleration-{boot}"
    with contextlib.suppress(OSError):
        answer = remembered.read_text().strip()
        if answer in ("kvm", "qemu"):
            return answer
    answer = "kvm" if _kvm_boots() else "qemu"
    for old in remembered.parent.glob("acceleration-*"):
        old.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=remembered.parent, delete=False) as file:
        file.write(answer + "\n")
    os.replace(file.name, remembered)
    return answer


def _kvm_boots() -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    built = assets.guest_assets()
    with tempfile.TemporaryDirectory() as scratch:
        console = Path(scratch) / "console"
        command = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "160"]
        command += ["-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{console}"]
        command += ["-kernel", str(built.kernel), "-initrd", str(built.initramfs)]
        command += ["-append", "console=ttyS0 quiet panic=-1 lab.agent=none"]
        with open(os.devnull, "r+b") as nowhere:
            qemu = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        try:
            deadline = time.monotonic() + _LIMIT
            while time.monotonic() < deadline and qemu.poll() is None:
                with contextlib.suppress(OSError):
                    if b"lab: kernel up" in console.read_bytes():
                        return True
                time.sleep(0.05)
            return False
        finally:
            qemu.kill()
            qemu.wait()


if __name__ == "__main__":
    print(acceleration())
