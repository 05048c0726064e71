# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU guest agent: asked with a time limit, believed with care.

Replies come from inside the guest, so they are attacker-controlled: bounded in size, checked for type, never used
as a path or a command on the host.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .._errors import AgentSilent
from .binding import libvirt, libvirt_qemu
from .connection import message_of

#: A reply larger than this is not looked at.
MAXIMUM_REPLY = 1 << 20

#: How long a command that has nothing to do may take.
PROMPT_SECONDS = 5

#: libvirt's default for agent commands (VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK): wait for ever.
BLOCK = -2

_EXEC_POLL_SECONDS = 0.1

_COMMAND_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class AgentInfo:
    """What the agent said of itself. ``commands`` are those that are enabled."""

    version: str
    commands: frozenset[str]

    @property
    def can_tell_frozen(self) -> bool:
        """It can be asked whether the guest is frozen."""
        return "guest-fsfreeze-status" in self.commands

    @property
    def can_freeze(self) -> bool:
        """Freezing, thawing and asking for the state are all allowed. Never so while the guest is frozen: ask that first."""
        return {"guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"} <= self.commands

    @property
    def can_execute(self) -> bool:
        """Commands can be run in the guest (off by default on RHEL and its relatives)."""
        return {"guest-exec", "guest-exec-status"} <= self.commands

    @property
    def can_use_files(self) -> bool:
        """Guest files can be read and written."""
        return {"guest-file-open", "guest-file-read", "guest-file-write", "guest-file-close"} <= self.commands


def command(
    domain: Any, execute: str, arguments: dict[str, Any] | None = None, *, seconds: int = PROMPT_SECONDS
) -> Any:
    """Send one agent command and return its ``return`` value; raises :class:`AgentSilent` after ``seconds``."""
    request: dict[str, Any] = {"execute": execute}
    if arguments is not None:
        request["arguments"] = arguments
    try:
        reply = libvirt_qemu.qemuAgentCommand(domain, json.dumps(request), seconds, 0)
    except libvirt.libvirtError as error:
        raise AgentSilent(
            f"The guest agent of domain {domain.name()!r} did not carry out {execute}: {message_of(error)}",
            advice="See that qemu-guest-agent runs in the guest and that the domain has its channel",
            libvirt=message_of(error),
        ) from error
    return _reply_value(domain, execute, reply)


def _reply_value(domain: Any, execute: str, reply: Any) -> Any:
    problem = None
    value: Any = None
    if not isinstance(reply, str) or len(reply) > MAXIMUM_REPLY:
        problem = "a reply of no acceptable size"
    else:
        try:
            parsed = json.loads(reply)
            if isinstance(parsed, dict) and "return" in parsed:
                value = parsed["return"]
            else:
                problem = "a reply without a result"
        except (ValueError, RecursionError):
            problem = "a reply that is not JSON"
    if problem:
        raise AgentSilent(
            f"The guest agent of domain {domain.name()!r} gave {problem} to {execute}",
            advice="Update or restart qemu-guest-agent in the guest",
        )
    return value


def ask_info(domain: Any, *, seconds: int = PROMPT_SECONDS) -> AgentInfo:
    """Ask the agent what it is and what it may do."""
    value = command(domain, "guest-info", seconds=seconds)
    commands: set[str] = set()
    version = ""
    if isinstance(value, dict):
        version = str(value.get("version", ""))[:64]
        entries = value.get("supported_commands")
        for entry in entries[:512] if isinstance(entries, list) else ():
            if (
                isinstance(entry, dict) and entry.get("enabled") is True and isinstance(entry.get("name"), str)
            ) and _COMMAND_NAME.fullmatch(entry["name"]):
                commands.add(entry["name"])
    return AgentInfo(version=re.sub(r"[^\w.+~:-]", "?", version), commands=frozenset(commands))


def is_frozen(domain: Any, *, seconds: int = PROMPT_SECONDS) -> bool:
    """Whether the agent says that it holds filesystems frozen."""
    value = command(domain, "guest-fsfreeze-status", seconds=seconds)
    if value not in ("frozen", "thawed"):
        raise AgentSilent(
            f"The guest agent of domain {domain.name()!r} gave no usable freeze status",
            advice="Update qemu-guest-agent in the guest",
        )
    return bool(value == "frozen")


def ask(domain: Any) -> tuple[AgentInfo | None, str | None, bool]:
    """What the agent is, why it does not say so, and whether it says that filesystems are frozen.

    A frozen guest's agent has the freeze itself switched off, so that is not asked by what it can do.
    """
    info = None
    try:
        info = ask_info(domain)
        return info, None, info.can_tell_frozen and is_frozen(domain)
    except AgentSilent as error:
        return info, str(error.facts.get("libvirt") or error.problem), False


def read_file(domain: Any, path: str, *, limit: int = 65536) -> bytes | None:
    """The first ``limit`` bytes of a guest file, or None when the agent cannot read it."""
    try:
        handle = command(domain, "guest-file-open", {"path": path, "mode": "r"})
        try:
            reply = command(domain, "guest-file-read", {"handle": handle, "count": limit})
        finally:
            with contextlib.suppress(AgentSilent):
                command(domain, "guest-file-close", {"handle": handle})
        return base64.b64decode(reply["buf-b64"], validate=True)[:limit]
    except (AgentSilent, KeyError, TypeError, ValueError):
        return None


def write_file(domain: Any, path: str, content: bytes) -> bool:
    """Write a small guest file; False when the agent cannot."""
    try:
        handle = command(domain, "guest-file-open", {"path": path, "mode": "w"})
        try:
            command(domain, "guest-file-write", {"handle": handle, "buf-b64": base64.b64encode(content).decode()})
        finally:
            command(domain, "guest-file-close", {"handle": handle})
        return True
    except AgentSilent:
        return False


def mountpoints(domain: Any) -> tuple[str, ...]:
    """The guest's mounted filesystems as the agent lists them, bounded; empty when it cannot say.

    Not ``virDomainGetFSInfo``, which waits for ever by default: a dead network mount in the guest hangs it.
    """
    try:
        entries = command(domain, "guest-get-fsinfo")
    except AgentSilent:
        return ()
    found = (
        [entry.get("mountpoint") for entry in entries[:256] if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    return tuple(sorted(name for name in found if isinstance(name, str) and len(name) <= 1024 and name.isprintable()))


def flush(domain: Any, info: AgentInfo | None, *, seconds: float = 30.0) -> bool:
    """Let a Linux guest write its dirty pages while it still runs, so that the freeze has little left to write.

    A freeze flushes too, but with every writer standing still; with much dirty memory that takes longer than the cut.
    Best effort: False when commands cannot be run in the guest or it takes longer than ``seconds``.
    """
    if info is None or not info.can_execute:
        return False
    give_up = time.monotonic() + seconds
    try:
        started = command(domain, "guest-exec", {"path": "sync", "capture-output": False})
        while time.monotonic() < give_up:
            status = command(domain, "guest-exec-status", {"pid": started["pid"]})
            if status["exited"]:
                return True
            time.sleep(0.02)
    except (AgentSilent, KeyError, TypeError):
        pass
    return False


@dataclass(frozen=True)
class Executed:
    """How a program in the guest ended. ``output`` is the beginning of its standard output, ``errors`` of its standard error."""

    status: int
    output: str
    errors: str


#: What is kept of a guest program's output.
_OUTPUT_LIMIT = 65536


def execute(domain: Any, argv: Sequence[str], *, seconds: float = 60.0, stdin: str | None = None) -> Executed:
    """Run a program in the guest (no shell) and wait for its end; raises :class:`AgentSilent` after ``seconds``.

    The program is not ended then: the agent has no command for that.
    """
    arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
    if stdin is not None:
        arguments["input-data"] = base64.b64encode(stdin.encode()).decode()
    started = command(domain, "guest-exec", arguments)
    pid = started.get("pid") if isinstance(started, dict) else None
    if not isinstance(pid, int):
        raise AgentSilent(
            f"The guest agent of domain {domain.name()!r} started {argv[0]} and gave no process number",
            advice="Update qemu-guest-agent in the guest",
        )
    give_up = time.monotonic() + seconds
    while True:
        status = command(domain, "guest-exec-status", {"pid": pid})
        if isinstance(status, dict) and status.get("exited") is True:
            code = status.get("exitcode")
            # Killed by a signal: there is no exit code.
            return Executed(
                code if isinstance(code, int) else 255, _text(status.get("out-data")), _text(status.get("err-data"))
            )
        if time.monotonic() > give_up:
            raise AgentSilent(
                f"{argv[0]} in the guest of domain {domain.name()!r} did not end within {seconds:.0f} s",
                advice="Look at it in the guest",
            )
        time.sleep(_EXEC_POLL_SECONDS)


def _text(data: Any) -> str:
    try:
        return base64.b64decode(data, validate=True)[:_OUTPUT_LIMIT].decode(errors="replace")
    except (TypeError, ValueError):
        return ""


def response_timeout(domain: Any, *, status_directory: str = "/run/libvirt/qemu") -> int:
    """The agent response timeout in force, in seconds, or :data:`BLOCK`.

    libvirt has no getter; its status XML of the running domain states the value where this user may read it.
    """
    try:
        with open(f"{status_directory}/{domain.name()}.xml", encoding="utf-8") as status:
            match = re.search(r"<agentTimeout>(-?\d+)</agentTimeout>", status.read())
    except OSError:
        return BLOCK
    return int(match.group(1)) if match else BLOCK


@contextlib.contextmanager
def finite_timeout(domain: Any, seconds: int) -> Iterator[None]:
    """Limit how long libvirt itself waits for the agent, and put the old limit back.

    Without it a hung agent blocks the call for ever, and with it every later agent call of every client; the limit is
    runtime state of the domain, shared with other clients.
    """
    previous = response_timeout(domain)
    set_response_timeout(domain, seconds)
    try:
        yield
    finally:
        with contextlib.suppress(AgentSilent):
            set_response_timeout(domain, previous)


def freeze_limit(deadline: float) -> int:
    """Seconds that a freeze may take of a deadline; the rest is for the cut and two thaws."""
    return max(2, int(deadline * 0.6))


def set_response_timeout(domain: Any, seconds: int) -> None:
    """Set libvirt's limit for agent replies of this domain (virDomainAgentSetResponseTimeout, libvirt 5.10)."""
    try:
        domain.agentSetResponseTimeout(seconds, 0)
    except libvirt.libvirtError as error:
        raise AgentSilent(
            f"libvirt takes no time limit for the guest agent of domain {domain.name()!r}: {message_of(error)}",
            advice="See that the domain has a guest agent channel",
        ) from error
