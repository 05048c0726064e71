# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Job templates as AWX runs them: ansible-runner, a project, the collection from its artifact, answers of surveys as text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.ansible import CHECKOUT, INTERPRETER

BIN = Path(sys.executable).parent
"""Where the controller's programs are: ansible-runner, ansible-builder."""

LIMIT = 600.0


def install_artifact(directory: Path) -> Path:
    """Build the collection and install it from its artifact; the collections path."""
    subprocess.run([CHECKOUT / "extensions/molecule/shared/install_artifact", directory], check=True)
    return directory / "collections"


@dataclass(frozen=True)
class Job:
    """A job that has ended."""

    rc: int
    status: str
    events: Sequence[Mapping[str, Any]]
    output: str

    def results(self, task: str) -> list[dict[str, Any]]:
        """What the task of that name answered, for each host and item."""
        return [
            event["event_data"]["res"]
            for event in self.events
            if event["event"] in ("runner_on_ok", "runner_on_failed", "runner_item_on_ok", "runner_item_on_failed")
            and event["event_data"]["task"] == task
            and "results" not in event["event_data"]["res"]
        ]


class Running:
    """A job under way."""

    def __init__(self, directory: Path, process: subprocess.Popen[str]) -> None:
        self._directory = directory
        self._process = process

    def end(self) -> Job:
        """Wait for its end. What it printed is kept, as AWX keeps it."""
        output, _none = self._process.communicate(timeout=LIMIT)
        artifacts = self._directory / "artifacts" / "job"
        files = sorted((artifacts / "job_events").glob("*.json"), key=lambda path: int(path.name.split("-")[0]))
        events = [json.loads(path.read_text()) for path in files]
        status = (artifacts / "status").read_text() if (artifacts / "status").exists() else "none"
        return Job(self._process.returncode, status, events, output)


class Controller:
    """Launches jobs against this test host, each in a private data directory of its own."""

    def __init__(self, directory: Path, collections: Path) -> None:
        self._directory = directory
        self._collections = collections
        self._count = 0

    def launch(self, playbook: str | Sequence[Mapping[str, Any]], **survey: str) -> Running:
        """Start a job: a playbook of the collection, or plays. All variables are text, whatever they stand for."""
        assert all(isinstance(answer, str) for answer in survey.values())
        self._count += 1
        directory = self._directory / f"job{self._count}"
        for name in ("project", "inventory", "env"):
            (directory / name).mkdir(parents=True)
        plays = [{"import_playbook": f"vmkeeper.libvirt.{playbook}"}] if isinstance(playbook, str) else playbook
        _write(directory / "project" / "site.yml", list(plays))
        variables = {"ansible_connection": "local", "ansible_python_interpreter": INTERPRETER}
        # another name of this host, which is in no group
        inventory = {
            "all": {"children": {"hypervisors": {"hosts": {"kvm01": variables}}}, "hosts": {"kvm02": variables}}
        }
        _write(directory / "inventory" / "hosts.json", inventory)
        # AWX marks what a user has typed, so that it is never taken for a template.
        answers = "".join(f"{name}: !unsafe {json.dumps(answer)}\n" for name, answer in survey.items())
        (directory / "env" / "extravars").write_text(f"---\n{answers}" if answers else "{}\n")
        environment = {
            "ANSIBLE_COLLECTIONS_PATH": str(self._collections),
            "ANSIBLE_LOCAL_TEMP": str(directory / "tmp"),
            "ANSIBLE_NOCOLOR": "1",
            # this user's home is not what the password file says on every test host
            "ANSIBLE_REMOTE_TMP": str(directory / "remote"),
        }
        _write(directory / "env" / "envvars", environment)
        process = subprocess.Popen(
            [BIN / "ansible-runner", "run", str(directory), "-p", "site.yml", "--ident", "job"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        )
        return Running(directory, process)

    def run(self, playbook: str | Sequence[Mapping[str, Any]], **survey: str) -> Job:
        """Launch a job and wait for its end."""
        return self.launch(playbook, **survey).end()

    def succeed(self, playbook: str | Sequence[Mapping[str, Any]], **survey: str) -> Job:
        """Run a job that has to be successful."""
        job = self.run(playbook, **survey)
        assert (job.rc, job.status) == (0, "successful"), job.output
        return job


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")  # JSON is YAML
