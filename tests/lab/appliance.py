# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""libguestfs for tests, on a machine that has no kernel of its own installed: an appliance with the lab's kernel, kept in the cache.

libguestfs' supermin takes the host's kernel and modules, and a container has none.  They are put before it in a mount namespace
of its own.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import assets, probe

_SUPERMIN = Path("/usr/lib/x86_64-linux-gnu/guestfs/supermin.d")

_BUILD = """set -e
mount -t tmpfs none "$1/layers"
mkdir "$1/layers/upper" "$1/layers/work"
mount -t overlay none -o "lowerdir=/usr/lib,upperdir=$1/layers/upper,workdir=$1/layers/work" /usr/lib
rm -rf /usr/lib/modules
cp -a "$1/kernel/lib/modules" /usr/lib/modules
version=$(ls /usr/lib/modules)
depmod "$version"
SUPERMIN_KERNEL="$1/kernel/boot/vmlinuz-$version" SUPERMIN_MODULES="/lib/modules/$version" \\
    supermin --build --copy-kernel -f ext2 --host-cpu x86_64 "$2" -o "$1/appliance"
echo fixed > "$1/appliance/README.fixed"
"""


def missing() -> str | None:
    """Why there can be no appliance here, or None."""
    for program in ("guestfish", "supermin", "depmod"):
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            return f"{program} is not installed (apt-get install guestfish)"
    return None if _SUPERMIN.is_dir() else f"there is no {_SUPERMIN}"


@functools.cache
def environment() -> dict[str, str]:
    """The variables with which libguestfs uses the lab's appliance, built if the cache has none for today's packages."""
    settings = {"LIBGUESTFS_PATH": str(_built())}
    if probe.acceleration() != "kvm":
        settings["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    return settings


def _built() -> Path:
    cache = assets.cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    kernel = assets.kernel_package(cache)
    versions = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", "libguestfs0", "supermin", "libc6"],
        capture_output=True,
        check=True,
    ).stdout
    digest = hashlib.sha256(versions + kernel.name.encode() + _BUILD.encode()).hexdigest()[:16]
    directory = cache / f"appliance-{digest}"
    with assets.locked(cache / "appliance-lock"):
        if not directory.exists():
            for old in cache.glob("appliance-*/"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
                for name in ("layers", "appliance"):
                    (Path(scratch) / name).mkdir()
                subprocess.run(["dpkg", "-x", str(kernel), f"{scratch}/kernel"], check=True)
                command = ["unshare", "-m", "/bin/sh", "-c", _BUILD, "sh", scratch, str(_SUPERMIN)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise assets.AssetError(f"no appliance for libguestfs could be built: {done.stderr[-2000:]}")
                (Path(scratch) / "appliance").rename(directory)
    return directory
