# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The integration tests' fixtures; each test's outcome becomes a row of docs/generations.md."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Generator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from lab import probe
from lab.ansible import INTERPRETER
from lab.host import is_inside

from ansible_collections.vmkeeper.libvirt.tests.generations.table import RESULTS, joined
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import (
    guest_factory,
    host,
    module_guest_factory,
    pytest_terminal_summary,
)

#: pytest finds the fixtures here by their names.
__all__ = ["guest_factory", "host", "module_guest_factory", "pytest_terminal_summary"]

HERE = Path(__file__).parent

_ROWS: dict[str, dict[str, Any]] = {}
_DESELECTED: list[pytest.Item] = []


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say what the table is to show instead of "works"."""
    return lambda text: request.node.user_properties.append(("note", text))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the outcome: the row is called as the test's docstring says; its time is that of its fixtures, too.

    Where "works" would hide something, the test says so by its fixture ``note``.
    """
    report = yield
    row = _ROWS.setdefault((item.obj.__doc__ or item.name).strip(), {"outcome": "passed", "note": "", "seconds": 0.0})
    row["seconds"] += report.duration
    row["note"] = str(dict(item.user_properties).get("note", ""))
    if report.outcome != "passed":
        row["outcome"] = report.outcome
    return report


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember that this is not the whole run."""
    _DESELECTED.extend(items)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the rows, the day and the versions that they are true of."""
    if not _ROWS or not is_inside():
        return
    everything = {item.path for item in session.items} == set(HERE.glob("test_*.py")) and not _DESELECTED
    named = any("::" in argument for argument in session.config.args)
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    run = {
        "versions": _versions(),
        "day": datetime.now(timezone.utc).date().isoformat(),
        "whole": everything and not named and ended,
        "acceleration": probe.acceleration(),
        "rows": _ROWS,
    }
    kept = RESULTS / f"{os.environ.get('VMK_LAB_GENERATION') or 'machine'}.json"
    earlier = json.loads(kept.read_text()) if kept.exists() else None
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(joined(earlier, run), indent=1) + "\n")


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
