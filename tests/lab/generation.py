# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Root file systems of other Debian releases: what a private host's libvirtd, QEMU and modules run on instead of the machine's.

The command of such a host, the tests and the controller stay on the machine's own system; see README.md.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
from pathlib import Path

from . import assets, releases

PACKAGES = (
    "libvirt-daemon-system",
    "libvirt-clients",
    "python3-libvirt",
    "qemu-system-x86",
    "qemu-utils",
    "qemu-block-extra",
    "ovmf",
    "acl",
    "e2fsprogs",
    "procps",
    "util-linux",
)


class GenerationError(RuntimeError):
    """The root file system could not be built; the message says why."""


def built_root(suite: str) -> Path:
    """The root file system of a Debian release (``trixie``, ``sid``), built by mmdebstrap (one minute) unless cached.

    Safe to call from several processes at once. Raises GenerationError.
    """
    roots = assets.cache_directory().resolve() / "roots"
    digest = hashlib.sha256("\0".join((suite, *PACKAGES, Path(__file__).read_text())).encode()).hexdigest()[:12]
    return releases.kept(roots, suite, digest, lambda scratch: _build(suite, scratch / "root"))


def _build(suite: str, root: Path) -> Path:
    if shutil.which("mmdebstrap") is None:
        raise GenerationError("another release's root file system is built by mmdebstrap: apt-get install mmdebstrap")
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")]
    command = ["unshare", "--mount", "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory"]
    command += ["--components=main", *releases.STANDING_STILL, f"--include={','.join(PACKAGES)}", *left_out]
    run = subprocess.run(
        [*command, suite, str(root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise GenerationError(f"mmdebstrap {suite} failed:\n" + "\n".join(run.stdout.splitlines()[-30:]))
    root.chmod(0o755)
    return root


def python_of(root: Path, directory: Path) -> Path:
    """Write a program into ``directory`` that is the Python of ``root``, run on ``root``; its path."""
    program = directory / "python3"
    # No directory of the caller's need exist there: modules run from anywhere.
    program.write_text(f'#!/bin/sh\nexec /usr/sbin/chroot "{root}" /usr/bin/python3 "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return program
