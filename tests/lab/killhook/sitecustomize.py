# Copyright: vmkeeper.libvirt contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kills a module at a step of its journal. Put this directory on PYTHONPATH of the module's process.

Production code knows nothing of it: the journal's two methods are wrapped when the journal is imported.

On a host without AppArmor it can also show the module the rules of one: ``VMK_APPARMOR_RULES`` is a file as libvirt writes it
for a guest. What it denies is then not tried; that it would really be denied is for ``make test-nested`` to show.

- ``VMK_KILL_AT``: ``step`` or ``step#2`` (its second time). The process is killed when it has recorded the step and not
  yet begun it. ``launch-worker`` is no step: the task is killed when the worker's ticket is written and its process is not started.
- ``VMK_KILL_HOW``: ``kill`` (default) or ``stop`` (SIGSTOP, to hold the window open).
- ``VMK_KILL_LOG``: a file to which each step that is reached is appended, with ``!`` before the fatal one. A run without
  ``VMK_KILL_AT`` lists the steps there are.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from typing import Any

_JOURNAL = ".plugins.module_utils.safety.journal"
_DETACHED = ".plugins.module_utils.safety.detached"
_APPARMOR = ".plugins.module_utils.hypervisor.apparmor"
_LAUNCH = "launch-worker"
_counts: dict[str, int] = {}


def _reached(name: str) -> None:
    _counts[name] = _counts.get(name, 0) + 1
    wanted, _hash, number = os.environ.get("VMK_KILL_AT", "").partition("#")
    fatal = name == wanted and _counts[name] == int(number or 1)
    log = os.environ.get("VMK_KILL_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{'!' if fatal else ''}{name}\n")
    if fatal:
        os.kill(os.getpid(), signal.SIGSTOP if os.environ.get("VMK_KILL_HOW") == "stop" else signal.SIGKILL)


def _wrap(module: Any) -> None:
    if module.__name__.endswith(_APPARMOR):
        module.rules_file = lambda handle: os.environ["VMK_APPARMOR_RULES"]
        return
    if module.__name__.endswith(_DETACHED):
        launch = module.launch

        def die_or_launch(*arguments, **how):
            if how["unit"].startswith("vmkeeper-worker-"):
                _reached(_LAUNCH)
            return launch(*arguments, **how)

        module.launch = die_or_launch
        return
    journal_class = module.Journal
    step, moment = journal_class.step, journal_class.moment

    def step_then_die(self, name, **data):
        step(self, name, **data)
        _reached(name)

    def moment_then_die(self, name):
        moment(self, name)
        _reached(name)

    journal_class.step, journal_class.moment = step_then_die, moment_then_die


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        _wrap(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if not fullname.endswith(tuple(_WANTED)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_WANTED = []
if os.environ.get("VMK_KILL_AT") or os.environ.get("VMK_KILL_LOG"):
    _WANTED.append(_JOURNAL)
if os.environ.get("VMK_KILL_AT") == _LAUNCH:
    _WANTED.append(_DETACHED)
if os.environ.get("VMK_APPARMOR_RULES"):
    _WANTED.append(_APPARMOR)
if _WANTED:
    sys.meta_path.insert(0, _Finder())
