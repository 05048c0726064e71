# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The lab's own way into a guest: a second qemu-ga on a channel that libvirt does not know as an agent.

It answers whatever state the agent under test is in, also while file systems are frozen.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ChannelError(RuntimeError):
    """The guest answered a command with an error."""


class ChannelTimeout(TimeoutError):
    """The guest did not answer in time."""


@dataclasses.dataclass(frozen=True)
class ExecResult:
    """How a program in the guest ended. ``rc`` is 128 + signal number when a signal ended it."""

    rc: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """stdout, decoded and stripped."""
        return self.stdout.decode(errors="replace").strip()


class LabChannel:
    """Talks QMP-like JSON over the host's end of the channel; every call is a connection of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def exec(self, argv: Sequence[str], timeout: float, stdin: bytes = b"") -> ExecResult:
        """Run a program in the guest and wait for it; raises ChannelTimeout, ChannelError."""
        deadline = time.monotonic() + timeout
        with self._connected(deadline) as link:
            arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
            if stdin:
                arguments["input-data"] = base64.b64encode(stdin).decode()
            pid = link.call("guest-exec", arguments)["pid"]
            pause = 0.01
            while True:
                status = link.call("guest-exec-status", {"pid": pid})
                if status["exited"]:
                    break
                if time.monotonic() > deadline:
                    raise ChannelTimeout(f"{argv} did not end within {timeout:.0f} s in the guest")
                time.sleep(pause)
                pause = min(pause * 1.5, 0.2)
        rc = status["exitcode"] if "exitcode" in status else 128 + status.get("signal", 0)
        return ExecResult(rc, _decoded(status, "out-data"), _decoded(status, "err-data"))

    def read_file(self, path: str, timeout: float) -> bytes:
        """The content of a file in the guest."""
        with self._connected(time.monotonic() + timeout) as link:
            handle = link.call("guest-file-open", {"path": path, "mode": "r"})
            data = bytearray()
            try:
                while True:
                    part = link.call("guest-file-read", {"handle": handle, "count": 1 << 20})
                    data += base64.b64decode(part["buf-b64"])
                    if part["eof"]:
                        return bytes(data)
            finally:
                link.call("guest-file-close", {"handle": handle})

    def write_file(self, path: str, data: bytes, timeout: float) -> None:
        """Write a file in the guest (not synced)."""
        with self._connected(time.monotonic() + timeout) as link:
            handle = link.call("guest-file-open", {"path": path, "mode": "w"})
            try:
                for start in range(0, len(data), 1 << 20):
                    chunk = base64.b64encode(data[start : start + (1 << 20)]).decode()
                    link.call("guest-file-write", {"handle": handle, "buf-b64": chunk})
            finally:
                link.call("guest-file-close", {"handle": handle})

    def answers(self, timeout: float) -> bool:
        """Whether the guest answers within ``timeout`` seconds."""
        try:
            with self._connected(time.monotonic() + timeout):
                return True
        except OSError:
            return False

    def _connected(self, deadline: float) -> _Link:
        link = _Link(self._path, deadline)
        try:
            link.synchronise()
        except BaseException:
            link.close()
            raise
        return link


class _Link:
    def __init__(self, path: Path, deadline: float) -> None:
        self._deadline = deadline
        self._socket = socket.socket(socket.AF_UNIX)
        self._received = bytearray()
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> _Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def synchronise(self) -> None:
        """Skip whatever an earlier, broken-off conversation left in the channel."""
        number = secrets.randbelow(1 << 48)
        self._send(b"\xff" + _command("guest-sync-delimited", {"id": number}))
        while True:
            line = self._line()
            _stale, delimiter, answer = line.rpartition(b"\xff")
            if delimiter and json.loads(answer).get("return") == number:
                return

    def call(self, command: str, arguments: dict[str, Any]) -> Any:
        self._send(_command(command, arguments))
        answer = json.loads(self._line())
        if "error" in answer:
            raise ChannelError(f"{command}: {answer['error'].get('desc')}")
        return answer["return"]

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def _line(self) -> bytes:
        while b"\n" not in self._received:
            self._socket.settimeout(self._left())
            try:
                data = self._socket.recv(1 << 20)
            except TimeoutError as error:
                raise ChannelTimeout("the guest does not answer on the lab's channel") from error
            if not data:
                raise ConnectionResetError("the lab's channel was closed: the guest has ended")
            self._received += data
        line, _newline, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return line

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise ChannelTimeout("the guest does not answer on the lab's channel")
        return left


def _command(name: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"


def _decoded(status: dict[str, Any], key: str) -> bytes:
    return base64.b64decode(status.get(key, ""))
