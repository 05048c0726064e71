# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The libvirt connection: where it may lead, which domains it knows, what its errors say."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from .._errors import UNCHANGED, InvalidInput, LibvirtFailed, NotFound, Unsupported
from .binding import libvirt

Read = TypeVar("Read")

DEFAULT_URI = "qemu:///system"

#: Below this the backup API, agent timeouts and checkpoints are incomplete (libvirt NEWS 7.6.0).
MINIMUM_LIBVIRT = (7, 6, 0)

#: How long a daemon that is restarted may take to answer again.
_DAEMON_SECONDS = 60.0
_POLL_SECONDS = 0.5

#: Transports of a URI that stay on this machine (https://libvirt.org/uri.html).
_LOCAL_TRANSPORTS = ("", "unix")

_UUID = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}")


def constant(name: str, default: int | None = None) -> int | None:
    """The value of ``libvirt.<name>``, or ``default`` where the bindings are older than the constant."""
    value = getattr(libvirt, name, default)
    return None if value is None else int(value)


def check_local(uri: str) -> str:
    """Return ``uri`` if it leads to this machine's own hypervisor.

    Image files are read and made locally, so a remote connection would act on the wrong host's files.
    """
    parts = urlsplit(uri)
    transport = parts.scheme.partition("+")[2]
    if not parts.scheme or parts.netloc or transport not in _LOCAL_TRANSPORTS:
        raise InvalidInput(
            f"uri {uri!r} leads to another machine",
            advice="Run the task on the hypervisor itself, or use delegate_to; uri may then stay at its default qemu:///system",
        )
    return uri


def version_triple(number: int) -> tuple[int, int, int]:
    """libvirt's and QEMU's packed version (``9000000``) as ``(9, 0, 0)``."""
    return number // 1_000_000, number // 1_000 % 1_000, number % 1_000


def open_connection(uri: str = DEFAULT_URI, *, readonly: bool = False) -> Any:
    """Open a local hypervisor connection; raises with what to do when no daemon answers or libvirt is too old."""
    check_local(uri)
    # The bindings print every error on stderr, which would corrupt a module's output; errors are raised anyway.
    libvirt.registerErrorHandler(lambda _ctx, _error: None, None)
    try:
        connection = libvirt.openReadOnly(uri) if readonly else libvirt.open(uri)
        version = version_triple(connection.getLibVersion())
    except libvirt.libvirtError as error:
        advice = (
            "Start it (systemctl start libvirtd, or virtqemud on a host with modular daemons) and see that this user may use it"
            if os.geteuid() == 0
            else "See that the daemon runs and that this user is in the libvirt group, or use become"
        )
        raise LibvirtFailed(
            f"No libvirt daemon answers on {uri}: {message_of(error)}",
            advice=advice,
            libvirt=message_of(error),
        ) from error
    if version < MINIMUM_LIBVIRT:
        connection.close()
        raise Unsupported(
            f"libvirt {dotted(version)} on this host is too old",
            advice=f"Upgrade it to {dotted(MINIMUM_LIBVIRT)} or later",
            libvirt_version=dotted(version),
        )
    return connection


def connect_again(uri: str, seconds: float = _DAEMON_SECONDS) -> Any:
    """A connection to a daemon that may have gone away; raises like :func:`open_connection` when none answers within ``seconds``."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            return open_connection(uri)
        except LibvirtFailed:
            if time.monotonic() > give_up:
                raise
        time.sleep(_POLL_SECONDS)


def wait_for_daemon(uri: str) -> None:
    """Wait until a daemon answers again that went away; raises like :func:`connect_again`."""
    connect_again(uri).close()


def answering(handle: Any, uri: str) -> Any:
    """The domain over a connection that works: ``handle`` itself, or another once a daemon that went away answers again.

    A connection does not come back with its daemon.  Raises like :func:`connect_again`, and :class:`NotFound` where the
    domain is not there any more.
    """
    with contextlib.suppress(libvirt.libvirtError):
        handle.isActive()  # that its daemon has gone, a connection learns by being used
    if handle.connect().isAlive():
        return handle
    found = find_by_uuid(connect_again(uri), handle.UUIDString())
    if found is None:
        raise NotFound(f"Domain {handle.name()!r} is not defined any more", state="")
    return found


def dotted(version: tuple[int, ...]) -> str:
    """``(9, 0, 0)`` as ``9.0.0``."""
    return ".".join(str(number) for number in version)


def message_of(error: Exception) -> str:
    """What libvirt said, in one line."""
    getter = getattr(error, "get_error_message", None)
    text = (getter() if getter else None) or str(error)
    return " ".join(str(text).split())


def code_of(error: Exception) -> int | None:
    """libvirt's error number (``VIR_ERR_*``), if the exception carries one."""
    getter = getattr(error, "get_error_code", None)
    return getter() if getter else None


@contextlib.contextmanager
def explaining(doing: str, *, advice: str = "", state: str = UNCHANGED) -> Iterator[None]:
    """Turn a libvirt error inside the block into a sentence that begins with ``doing``."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise LibvirtFailed(
            f"{doing}: {message_of(error)}",
            advice=advice,
            state=state,
            libvirt=message_of(error),
            code=code_of(error),
        ) from error


def find_domain(connection: Any, wanted: str) -> Any:
    """The domain called ``wanted`` (its name, else its UUID)."""
    for lookup, usable in (
        (connection.lookupByName, True),
        (connection.lookupByUUIDString, bool(_UUID.fullmatch(wanted))),
    ):
        if not usable:
            continue
        try:
            return lookup(wanted)
        except libvirt.libvirtError as error:
            if code_of(error) != libvirt.VIR_ERR_NO_DOMAIN:
                raise LibvirtFailed(
                    f"Looking up domain {wanted!r}: {message_of(error)}", libvirt=message_of(error)
                ) from error
    existing = sorted(domain.name() for domain in connection.listAllDomains())
    raise NotFound(
        f"There is no domain {wanted!r} on this host",
        advice="The domains here are: " + (", ".join(existing) if existing else "none"),
        existing=existing,
    )


def is_gone(error: Exception) -> bool:
    """Whether an error says that the domain is not there any more."""
    code = error.facts.get("code") if isinstance(error, LibvirtFailed) else code_of(error)
    return bool(code == libvirt.VIR_ERR_NO_DOMAIN)


def of_every_domain(connection: Any, read: Callable[[Any], Read]) -> list[Read]:
    """What ``read`` tells of each domain of this host, by name. One that goes meanwhile, as transient ones do, is passed over."""
    with explaining("Listing the domains of this host"):
        handles = sorted(connection.listAllDomains(), key=lambda one: str(one.name()))
    found = []
    for handle in handles:
        try:
            found.append(read(handle))
        except (libvirt.libvirtError, LibvirtFailed) as error:
            if not is_gone(error):
                raise
    return found


def find_by_uuid(connection: Any, uuid: str) -> Any | None:
    """The domain, or None when it is gone: undefined, or transient and stopped."""
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise LibvirtFailed(f"Looking up domain {uuid}: {message_of(error)}", libvirt=message_of(error)) from error


def find_domains(connection: Any, wanted: list[str]) -> list[Any]:
    """The domains called ``wanted``, each once, in that order."""
    found: dict[str, Any] = {}
    for name in wanted:
        domain = find_domain(connection, name)
        found.setdefault(domain.UUIDString(), domain)
    return list(found.values())
