# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images, their chains and their passphrases as QEMU's programs take them: block nodes, and descriptors that are inherited.

An encrypted chain cannot be opened by a file name, since each layer needs its key; it is described layer by layer
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html#qapidoc-object-BlockdevOptions).  A passphrase is never
part of that description, of a command line, of the environment or of a file on disk: the program reads it from an anonymous
file in memory, whose descriptor it inherits.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from .._errors import InvalidInput


@dataclass(frozen=True)
class Passphrase:
    """What opens a LUKS image. Not shown by ``repr``, so that no log of a request holds it."""

    value: bytes = field(repr=False)


def random_key() -> Passphrase:
    """A passphrase for an image that nobody opens after this run."""
    return Passphrase(secrets.token_hex(32).encode())


#: A passphrase is guessed on the attacker's machines, whatever LUKS costs on ours.
SHORTEST_PASSPHRASE = 8


def passphrase_option(value: str | None, what: str) -> Passphrase | None:
    """An option that opens what was encrypted before.

    As it is: what a backup has encrypted with the value of a guest's libvirt secret has whatever that holds, such as the line
    break of ``echo passphrase | base64``.
    """
    if value is None:
        return None
    if not value:
        raise InvalidInput(f"{what} is empty", advice="Give the passphrase, or leave the option out")
    return Passphrase(value.encode())


def new_passphrase_option(value: str | None, what: str) -> Passphrase | None:
    """An option that something is encrypted with from now on: refused unless somebody can type it and nobody guesses it."""
    if value is None:
        return None
    if len(value) < SHORTEST_PASSPHRASE:
        raise InvalidInput(
            f"{what} is shorter than {SHORTEST_PASSPHRASE} characters",
            advice="Give a longer one: openssl rand -base64 24",
        )
    if any(character in value for character in "\0\r\n"):
        raise InvalidInput(f"{what} contains a line break", advice="Give one line, without a line break at its end")
    return Passphrase(value.encode())


@dataclass(frozen=True)
class Image:
    """One layer. With a ``passphrase`` a qcow2 is one of ``encrypt.format=luks``, and a raw image a LUKS volume."""

    path: str
    format: str = "qcow2"
    passphrase: Passphrase | None = None


class Keys:
    """The passphrases that one program needs, while the block runs."""

    def __init__(self) -> None:
        self._descriptors: dict[Passphrase, int] = {}

    def __enter__(self) -> Keys:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def name(self, passphrase: Passphrase) -> str:
        """The id under which the program knows a passphrase."""
        if passphrase not in self._descriptors:
            descriptor = os.memfd_create("passphrase")
            self._descriptors[passphrase] = descriptor
            os.write(descriptor, passphrase.value)
        return f"key{list(self._descriptors).index(passphrase)}"

    @property
    def arguments(self) -> list[str]:
        """The options of a program of QEMU that make it read them. Names are given first."""
        found = []
        for passphrase, descriptor in self._descriptors.items():
            found += ["--object", f"secret,id={self.name(passphrase)},file=/dev/fd/{descriptor}"]
        return found

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that the program inherits."""
        return tuple(self._descriptors.values())


def node(layers: Sequence[Image], keys: Keys, *, below: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The block node of a chain, topmost layer first. ``below`` is what the last one stands on instead of nothing."""
    top = layers[0]
    found: dict[str, Any] = {"driver": top.format, "file": {"driver": _protocol(top.path), "filename": top.path}}
    if top.passphrase is not None:
        if top.format == "qcow2":
            found["encrypt"] = {"format": "luks", "key-secret": keys.name(top.passphrase)}
        else:
            found.update({"driver": "luks", "key-secret": keys.name(top.passphrase)})
    if len(layers) > 1:
        found["backing"] = node(layers[1:], keys, below=below)
    elif top.format == "qcow2":
        found["backing"] = below if below is None else dict(below)
    return found


def _protocol(path: str) -> str:
    try:
        return "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    except OSError:
        return "file"  # QEMU says what is wrong with it


def as_name(described: Mapping[str, Any]) -> str:
    """A node in the place of a file name."""
    return "json:" + json.dumps(described)


def as_options(described: Mapping[str, Any], prefix: str = "") -> str:
    """A node as the value of ``--image-opts`` and ``--target-image-opts``."""
    parts = []
    for key, value in described.items():
        if isinstance(value, Mapping):
            parts.append(as_options(value, f"{prefix}{key}."))
        elif value is not None:
            parts.append(f"{prefix}{key}={str(value).replace(',', ',,')}")
    return ",".join(parts)


def blank_descriptor(size: int) -> int:
    """An anonymous file of ``size`` bytes that holds nothing; see :func:`blank_node`. The caller closes it."""
    descriptor = os.memfd_create("blank")
    os.ftruncate(descriptor, size)
    return descriptor


def blank_node(descriptor: int) -> dict[str, Any]:
    """What stands in for a backing file that is there and must not be looked at.

    A layer without one would show what it does not hold as zeros, and a copy of it would hold those.
    """
    return {"driver": "raw", "file": {"driver": "file", "filename": f"/dev/fd/{descriptor}"}}
