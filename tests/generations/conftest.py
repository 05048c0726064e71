# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The integration tests' fixtures; each test's outcome becomes a row of docs/generations.md."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from lab.ansible import CHECKOUT, INTERPRETER

from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import (
    guest_factory,
    host,
    module_guest_factory,
    pytest_terminal_summary,
)

#: pytest finds the fixtures here by their names.
__all__ = ["guest_factory", "host", "module_guest_factory", "pytest_terminal_summary"]

RESULTS = CHECKOUT / ".cache" / "results" / "generations"

_ROWS: dict[str, dict[str, Any]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the outcome: the row is called as the test's docstring says."""
    report = yield
    row = (item.obj.__doc__ or item.name).strip()
    if report.when == "call" or report.outcome != "passed":
        notes = [value for name, value in item.user_properties if name == "note"]
        _ROWS[row] = {"outcome": report.outcome, "note": str(notes[0]) if notes else "", "seconds": report.duration}
    return report


def pytest_sessionfinish() -> None:
    """Write the rows and the versions that they are true of. What ran earlier on the same versions stays."""
    if not _ROWS:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / f"{os.environ.get('VMK_LAB_GENERATION') or 'machine'}.json"
    versions, rows = _versions(), _ROWS
    if kept.exists() and (earlier := json.loads(kept.read_text()))["versions"] == versions:
        rows = earlier["rows"] | _ROWS
    kept.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


def _versions() -> dict[str, str]:
    system = Path(os.environ.get("VMK_LAB_SYSTEM", "/"))
    release = dict(line.split("=", 1) for line in (system / "etc/os-release").read_text().splitlines() if "=" in line)
    code = (
        "import libvirt, platform\n"
        "connection = libvirt.openReadOnly('qemu:///system')\n"
        "for number in (connection.getLibVersion(), connection.getVersion()):\n"
        "    print('.'.join(str(number // 1000**power % 1000) for power in (2, 1, 0)))\n"
        "print(platform.python_version())"
    )
    found = subprocess.run([INTERPRETER, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return {"system": release["PRETTY_NAME"].strip('"'), **dict(zip(("libvirt", "qemu", "python"), found))}
