# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What writes a guest's image does not outlive the lock that protects it."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import instant_restore
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.lending import Loan


def test_what_makes_an_image_whole_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[dict[str, Any]] = []
    monkeypatch.setattr(instant_restore.qemu_img, "run", lambda _arguments, **options: ran.append(options))
    loan = Loan("view", "/repository", "uuid", "/repository/domain", {"vda": ["p/vda.qcow2"]}, {"vda": 1 << 20})
    instant_restore._flatten(loan, {"target": "vda", "path": "/images/vda.qcow2", "secret": None}, None)
    assert [options["with_caller"] for options in ran] == [True]
