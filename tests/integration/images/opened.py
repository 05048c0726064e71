# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Encrypted images, opened by QEMU alone."""

from __future__ import annotations

import json
from pathlib import Path

from ansible_collections.vmkeeper.libvirt.tests.lab.images import run

KEY = "correct-Horse-battery-51"


def content_of(image: Path, work: Path) -> Path:
    """What an encrypted qcow2 holds, as a raw file in ``work``."""
    key, raw = work / "key", work / "opened"
    key.write_text(KEY)
    node = {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "key"}}
    name = "json:" + json.dumps({**node, "file": {"driver": "file", "filename": str(image)}})
    run("qemu-img", "convert", "--object", f"secret,id=key,file={key}", "-O", "raw", name, raw)
    return raw
