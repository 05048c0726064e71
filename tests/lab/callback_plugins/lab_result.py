# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Stdout callback of the test lab: one JSON line a task result, into the file that $VMK_LAB_RESULTS names."""

from __future__ import annotations

import json
import os

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: lab_result
type: stdout
short_description: Write task results as JSON lines to a file
description: Used by the project's own tests only.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]  # Ansible carries no types
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "lab_result"

    def _note(self, result, outcome):
        content = getattr(result, "result", None)  # ansible-core 2.19 and later
        if content is None:
            content = result._result
        host = getattr(result, "host", None) or result._host
        task = getattr(result, "task", None) or result._task
        line = {"host": host.get_name(), "task": task.get_name(), "outcome": outcome, "result": content}
        with open(os.environ["VMK_LAB_RESULTS"], "a", encoding="utf-8") as results:
            results.write(json.dumps(line, default=str) + "\n")

    def v2_runner_on_ok(self, result):
        self._note(result, "ok")

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._note(result, "failed")

    def v2_runner_on_skipped(self, result):
        self._note(result, "skipped")

    def v2_runner_on_unreachable(self, result):
        self._note(result, "unreachable")

    def v2_runner_item_on_ok(self, result):
        self._note(result, "item_ok")

    def v2_runner_item_on_failed(self, result):
        self._note(result, "item_failed")
