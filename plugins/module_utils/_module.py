# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The only door to AnsibleModule: options in, one call, a result or one kind of failure out."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.common.respawn import has_respawned, probe_interpreters_for_module, respawn_module

from ._errors import InvalidInput, VmkeeperError
from .hypervisor.binding import libvirt
from .hypervisor.connection import DEFAULT_URI, check_local, open_connection

#: Where distributions keep the interpreter that has python3-libvirt.
_INTERPRETERS = ["/usr/bin/python3", "/usr/libexec/platform-python", "/usr/bin/python"]

URI_OPTION: dict[str, Any] = {"type": "str", "default": DEFAULT_URI}
DOMAINS_OPTION: dict[str, Any] = {"type": "list", "elements": "str", "aliases": ["domain"]}


@dataclass(frozen=True)
class Call:
    """What a module was asked: its options, whether only to predict, and an open connection."""

    params: Mapping[str, Any]
    check: bool
    uri: str
    connection: Any


@dataclass(frozen=True)
class Answer:
    """What a module says. ``diff`` is ``(before, after)``, each anything that JSON can hold."""

    changed: bool
    result: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)
    diff: tuple[Any, Any] | None = None


def run(
    options: Mapping[str, Any],
    handler: Callable[[Call], Answer],
    *,
    info: bool = False,
    failure: Mapping[str, Any] = MappingProxyType({}),
    **constraints: Any,
) -> None:
    """Run a module. ``info`` modules only read and need no root; ``constraints`` go to AnsibleModule as they are.

    ``failure`` is what a failure returns beside its message, as far as it says nothing else itself.
    """
    module = AnsibleModule(argument_spec={"uri": dict(URI_OPTION), **options}, supports_check_mode=True, **constraints)
    _need_libvirt(module, failure)
    try:
        uri = check_local(module.params["uri"])
        if not info and os.geteuid() != 0:
            raise InvalidInput(
                "Changing domains and their image files needs root on the hypervisor",
                advice="Use become: true",
                user=os.geteuid(),
            )
        connection = _open(uri, info)
        try:
            answer = handler(Call(module.params, module.check_mode, uri, connection))
        finally:
            connection.close()
    except VmkeeperError as error:
        module.fail_json(msg=str(error), error=error.as_result(), **{**failure, **error.facts})
    except Exception as error:  # noqa: BLE001 a defect of ours; the operator still gets a sentence and the trace
        module.fail_json(
            msg=f"Unexpected {type(error).__name__}: {error}. This is a defect of vmkeeper.libvirt; run domain_info to see the state.",
            exception=traceback.format_exc(),
            **failure,
        )
    for warning in answer.warnings:
        module.warn(warning)
    result: dict[str, Any] = {"changed": answer.changed, **answer.result}
    if answer.diff is not None and module._diff:
        result["diff"] = {"before": answer.diff[0], "after": answer.diff[1]}
    module.exit_json(**result)


def _open(uri: str, info: bool) -> Any:
    """Info modules do with a read-only connection where this user gets no better one."""
    if info and os.geteuid() != 0:
        try:
            return open_connection(uri)
        except VmkeeperError:
            return open_connection(uri, readonly=True)
    return open_connection(uri)


def _need_libvirt(module: AnsibleModule, failure: Mapping[str, Any]) -> None:
    if libvirt is not None:
        return
    if not has_respawned():
        interpreter = probe_interpreters_for_module(_INTERPRETERS, "libvirt")
        if interpreter:
            respawn_module(interpreter)  # does not return
    module.fail_json(
        msg=missing_required_lib("libvirt-python (package python3-libvirt)", reason="on the hypervisor")
        + " Install python3-libvirt there. Nothing was changed.",
        error={
            "kind": "unsupported",
            "problem": "no libvirt binding",
            "advice": "install python3-libvirt",
            "state": "Nothing was changed.",
        },
        **failure,
    )


def one_or_all(plural: str, singular: str, items: list[Any], asked: int) -> dict[str, Any]:
    """Results are always a list, and the singular too when exactly one was asked."""
    result: dict[str, Any] = {plural: items}
    if asked == 1 and items:
        result[singular] = items[0]
    return result
