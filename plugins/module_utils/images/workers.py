# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Exports and imports as their tasks ask for them: done here, or by a worker that goes on after the task."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .._errors import NotFound, VmkeeperError
from ..hypervisor.connection import find_domain, open_connection
from ..safety import long_operation
from ..safety.long_operation import Answer, Operation, Waiting
from . import export_plan, exporting, importing, settle

_ENTRY = "images.workers"


def export(
    connection: Any, uri: str, handle: Any, request: export_plan.Request, waiting: Waiting, *, check: bool
) -> Answer:
    """What an export task answers: ``{changed, image, warnings}``, or with a ``job`` where that goes on."""

    def here(check: bool) -> Answer:
        return _export(connection, uri, handle, request, check)

    if check:
        return here(True)
    asked = {"request": _asked(asdict(request)), "environment": _for_libguestfs(), "of": handle.UUIDString()}
    operation = Operation(settle.EXPORT, _ENTRY, asked, request.passphrase)
    return _made_before(operation, request) or long_operation.run(
        operation, uri, lambda: [(handle.UUIDString(), handle.name())], here, waiting
    )


def _export(connection: Any, uri: str, handle: Any, request: export_plan.Request, check: bool) -> Answer:
    done = exporting.export(connection, uri, handle, request, check=check)
    return {"changed": done.changed, "image": done.image, "warnings": done.warnings}


def _made_before(operation: Operation, request: export_plan.Request) -> Answer | None:
    """What a worker of the same task has made meanwhile: its task is not told that a running guest's content is another now."""
    job = long_operation.twin(operation, over=True) if operation.passphrase is None else None
    if job is None or job.result is None or not os.path.lexists(request.path):
        return None
    try:
        now = exporting.existing(request.path)
    except VmkeeperError:
        return None  # whoever looks closer says what is wrong with it
    return {**job.result, "changed": False} if now["digest"] == job.result["image"]["digest"] else None


def import_image(connection: Any, uri: str, request: importing.Request, waiting: Waiting, *, check: bool) -> Answer:
    """What an import task answers: ``{changed, domain, image, warnings}``, or with a ``job`` where that goes on."""

    def here(check: bool) -> Answer:
        return _import(connection, uri, request, None, check)

    def domains() -> list[tuple[str, str]]:
        try:
            return [(find_domain(connection, request.domain).UUIDString(), request.domain)]
        except NotFound:
            # The worker is found by it before the domain is defined, and afterwards.
            return [(str(uuid.uuid4()), request.domain)]

    if check:
        return here(True)
    operation = Operation(settle.IMPORT, _ENTRY, {"request": _asked(asdict(request))}, request.passphrase)
    return long_operation.run(operation, uri, domains, here, waiting)


def _import(connection: Any, uri: str, request: importing.Request, identity: str | None, check: bool) -> Answer:
    done = importing.import_image(connection, uri, request, identity=identity, check=check)
    return {"changed": done.changed, "domain": done.domain, "image": done.image, "warnings": done.warnings}


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key != "passphrase"}


def _for_libguestfs() -> dict[str, str]:
    """What the task's environment says to libguestfs, which a worker under systemd would not inherit."""
    return {name: value for name, value in os.environ.items() if name.startswith(("LIBGUESTFS_", "SUPERMIN_"))}


def work(uri: str, request: Mapping[str, Any]) -> Answer:
    """What the worker does."""
    connection = open_connection(uri)
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in request["request"].items()
    }
    options["passphrase"] = long_operation.passphrase_in(request)
    identity, _name = request["domains"][0]
    if "of" not in request:
        return _import(connection, uri, importing.Request(**options), identity, False)
    os.environ.update(request["environment"])
    handle = connection.lookupByUUIDString(identity)
    return _export(connection, uri, handle, export_plan.Request(**options), False)
