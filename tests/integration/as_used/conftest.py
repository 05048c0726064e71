# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The collection as it is installed, and a controller that runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.host import TestHost

from ansible_collections.vmkeeper.libvirt.tests.integration.as_used.runner import Controller, install_artifact


@pytest.fixture(scope="session")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the collection is installed from its artifact."""
    return install_artifact(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def controller(host: TestHost, collections: Path, tmp_path_factory: pytest.TempPathFactory) -> Controller:
    """Runs jobs."""
    return Controller(tmp_path_factory.mktemp("controller"), collections)
