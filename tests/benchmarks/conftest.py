# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Guests and repositories of the integration tests, for measurements: ratios within one run, never absolute times.

Run them as: tests/lab/enter -- .venv/bin/python -m pytest tests/benchmarks -s
"""

from __future__ import annotations

from ansible_collections.vmkeeper.libvirt.tests.integration.backup.conftest import directory, make_repository
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import (
    guest_factory,
    host,
    module_guest_factory,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)

__all__ = [
    "directory",
    "guest_factory",
    "host",
    "make_repository",
    "module_guest_factory",
    "pytest_runtest_makereport",
    "pytest_terminal_summary",
]
