# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""in_guest.py DOMAIN COMMAND...: run a program in a guest through its agent, without the collection; its output and exit code."""

from __future__ import annotations

import base64
import json
import sys
import time

import libvirt
import libvirt_qemu

LIMIT = 300  # seconds


def ask(domain: libvirt.virDomain, command: str, **arguments: object) -> dict:
    """One question to the agent; what it returns."""
    answer = libvirt_qemu.qemuAgentCommand(domain, json.dumps({"execute": command, "arguments": arguments}), 120, 0)
    return json.loads(answer)["return"]


def main(name: str, *argv: str) -> int:
    """Run it and wait for its end."""
    domain = libvirt.open("qemu:///system").lookupByName(name)
    until = time.monotonic() + LIMIT
    pid = ask(domain, "guest-exec", path=argv[0], arg=list(argv[1:]), **{"capture-output": True})["pid"]
    while True:
        status = ask(domain, "guest-exec-status", pid=pid)
        if status["exited"]:
            break
        if time.monotonic() > until:
            sys.exit(f"{name}: {argv} did not end within {LIMIT} s")
        time.sleep(0.2)
    sys.stdout.write(base64.b64decode(status.get("out-data", "")).decode())
    sys.stderr.write(base64.b64decode(status.get("err-data", "")).decode())
    return status.get("exitcode", 255)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
