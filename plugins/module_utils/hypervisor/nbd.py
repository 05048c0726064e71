# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read the content of images that only QEMU can decode: ``qemu-nbd`` beside us, and the few words of NBD that reading takes.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle, simple replies).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

from .._errors import Unsupported, VmkeeperError
from . import image_node
from .image_node import Image, Keys
from .lifeline import end_with_caller

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_START_SECONDS = 120.0
_REPLY_SECONDS = 300.0

_OPTION_EXPORT_NAME = 1
_FLAG_FIXED_NEWSTYLE = 1
_FLAG_NO_ZEROES = 2
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_READ = 0


class Client:
    """One connection. Not for several threads at once."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_REPLY_SECONDS)
        try:
            self._socket.connect(path)
            self.size = self._shake_hands()
        except BaseException:
            self._socket.close()
            raise
        self._handle = 0

    def _shake_hands(self) -> int:
        magic, option_magic, flags = struct.unpack(">8s8sH", self._receive(18))
        if magic != b"NBDMAGIC" or option_magic != b"IHAVEOPT" or not flags & _FLAG_FIXED_NEWSTYLE:
            raise ConnectionError("it does not speak NBD as expected")
        self._socket.sendall(struct.pack(">I", _FLAG_FIXED_NEWSTYLE | (flags & _FLAG_NO_ZEROES)))
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", _OPTION_EXPORT_NAME, 0))
        size, _transmission = struct.unpack(">QH", self._receive(10))
        if not flags & _FLAG_NO_ZEROES:
            self._receive(124)
        return int(size)

    def read(self, start: int, length: int) -> bytes:
        """``length`` bytes of the content from ``start``; raises OSError."""
        self._handle += 1
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _READ, self._handle, start, length))
        magic, error, handle = struct.unpack(">IIQ", self._receive(16))
        if magic != _REPLY_MAGIC or handle != self._handle:
            raise ConnectionError("an NBD reply that belongs to no request")
        if error:
            raise OSError(error, os.strerror(error))
        return self._receive(length)

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        view, position = memoryview(buffer), 0
        while position < length:
            got = self._socket.recv_into(view[position:])
            if not got:
                raise ConnectionError("qemu-nbd hung up")
            position += got
        return bytes(buffer)

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


@contextlib.contextmanager
def reading(layers: Sequence[Image], *, connections: int, doing: str) -> Iterator[list[Client]]:
    """Connections to the content of a chain, topmost layer first, while the block runs.

    The server ends with the block, with its last connection, and with this process.
    """
    program = shutil.which("qemu-nbd", path=_PATH)
    if program is None:
        raise Unsupported(
            "qemu-nbd is not installed on this host; compressed and encrypted images are read through it",
            advice="Install it (Debian: qemu-utils, Fedora and RHEL: qemu-img)",
        )
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmkeeper-nbd-"))
        keys = stack.enter_context(Keys())
        name = image_node.as_name(image_node.node(layers, keys))
        path = os.path.join(directory, "socket")
        server = subprocess.Popen(  # pylint: disable=ansible-bad-function,consider-using-with,subprocess-popen-preexec-fn
            [program, *keys.arguments, "--read-only", "--shared", str(connections), "--socket", path, name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"LC_ALL": "C.UTF-8", "PATH": _PATH},
            pass_fds=keys.descriptors,
            preexec_fn=end_with_caller(),
        )
        stack.callback(_end, server)
        clients = _connect(server, path, connections, doing)
        for client in clients:
            stack.callback(client.close)
        os.unlink(path)
        yield clients


def _connect(server: subprocess.Popen[bytes], path: str, connections: int, doing: str) -> list[Client]:
    give_up = time.monotonic() + _START_SECONDS
    while not os.path.exists(path):
        if server.poll() is not None:
            said = " ".join(server.stderr.read().decode(errors="replace").split()) if server.stderr else ""
            raise VmkeeperError(f"{doing}: {said or 'qemu-nbd ended at once'}")
        if time.monotonic() > give_up:
            raise VmkeeperError(f"{doing}: qemu-nbd did not come up within {_START_SECONDS:.0f} s")
        time.sleep(0.01)
    clients: list[Client] = []
    try:
        while len(clients) < connections:
            try:
                clients.append(Client(path))
            except (ConnectionRefusedError, FileNotFoundError):
                # The socket is bound a moment before it listens.
                if time.monotonic() > give_up or server.poll() is not None:
                    raise
                time.sleep(0.01)
    except OSError as error:
        for client in clients:
            client.close()
        raise VmkeeperError(f"{doing}: qemu-nbd does not answer: {error}") from error
    return clients


def _end(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.wait()
    if server.stderr is not None:
        server.stderr.close()
