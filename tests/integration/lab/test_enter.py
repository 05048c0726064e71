# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Private hosts stand side by side, and leave nothing behind however they end.

The hosts of these tests are nested in the one that pytest runs in.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import kernel
from lab.host import TestHost
from lab.waiting import until

ENTER = Path(__file__).resolve().parents[2] / "lab" / "enter"

_DEFINE = """
import libvirt, os, sys
connection = libvirt.open("qemu:///system")
names = [domain.name() for domain in connection.listAllDomains()]
connection.defineXML("<domain type='qemu'><name>lab-twin</name><memory>65536</memory><os><type>hvm</type></os></domain>")
print(names, flush=True)
sys.stdin.read()
print([domain.name() for domain in connection.listAllDomains()], flush=True)
"""


@pytest.fixture
def root(tmp_path: Path, host: TestHost) -> Path:
    """Where the nested hosts have their directories."""
    tmp_path.chmod(0o711)
    return tmp_path


def enter(root: Path, *words: str, options: tuple[str, ...] = ("--no-libvirtd",)) -> list[str]:
    return ["/usr/bin/env", f"VMK_LAB_ROOT={root}", sys.executable, str(ENTER), *options, "--", *words]


def hosts_in(root: Path) -> list[Path]:
    return list(root.glob("vmk-lab-*"))


def processes(marker: str) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in words and words[0] == b"sleep":
            found.append(int(directory.name))
    return found


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("exit 0", 0), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_exit_code_is_the_commands(root: Path, script: str, code: int) -> None:
    assert subprocess.run(enter(root, "sh", "-c", script), check=False).returncode == code
    assert hosts_in(root) == []


def test_unknown_command_is_127(root: Path) -> None:
    result = subprocess.run(enter(root, "no-such-command"), check=False, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 127
    assert "no-such-command" in result.stderr


def test_streams_pass_through(root: Path) -> None:
    result = subprocess.run(
        enter(root, "sh", "-c", "cat; echo err >&2"), input="in", capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("in", "err\n")


def test_without_root_it_says_so(root: Path) -> None:
    command = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/usr/bin/python3",
        str(ENTER),
        "--",
        "true",
    ]
    result = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 125
    assert "needs root" in result.stderr


def test_missing_packages_are_named(root: Path) -> None:
    environment = {**os.environ, "PATH": "/nowhere"}
    program = "from lab import enter_host; print(enter_host._unusable(search='/nowhere'))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ENTER.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "apt-get install libvirt-daemon-system qemu-system-x86 qemu-utils" in result.stdout


def test_two_hosts_have_the_same_domain_side_by_side(root: Path, host: TestHost) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        command = enter(root, "/usr/bin/python3", "-c", _DEFINE, options=("--name", name))
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    both = [start("one"), start("two")]
    first_lines = [first_line(process) for process in both]
    last_lines = [process.communicate()[0] for process in both]
    assert first_lines == ["[]\n", "[]\n"]
    assert last_lines == ["['lab-twin']\n", "['lab-twin']\n"]
    assert "lab-twin" not in [domain.name() for domain in host.connect().listAllDomains()]
    assert hosts_in(root) == []


@pytest.fixture
def lingering(root: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A host with a loop device, a mount of its own and a detached process."""
    marker = str(70000 + os.getpid() % 1000) + "." + str(abs(hash(request.node.name)) % 1000)
    script = (
        "truncate -s 4M /var/lib/libvirt/images/disk && losetup -f /var/lib/libvirt/images/disk && "
        f"mount -t tmpfs tmpfs /mnt && touch /run/in-private && setsid --fork sleep {marker} && exec sleep {marker}"
    )
    process = subprocess.Popen(enter(root, "sh", "-c", script), start_new_session=True)
    until(lambda: len(processes(marker)) == 2, "the host's processes starting")
    assert kernel.loop_devices_backed_below(root)
    assert not Path("/run/in-private").exists()
    yield process, marker
    process.kill()
    process.wait()


def assert_nothing_left(root: Path, marker: str) -> None:
    until(lambda: processes(marker) == [], "the host's processes ending")
    until(lambda: hosts_in(root) == [], "the host's directory going")
    listing = subprocess.run(
        ["losetup", "--list", "--noheadings"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert "images/disk" not in listing


def test_sigkill_of_enter_leaves_nothing(root: Path, lingering) -> None:
    process, marker = lingering
    process.kill()
    assert_nothing_left(root, marker)


def test_sigkill_of_the_whole_process_group_leaves_nothing(root: Path, lingering) -> None:
    process, marker = lingering
    os.killpg(process.pid, signal.SIGKILL)
    assert_nothing_left(root, marker)


def test_sigkill_of_the_keeper_leaves_nothing_and_is_reported(root: Path, lingering) -> None:
    process, marker = lingering
    (keeper,) = children(process.pid)
    os.kill(keeper, signal.SIGKILL)
    assert process.wait(60) == 125
    assert_nothing_left(root, marker)


def test_what_a_kill_of_everything_leaves_is_swept_by_the_next_host(root: Path, lingering) -> None:
    process, marker = lingering
    (keeper,) = children(process.pid)
    os.kill(keeper, signal.SIGSTOP)  # it must not clean up between the two kills
    os.kill(process.pid, signal.SIGKILL)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: processes(marker) == [], "the host's processes ending")
    assert len(hosts_in(root)) == 1
    subprocess.run(enter(root, "true"), check=True)
    assert_nothing_left(root, marker)


def test_sigterm_reaches_the_command(root: Path) -> None:
    script = "trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen(enter(root, "sh", "-c", script), stdout=subprocess.PIPE, text=True)
    assert first_line(process) == "up\n"
    process.terminate()
    assert process.communicate(timeout=60)[0] == "asked\n"
    assert process.returncode == 3
    assert hosts_in(root) == []


def test_netns_has_only_a_loopback_of_its_own(root: Path) -> None:
    result = subprocess.run(
        enter(root, "ip", "-o", "link", options=("--no-libvirtd", "--netns")),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert [line.split(":")[1].strip() for line in result.stdout.splitlines()] == ["lo"]
    assert "UP" in result.stdout
