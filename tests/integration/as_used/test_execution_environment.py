# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""ansible-builder takes the execution environment, and finds in the installed collection what it needs there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml
from lab.ansible import CHECKOUT

from ansible_collections.vmkeeper.libvirt.tests.integration.as_used.runner import BIN


def builder(*arguments: str | Path) -> str:
    run = subprocess.run([BIN / "ansible-builder", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "outdated" not in run.stdout + run.stderr, "of the base image"
    return run.stdout


def test_ansible_builder_makes_a_context_of_the_execution_environment(tmp_path: Path) -> None:
    builder("create", "--file", CHECKOUT / "execution-environment.yml", "--context", tmp_path / "context")
    requirements = yaml.safe_load((tmp_path / "context/_build/requirements.yml").read_text())
    assert requirements["collections"] == [{"name": "vmkeeper.libvirt"}]
    assert any((tmp_path / "context" / name).exists() for name in ("Dockerfile", "Containerfile"))


def test_the_installed_collection_says_what_an_execution_environment_needs(collections: Path) -> None:
    found = yaml.safe_load(builder("introspect", collections))
    python = (CHECKOUT / "meta/ee-requirements.txt").read_text()
    assert [line.split("#")[0].strip() for line in found["python"]] == [
        line for line in python.splitlines() if line and not line.startswith("#")
    ]
    assert not found["system"], "the modules run on hypervisors: the image needs no libvirt and no QEMU"
