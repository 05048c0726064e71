# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Nested hypervisors from a shell, and for molecule and its create and destroy: ``PYTHONPATH=tests python3 -m nested --help``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import probe
from lab.spec import DiskSpec, GuestSpec

from . import guest, machine
from .image import BuildError, built_image


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m nested", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the image unless it is there; print its directory")
    up = commands.add_parser("up", help="start machines, in place of what there is of these names")
    up.add_argument("names", nargs="+", metavar="NAME")
    up.add_argument(
        "--molecule", type=Path, metavar="DIRECTORY", help="write instance_config.yml and known_hosts there"
    )
    down = commands.add_parser("down", help="destroy machines; without a name, all there are")
    down.add_argument("names", nargs="*", metavar="NAME")
    commands.add_parser("list", help="names of all machines of this test host, or of this cache")
    shell = commands.add_parser("ssh", help="log in, or run a command line")
    shell.add_argument("--user", default="root", choices=("root", "operator", "observer"))
    shell.add_argument("name")
    shell.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    add_guest = commands.add_parser("guest", help="define and start a tiny guest in a machine")
    add_guest.add_argument("name", help="the machine")
    add_guest.add_argument(
        "guest", help="GUEST or GUEST:vda=boot,vdb (it boots from vda): the domain is called lab-GUEST"
    )
    add_guest.add_argument("--defined", action="store_true", help="leave it shut off")
    add_guest.add_argument("--max-vcpus", type=int, metavar="N", help="vCPUs that can be plugged in, of which one is")
    add_guest.add_argument("--memory", type=int, default=160, metavar="MIB")
    wait = commands.add_parser("wait", help="wait until the agents of all running guests answer; say how they run")
    wait.add_argument("names", nargs="+", metavar="NAME")
    clear = commands.add_parser("clear", help="remove all guests from machines, and what was kept beside them")
    clear.add_argument("names", nargs="+", metavar="NAME")
    scenarios = commands.add_parser("scenarios", help="run molecule's scenarios, in a private test host")
    scenarios.add_argument("words", nargs="*", metavar="OPTION", help="of molecule test, after --")
    options = parser.parse_args(arguments)
    try:
        return {
            "build": _build,
            "up": _up,
            "down": _down,
            "list": _list,
            "ssh": _ssh,
            "guest": _guest,
            "wait": _wait,
            "clear": _clear,
            "scenarios": _scenarios,
        }[options.command](options)
    except (machine.MachineError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1


def _build(_options: argparse.Namespace) -> int:
    print(built_image().directory)
    return 0


def _up(options: argparse.Namespace) -> int:
    started: list[machine.Machine] = []
    try:
        with ThreadPoolExecutor() as pool:
            started = list(pool.map(machine.start, options.names))
    except BaseException:
        for name in options.names:
            machine.destroy(name)
        raise
    if options.molecule:
        instances = [_instance(each) for each in started]
        (options.molecule / "instance_config.yml").write_text(json.dumps(instances, indent=1) + "\n")  # JSON is YAML
        (options.molecule / "known_hosts").write_text("".join(each.known_hosts.read_text() for each in started))
    for each in started:
        print(f"{each.name}: {' '.join(each.ssh_command())}")
    return 0


def _instance(started: machine.Machine) -> dict[str, object]:
    return {
        "instance": started.name,
        "address": "127.0.0.1",
        "port": started.port,
        "user": "operator",
        "identity_file": str(started.private_key),
    }


def _down(options: argparse.Namespace) -> int:
    for name in options.names or machine.names():
        machine.destroy(name)
    return 0


def _list(_options: argparse.Namespace) -> int:
    print("".join(f"{name}\n" for name in machine.names()), end="")
    return 0


def _ssh(options: argparse.Namespace) -> int:
    command = machine.running(options.name).ssh_command(options.user)
    sys.stdout.flush()
    os.execvp(command[0], [*command, *options.words])


def _guest(options: argparse.Namespace) -> int:
    name, _colon, disks = options.guest.partition(":")
    spec = GuestSpec(
        name,
        disks=tuple(_disk(word) for word in (disks or "vda").split(",")),
        memory=options.memory,
        max_vcpus=options.max_vcpus,
    )
    print(guest.place(machine.running(options.name), spec, start=not options.defined))
    return 0


def _wait(options: argparse.Namespace) -> int:
    for name in options.names:
        hypervisor = machine.running(name)
        for domain in guest.running(hypervisor):
            guest.wait_agent(hypervisor, domain)
            print(f"{domain} on {name}: acceleration {guest.acceleration(hypervisor, domain)}", flush=True)
    return 0


def _clear(options: argparse.Namespace) -> int:
    for name in options.names:
        guest.clear(machine.running(name))
    return 0


def _scenarios(options: argparse.Namespace) -> int:
    """Run molecule; once more where a machine's kernel did not survive the emulation.

    QEMU 7.2 emulates AMD's virtualization with a fault: seldom with Debian 12's kernel and often with Debian 13's, the one that runs
    guests by it loses its stack ("stack guard page was hit", "corrupted stack end").  Nothing of the collection's is the cause then,
    nor does it show where the processor is a real one.
    """
    root = Path(os.environ["VMK_LAB_HOST_ROOT"])
    for attempt in ("first", "second"):
        # Below the host's root, it goes with the host: what is left of an interrupted run would make molecule skip what has to be done.
        directory = root / f"molecule-{attempt}"
        directory.mkdir()
        machine.take_panics()
        molecule = [str(Path(sys.executable).with_name("molecule")), "test", "--report", *options.words]
        environment = {**os.environ, "MOLECULE_EPHEMERAL_DIRECTORY": str(directory)}
        environment.pop("PYTHONPATH", None)
        status = subprocess.run(molecule, env=environment, check=False).returncode
        panics = machine.take_panics()
        if status == 0 or attempt == "second" or not panics or probe.acceleration() == "kvm":
            break
        print(f"\nA nested hypervisor's kernel panicked; all scenarios are run once more.\n{panics}", flush=True)
    return status


def _disk(word: str) -> DiskSpec:
    target, _equals, boot = word.partition("=")
    if boot not in ("", "boot"):
        raise machine.MachineError(f"{word!r}: a disk is vda, or vda=boot")
    # The lab's writers would take half of an emulated CPU for themselves.
    return DiskSpec(target, boot=bool(boot), writer=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
