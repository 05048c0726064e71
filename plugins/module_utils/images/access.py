# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may read an image on this host, by POSIX ACLs; and the catalogue of what is shared.

The list is declared whole: whoever is not in it has no access any more.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import InvalidInput, Unsupported, VmkeeperError
from ..safety import locks, places, space
from . import bundle, exporting
from .manifest import FILE_NAME, Manifest

CATALOGUE = "CATALOGUE.md"
_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True, order=True)
class Principal:
    """Somebody who may read: ``kind`` is user or group, ``number`` the uid or gid."""

    kind: str
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


def parse_principals(names: Sequence[str]) -> tuple[Principal, ...]:
    """``user:alice`` and ``group:ops``, which have to exist on this host; sorted, each once."""
    found = set()
    for text in names:
        kind, _colon, name = text.partition(":")
        try:
            if kind == "user" and name:
                found.add(Principal(kind, name, pwd.getpwnam(name).pw_uid))
            elif kind == "group" and name:
                found.add(Principal(kind, name, grp.getgrnam(name).gr_gid))
            else:
                raise InvalidInput(f"share_with: {text!r} is not understood", advice="Use user:NAME or group:NAME")
        except KeyError as error:
            raise InvalidInput(
                f"share_with: there is no {kind} {name!r} on this host",
                advice="Make it first, or remove it from the list",
            ) from error
    return tuple(sorted(found))


def acl_text(principals: Sequence[Principal], *, folder: bool) -> str:
    """The whole ACL in setfacl's words. Nobody who reads may write."""
    own, other = ("rwx", "r-x") if folder else ("rw-", "r--")
    entries = [f"u::{own}", "g::---", "o::---"]
    entries += [f"{one.kind[0]}:{one.number}:{other}" for one in principals]
    return ",".join(entries)


def parse_acl(text: str) -> set[tuple[str, int]]:
    """Who is named in the output of ``getfacl --numeric``, as pairs of kind and number."""
    named = set()
    for line in text.splitlines():
        fields = line.partition("#")[0].strip().split(":")
        if len(fields) == 3 and fields[0] in ("user", "group") and fields[1].isdigit():
            named.add((fields[0], int(fields[1])))
    return named


def _run(program: str, *arguments: str) -> str:
    found = shutil.which(program, path=_PATH)
    if found is None:
        raise Unsupported(f"{program} is not installed on this host", advice="Install the package acl")
    finished = subprocess.run(  # pylint: disable=ansible-bad-function
        [found, *arguments], stdin=subprocess.DEVNULL, capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=False
    )
    said = " ".join(finished.stderr.decode(errors="replace").split())
    if finished.returncode and "not supported" in said.lower():
        raise Unsupported(f"The filesystem of {arguments[-1]} has no POSIX ACLs", advice="Share it from another one")
    if finished.returncode:
        raise VmkeeperError(f"Setting who may read {arguments[-1]}: {said}")
    return finished.stdout.decode(errors="replace")


def named_in(path: str) -> set[tuple[str, int]]:
    """Who has an entry of their own in a path's ACL."""
    return parse_acl(_run("getfacl", "--omit-header", "--absolute-names", "--numeric", "--", path))


def _set(path: str, principals: Sequence[Principal], *, folder: bool) -> None:
    _run("setfacl", "--set", acl_text(principals, folder=folder), "--", path)


def _is_private(path: str) -> bool:
    """Nobody but root and those who are named: the owning group and the others have nothing."""
    text = _run("getfacl", "--omit-header", "--absolute-names", "--numeric", "--", path)
    return "group::---" in text and "other::---" in text


@dataclass
class Shared:
    """The result. ``before`` and ``after`` name who may read."""

    image: dict[str, Any]
    before: list[str]
    after: list[str]
    changed: bool
    warnings: list[str]


def share(src: str, principals: tuple[Principal, ...], *, check: bool = False) -> Shared:
    """See that exactly these may read the image. Nothing is changed with ``check``."""
    with contextlib.ExitStack() as stack:
        library = os.path.dirname(os.path.realpath(src))
        if not check:
            stack.enter_context(locks.hold([(bundle.lock_key(library), library)], f"sharing of {src}"))
        with bundle.Opened(src) as opened:
            opened.require_ours()
            manifest, digest = opened.read_manifest()
        files = [os.path.join(src, name) for name in [FILE_NAME, *(name for name, _size, _sha in manifest.files())]]
        wanted = {(one.kind, one.number) for one in principals}
        before = named_in(src)
        changed = any(named_in(path) != wanted or not _is_private(path) for path in [src, *files])
        if changed and not check:
            # Opening up, the folder comes last; closing, it comes first: nobody sees half of an image.
            if not wanted - before:
                _set(src, principals, folder=True)
            for path in files:
                _set(path, principals, folder=False)
            _set(src, principals, folder=True)
        if not check:
            changed = write_catalogue(library) or changed
        return Shared(
            image=exporting.as_result(src, manifest, digest),
            before=sorted(_name(kind, number) for kind, number in before),
            after=[str(one) for one in principals],
            changed=changed,
            warnings=_unreachable(library, principals),
        )


def _name(kind: str, number: int) -> str:
    try:
        return f"{kind}:{pwd.getpwuid(number).pw_name if kind == 'user' else grp.getgrgid(number).gr_name}"
    except KeyError:
        return f"{kind}:{number}"


def _unreachable(library: str, principals: Sequence[Principal]) -> list[str]:
    """A directory on the way that others may not pass, and in whose ACL somebody is not named."""
    closed = []
    path = library
    while path != "/":
        if not os.stat(path).st_mode & 0o001:
            named = named_in(path)
            closed += [
                f"{one} may not pass through {path}" for one in principals if (one.kind, one.number) not in named
            ]
        path = os.path.dirname(path)
    return closed


def entry(name: str, manifest: Manifest, digest: str, readers: Sequence[str]) -> str:
    """One image of the catalogue, for people. Pure."""
    size = space.human(sum(disk.stored_size for disk in manifest.disks))
    disks = ", ".join(f"{disk.target} {space.human(disk.virtual_size)}" for disk in manifest.disks)
    tags = ", ".join(f"{key}={value}" for key, value in sorted(manifest.tags.items())) or "none"
    machine = manifest.machine
    return (
        f"## {name}\n\n"
        f"- from `{manifest.source.domain}`, {manifest.created}, {manifest.consistency}-consistent\n"
        f"- {machine.arch}, {machine.firmware}, {machine.vcpus} vCPUs, {space.human(machine.memory)} of memory\n"
        f"- disks: {disks}; {size} stored\n"
        f"- shared with: {', '.join(readers)}\n"
        f"- tags: {tags}\n"
        f"- digest: `sha256:{digest}`\n"
    )


def write_catalogue(library: str) -> bool:
    """List the shared images of a directory, readable by all with whom any is shared; returns whether that changed it.

    Images that are shared with nobody are not in it.
    """
    entries, readers = [], set()
    for name in sorted(os.listdir(library)):
        path = os.path.join(library, name)
        if name.startswith(".") or not os.path.isfile(os.path.join(path, FILE_NAME)):
            continue
        named = named_in(path)
        if not named:
            continue
        try:
            with bundle.Opened(path) as opened:
                manifest, digest = opened.read_manifest()
        except VmkeeperError:
            continue  # somebody's directory that only looks like an image
        readers |= named
        entries.append(entry(name, manifest, digest, sorted(_name(kind, number) for kind, number in named)))
    text = "\n".join(["# Shared images\n", *entries])
    path = os.path.join(library, CATALOGUE)
    principals = sorted(Principal(kind, "", number) for kind, number in readers)
    try:
        with open(path, encoding="utf-8") as stream:
            if stream.read() == text and named_in(path) == readers:
                return False
    except FileNotFoundError:
        if not entries:
            return False
    descriptor, temporary = tempfile.mkstemp(prefix=".catalogue-", dir=library)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    _set(temporary, principals, folder=False)
    os.replace(temporary, path)
    places.fsync_directory(library)
    return True
