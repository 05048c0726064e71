# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real OCI registry on loopback, with a password and TLS."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.vmkeeper.libvirt.tests.lab.waiting import until


@dataclass(frozen=True)
class Registry:
    """A registry on loopback that knows one user."""

    address: str
    access: dict[str, Any]
    storage: Path


@contextlib.contextmanager
def serving(home: Path) -> Iterator[Registry]:
    """Debian's docker-registry with htpasswd and TLS, its files in ``home``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", home / "key.pem", "-out", home / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    table = subprocess.run(["htpasswd", "-Bbn", "pusher", "right"], check=True, capture_output=True).stdout
    (home / "htpasswd").write_bytes(table)
    configuration = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(home / "data")}},
        "http": {
            "addr": f"127.0.0.1:{port}",
            "tls": {"certificate": str(home / "cert.pem"), "key": str(home / "key.pem")},
        },
        "auth": {"htpasswd": {"realm": "lab", "path": str(home / "htpasswd")}},
    }
    (home / "config.yml").write_text(json.dumps(configuration))
    with (home / "log").open("w") as log:
        server = subprocess.Popen(["docker-registry", "serve", home / "config.yml"], stdout=log, stderr=log)
    try:
        until(lambda: _listens(port), "the registry listening")
        access = {"username": "pusher", "password": "right", "ca_cert": str(home / "cert.pem")}
        yield Registry(f"localhost:{port}", access, home / "data")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
