# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Looks for words that nobody may find: in files, and in what every process shows of itself while something runs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

#: Everywhere that something of the collection's or of libvirt's could be left.
PLACES = ("/var/lib/vmkeeper.libvirt", "/run", "/var/log/libvirt", "/etc/libvirt", "/var/lib/libvirt/qemu")


def holding(words: Sequence[str], *places: str | Path) -> list[str]:
    """Files below some directories that hold any of the words."""
    found = []
    for place in places:
        for where, _directories, names in os.walk(place):  # passes over what goes meanwhile
            for path in (Path(where, name) for name in names):
                with contextlib.suppress(OSError):
                    if path.is_file() and not path.is_symlink():
                        content = path.read_bytes()
                        found += [f"{path}: {word}" for word in words if word.encode() in content]
    return found


class Watch:
    """In a ``with`` block: samples all processes' command lines and environments for a word, and some places for several."""

    def __init__(self, passphrase: str, words: Sequence[str], *places: str | Path) -> None:
        self._passphrase = passphrase.encode()
        self._words = (passphrase, *words)
        self._places = places
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.seen: set[str] = set()
        self.samples = 0
        self.programs: set[str] = set()
        """Names of QEMU's programs that were seen at work."""

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_rest: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        self._look(process.name, name, (process / name).read_bytes())
            self.seen.update(holding(self._words, *self._places))
            self.samples += 1
            time.sleep(0.1)

    def _look(self, pid: str, name: str, content: bytes) -> None:
        if name == "cmdline" and b"qemu-" in content:
            self.programs.add(content.split(b"\0")[0].decode().rpartition("/")[2])
        if self._passphrase in content:
            self.seen.add(f"{pid}/{name}: {content[:80]!r}")
