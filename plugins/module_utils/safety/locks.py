# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One run at a time for each domain: the second waits, then names the holder.

The kernel drops an flock when its holder dies, so nothing stale can remain.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence

from .._errors import Busy
from . import places

#: How long a run waits for another one before it gives up.
PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.1


#: The paths of the locks that a thread holds alone.
_own = threading.local()


@contextlib.contextmanager
def hold(
    domains: Sequence[tuple[str, str]],
    operation: str,
    *,
    patience: float = PATIENCE_SECONDS,
    directory: str = places.LOCKS,
    shared: bool = False,
) -> Iterator[None]:
    """Hold the locks of ``domains`` (pairs of UUID and name) while the block runs; ``shared`` with other readers.

    Always taken in the order of the UUIDs, so that two groups cannot wait for each other for ever.  What this thread holds
    alone already is not taken twice.
    """
    places.private_directory(directory)
    with contextlib.ExitStack() as held:
        for uuid, name in sorted(set(domains)):
            held.enter_context(_hold_one(os.path.join(directory, uuid), name, operation, patience, shared))
        yield


@contextlib.contextmanager
def _hold_one(path: str, name: str, operation: str, patience: float, shared: bool) -> Iterator[None]:
    held: set[str] = _own.__dict__.setdefault("held", set())
    if path in held:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        give_up = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise _busy(path, name) from None
                time.sleep(_POLL_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor,
            json.dumps({"pid": os.getpid(), "operation": operation, "since": int(time.time())}).encode(),
            0,
        )
        if not shared:
            held.add(path)
        yield
    finally:
        held.discard(path)
        # The file stays: removing a lock file lets two runs hold "the same" lock on two inodes.
        os.close(descriptor)


def holder(uuid: str, *, directory: str = places.LOCKS) -> dict[str, object] | None:
    """``{pid, operation, since}`` of the run that holds a domain's lock now, or None."""
    path = os.path.join(directory, uuid)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    finally:
        os.close(descriptor)
    return None


def _read(path: str) -> dict[str, object]:
    try:
        value = places.read_json(path)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _busy(path: str, name: str) -> Busy:
    found = _read(path)
    if os.path.basename(path).startswith("chain-"):
        what = f"The {name}"
    else:
        what = name if name.startswith("/") else f"Domain {name!r}"
    return Busy(
        f"{what} is in use by another run: {found.get('operation', 'an operation')} (process {found.get('pid', 'unknown')})",
        advice="Wait for it to finish, then run this again",
        holder=found,
    )
