# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Repositories for the backup tests, where QEMU's user can reach them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path("/var/lib/libvirt/backup-tests")
_NUMBERS = itertools.count(1)


@pytest.fixture
def directory() -> Iterator[Path]:
    """An empty directory that QEMU's user can reach; removed after the test."""
    yield from _directory()


@pytest.fixture(scope="module")
def make_repository() -> Iterator[Callable[[], Path]]:
    """Makes empty directories that live as long as the test module."""
    made: list[Iterator[Path]] = []

    def make() -> Path:
        made.append(_directory())
        return next(made[-1])

    yield make
    for one in made:
        next(one, None)


def _directory() -> Iterator[Path]:
    path = ROOT / f"d{next(_NUMBERS)}"
    path.mkdir(parents=True)
    ROOT.chmod(0o755)
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
