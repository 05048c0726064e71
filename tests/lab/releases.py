# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What is built of Debian releases and kept: once for its inputs, and anew now and then where the release itself moves."""

from __future__ import annotations

import datetime
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from . import assets

#: For mmdebstrap: a mirror may stand still for longer than its archive is declared valid. Signatures are checked all the same.
STANDING_STILL = ('--aptopt=Acquire::Check-Valid-Until "false"',)

MOVING = ("sid",)
"""Suites whose packages change from day to day."""
NEW_DAYS = 7
"""So long a build of such a suite counts as the newest in the archive."""

_UNUSED_SECONDS = 14 * 24 * 3600


def kept(place: Path, suite: str, digest: str, build: Callable[[Path], Path]) -> Path:
    """The directory below ``place`` with what ``build(scratch)`` has made of a suite, somewhere in ``scratch``, for inputs of this digest.

    Safe to call from several processes at once: one builds, the others wait. What nobody has used for two weeks goes then.
    """
    place.mkdir(parents=True, exist_ok=True)
    name, today = f"{suite}-{digest}", datetime.date.today()
    with assets.locked(place / "lock"):
        if suite in MOVING:
            name = newest(name, os.listdir(place), today)
        directory = place / name
        if not directory.exists():
            _forget_unused(place)
            with tempfile.TemporaryDirectory(prefix="building-", dir=place) as scratch:
                build(Path(scratch)).rename(directory)
        os.utime(directory)
    return directory


def newest(name: str, existing: Iterable[str], today: datetime.date) -> str:
    """The build of a moving suite to use: one of the ``existing``, whose names end with their days, or else today's, to be made."""
    days = [datetime.date.fromisoformat(one[len(name) + 1 :]) for one in existing if one.startswith(f"{name}-")]
    last = max(days, default=None)
    if last is not None and today - last <= datetime.timedelta(days=NEW_DAYS):
        return f"{name}-{last}"
    if last is not None:
        print(f"{name}: its last build is of {last}, and the release has moved on: building it anew", file=sys.stderr)
    return f"{name}-{today}"


def _forget_unused(place: Path) -> None:
    for entry in place.iterdir():
        abandoned = entry.name.startswith("building-")  # who builds holds the lock, and that is this process
        if entry.is_dir() and (abandoned or time.time() - entry.stat().st_mtime > _UNUSED_SECONDS):
            shutil.rmtree(entry)
