# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""skopeo, called with a private authfile and understood errors."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .._errors import InvalidInput, Unsupported, VmkeeperError
from ..hypervisor.lifeline import end_with_caller
from ..safety import places
from ..safety.processes import ProcessIdentity, myself
from .oci import Reference

_SECRETS = "/run/vmkeeper.libvirt/secrets"
_POLICY = "/etc/containers/policy.json"
_PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INSPECT_SECONDS = 120

#: Bytes; skopeo's own files, such as an image's index, are smaller.
_SMALL_FILE = 4 << 20

#: What registries and skopeo say -> what to do about it.
_ADVICE = (
    (
        ("file too large", "sigxfsz"),
        "The registry sends more than the image's manifest says: do not trust it",
    ),
    (
        ("x509", "certificate", "tls:"),
        "See that the registry's certificate is valid for its name, and give its authority with ca_cert",
    ),
    (
        ("unauthorized", "authentication required", "invalid username/password", "denied"),
        "See username and password, and what that user may do",
    ),
    (
        ("no such host", "connection refused", "i/o timeout", "no route"),
        "See that the registry runs and that this host reaches it",
    ),
    (
        ("http: server gave http response",),
        "The registry does not speak TLS; set validate_certs: false only where the network is trusted",
    ),
)


class RegistryFailed(VmkeeperError):
    """The registry, or skopeo, refused; ``facts['stderr']`` is what it said."""

    kind = "registry"


@dataclass(frozen=True)
class Access:
    """How to reach a registry."""

    username: str | None = None
    password: str | None = None
    validate_certs: bool = True
    ca_cert: str | None = None


class Registry:
    """One registry for the length of a ``with open_registry`` block."""

    def __init__(self, access: Access, secrets: str) -> None:
        self._access = access
        self._secrets = secrets

    def inspect(self, reference: Reference) -> bytes | None:
        """The raw OCI manifest behind a reference, or None when there is none."""
        try:
            return self._run(
                ["inspect", "--raw", *self._options(""), f"docker://{reference}"],
                doing=f"Asking for {reference}",
                timeout=_INSPECT_SECONDS,
            )
        except RegistryFailed as error:
            said = str(error.facts.get("stderr", "")).lower()
            if "manifest unknown" in said or "name unknown" in said:
                return None
            raise

    def push(self, layout: str, reference: Reference) -> None:
        """Copy the one image of a layout to the registry; its tag appears last, when every layer is there."""
        self._run(
            [
                "copy",
                "--quiet",
                "--preserve-digests",
                *self._options("dest-"),
                f"oci:{layout}",
                f"docker://{reference}",
            ],
            doing=f"Pushing to {reference}",
        )

    def pull(self, reference: Reference, layout: str, *, largest: int) -> None:
        """Copy an image to a layout; layers that are there already are not fetched again.

        ``largest``: bytes of its largest layer.  A registry that sends more is cut off there, and does not fill the disk.
        """
        self._run(
            [
                "copy",
                "--quiet",
                "--preserve-digests",
                *self._options("src-"),
                f"docker://{reference}",
                f"oci:{layout}:image",
            ],
            doing=f"Pulling {reference}",
            file_size=max(largest, _SMALL_FILE),
        )

    def _options(self, side: str) -> list[str]:
        options = [f"--{side}tls-verify={'true' if self._access.validate_certs else 'false'}"]
        if self._access.ca_cert:
            options.append(f"--{side}cert-dir={self._secrets}")
        # For inspect and copy alike the one authfile serves both sides.
        return ["--authfile", os.path.join(self._secrets, "auth.json"), *options]

    def _run(
        self, arguments: list[str], *, doing: str, timeout: float | None = None, file_size: int | None = None
    ) -> bytes:
        program = _program()
        policy = [] if os.path.exists(_POLICY) else ["--insecure-policy"]
        try:
            finished = subprocess.run(  # pylint: disable=ansible-bad-function
                [program, *policy, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={"PATH": _PATH, "HOME": self._secrets, "LC_ALL": "C.UTF-8", **_proxies()},
                timeout=timeout,
                check=False,
                umask=0o077,
                preexec_fn=_in_child(file_size),
            )
        except subprocess.TimeoutExpired as error:
            raise RegistryFailed(
                f"{doing}: no answer within {timeout:.0f} s", advice="See that the registry answers"
            ) from error
        if finished.returncode:
            said = " ".join(finished.stderr.decode(errors="replace").split())[-2000:]
            raise RegistryFailed(f"{doing}: {said or finished.returncode}", advice=advice_for(said), stderr=said)
        return finished.stdout


def _in_child(file_size: int | None) -> Callable[[], None]:
    """What is done before skopeo: it ends with us, else it would write where the next run does, and writes no larger file."""
    ends = end_with_caller()

    def apply() -> None:
        ends()
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return apply


def advice_for(said: str) -> str:
    """What to do about an error of skopeo's. Pure."""
    lowered = said.lower()
    return next((advice for words, advice in _ADVICE if any(word in lowered for word in words)), "Run this again")


def _proxies() -> dict[str, str]:
    wanted = ("http_proxy", "https_proxy", "no_proxy")
    return {name: value for name, value in os.environ.items() if name.lower() in wanted}


def _program() -> str:
    program = shutil.which("skopeo", path=_PATH)
    if program is None:
        raise Unsupported("skopeo is not installed on this host", advice="Install the package skopeo")
    return program


def check_available() -> None:
    """Raise :class:`Unsupported` where there is no skopeo."""
    _program()


def _sweep() -> None:
    """Remove the secrets of processes that were killed."""
    for name in os.listdir(_SECRETS):
        pid, _dot, rest = name.partition(".")
        if not (pid.isdecimal() and ProcessIdentity(int(pid), rest.partition(".")[0]).alive):
            shutil.rmtree(os.path.join(_SECRETS, name), ignore_errors=True)


@contextlib.contextmanager
def open_registry(reference: Reference, access: Access) -> Iterator[Registry]:
    """A registry's doors, with the secrets in a private directory that a reboot empties and that goes with the block."""
    check_available()
    if (access.username is None) != (access.password is None):
        raise InvalidInput("username and password belong together", advice="Give both or neither")
    places.private_directory(_SECRETS)
    _sweep()
    me = myself()
    directory = tempfile.mkdtemp(prefix=f"{me.pid}.{me.started}.", dir=_SECRETS)
    try:
        auths = {}
        if access.username is not None:
            pair = f"{access.username}:{access.password}".encode()
            auths[reference.host] = {"auth": base64.b64encode(pair).decode()}
        places.write_new(os.path.join(directory, "auth.json"), json.dumps({"auths": auths}).encode())
        if access.ca_cert:
            with open(access.ca_cert, "rb") as stream:
                places.write_new(os.path.join(directory, "ca.crt"), stream.read(1 << 20))
        yield Registry(access, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
