# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write disks in the formats of an image, and compare what is written with what it was made of."""

from __future__ import annotations

import json

from .._errors import VmkeeperError
from ..hypervisor import qemu_img
from ..hypervisor.confinement import Confinement


def convert(
    source: str,
    source_format: str,
    destination: str,
    destination_format: str,
    compression: str = "none",
    *,
    doing: str,
    confined: Confinement | None = None,
) -> None:
    """Flatten ``source`` with all that it stands on into a sparse, self-contained file.

    ``confined``: the destination was made before, empty, since the confined program can make no file.
    """
    arguments = ["convert", "-q", "-f", source_format, "-O", destination_format]
    if confined is not None:
        arguments += ["-n", "--target-is-zero"]
    if destination_format == "qcow2" and compression != "none":
        arguments += ["-c", "-o", f"compression_type={compression}"]
    elif destination_format == "vmdk" and compression != "none":
        arguments += ["-o", "subformat=streamOptimized"]
    else:
        # Clusters in the order in which they are read: several requests at once, and a target that stays sparse.
        arguments += ["-W", "-m", "16"]
    qemu_img.run([*arguments, source, destination], doing=doing, confined=confined)


def content_size(path: str, image_format: str) -> int:
    """Bytes that the image's content takes as a plain qcow2."""
    said = qemu_img.run(
        ["measure", "--output=json", "-f", image_format, "-O", "qcow2", path], doing=f"Measuring {path}"
    )
    return int(json.loads(said)["required"])


def same_content(one: str, one_format: str, other: str, other_format: str) -> bool:
    """Whether a guest would read the same from both, which are of the same virtual size."""
    try:
        qemu_img.run(
            ["compare", "-q", "-f", one_format, "-F", other_format, one, other],
            doing=f"Comparing {one} with {other}",
        )
    except VmkeeperError as error:
        if error.facts.get("status") == 1:
            return False
        raise
    return True
