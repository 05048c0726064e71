# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A passphrase on its way from a task to its worker: through a local socket, from memory to memory.

Under systemd a worker is no child of its task and inherits no descriptor from it, and a ticket is a file that stays.  The
socket lies in the worker's private directory, answers once, and only to this user.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping
from types import TracebackType

from .._errors import VmkeeperError
from . import places

_SECONDS = 30.0
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


class Offer:
    """The task's side; the socket is there while the block runs."""

    def __init__(self, path: str, confidential: Mapping[str, str]) -> None:
        self._path = path
        self._content = json.dumps(dict(confidential)).encode()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._given = False

    def __enter__(self) -> Offer:
        self._socket.bind(self._path)
        self._socket.listen(1)
        self._socket.setblocking(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        places.unlink_quietly(self._path)

    def serve(self) -> None:
        """Give it to whoever has asked by now; call it again and again until the worker is at work."""
        if self._given:
            return
        with contextlib.suppress(BlockingIOError):
            peer, _address = self._socket.accept()
            with peer:
                peer.settimeout(_SECONDS)
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
                if _PEER.unpack(credentials)[1] == os.geteuid():
                    peer.sendall(self._content)
                    self._given = True


def receive(path: str) -> dict[str, str]:
    """The worker's side. Raises when nobody offers it any more."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(_SECONDS)
            asking.connect(path)
            content = b""
            while part := asking.recv(65536):
                content += part
        received: dict[str, str] = json.loads(content)
    except (OSError, ValueError) as error:
        raise VmkeeperError(
            f"The passphrase did not reach the worker: {error}",
            advice="Its task ended too early; run it again",
        ) from error
    return received
