# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""docs/guides/off-site.md, as it stands there: restic moves only what is new, and what it brings back restores exactly."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import libvirt
import pytest
import yaml
from lab.ansible import CHECKOUT

from ansible_collections.vmkeeper.libvirt.tests.docs_examples import examples_in
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.built import UUID, Built
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import ok

EXAMPLES = {example.name: example.text for example in examples_in(CHECKOUT / "docs/guides/off-site.md")}


def sh(name: str, **variables: object) -> str:
    """Run an example as it stands in the guide."""
    environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
    run = ["sh", "-eu", "-c", EXAMPLES[name]]
    return subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def restic(tmp_path: Path) -> dict[str, Path]:
    key = tmp_path / "key"
    key.write_text("off-site")
    key.chmod(0o600)
    return {"COPY": tmp_path / "copy", "KEY": key}


def copy(repository: Path, restic: dict[str, Path]) -> dict[str, Any]:
    """What restic says that it moved."""
    lines = sh("off-site-copy", REPOSITORY=repository, **restic).splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    found: dict[str, Any] = next(one for one in told if one["message_type"] == "summary")
    return found


def test_restic_moves_only_what_is_new_and_brings_back_what_restores(
    host, directory: Path, restic: dict[str, Path]
) -> None:
    rng = random.Random(13)
    made = Built(directory / "srv")
    made.path.mkdir()
    # Two chains; the data is noise, which no engine makes smaller.
    ids: list[str] = []
    for number in range(5):
        ids.append(made.add(rng, {"vda": ids[-1] if number not in (0, 3) else None}, noise=True))
    whole = copy(made.path, restic)["data_added"]
    assert whole > sum(point.changed_bytes for point in made.points) * 0.9
    files = sum(path.is_file() for path in made.path.rglob("*"))
    ids.append(made.add(rng, {"vda": ids[-1]}, blocks=2, noise=True))
    new = copy(made.path, restic)
    print(
        f"first copy {whole} bytes, one more point {new['data_added']} bytes (it holds {made.points[-1].changed_bytes})"
    )
    assert made.points[-1].changed_bytes * 0.9 < new["data_added"] < made.points[-1].stored_bytes + 150_000
    assert new["data_added"] < whole / 5
    assert new["files_unmodified"] == files
    policy = next(task for task in yaml.safe_load(EXAMPLES["off-site-play"]) if "fold" in str(task))
    arguments = {**policy["vmkeeper.libvirt.backup_retention"], "repository": str(made.path)}
    assert arguments["fold"] == "never"
    pruned = ok("backup_retention", **arguments)
    assert [one["id"] for one in pruned["removed"]] == ids[2::-1], (
        "the older chain; the newest point stands on the other"
    )
    made.assert_settled(ids[3:])
    assert copy(made.path, restic)["data_added"] < 100_000, "nothing was rewritten"
    back = directory / "back"
    sh("off-site-restore", REPOSITORY=made.path, DEST=back, **restic)
    there = Built(back / made.path.relative_to("/"), made.contents, made.points)
    assert (there.path / UUID / ids[5] / "vda.qcow2").stat().st_mode & 0o777 == 0o600
    there.assert_settled(ids[3:])
    there.assert_exact("from the copy")
    assert there.findings() == []
    ok("restore", repository=str(there.path), source_domain=UUID, domain="lab-off-site", directory=str(directory))
    domain = libvirt.open("qemu:///system").lookupByName("lab-off-site")
    domain.undefine()
    raw = directory / "raw"
    image = directory / "lab-off-site.vda.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    assert raw.read_bytes() == made.contents[ids[5]]["vda"]
