# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""``tests/lab/enter``: run a command as a private test host.

Three processes. The *front* is what the caller started: it passes signals on and returns the exit
code. The *keeper* outlives the front: whichever way the front or the command ends, it ends the rest and
removes the host's directory. The *init* is process 1 of the host's own pid namespace: it lays the
mounts, starts the daemons, runs the command and reaps orphans; when it dies the kernel kills everything
in the namespace. Should front and keeper be killed together, init dies by its parent-death signal, and
the next start of any host sweeps the directory, whose lock nobody holds any more.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import grp
import os
import pwd
import select
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from . import assets, daemons, generation, kernel, probe

PREFIX = "vmk-lab-"
EXIT_UNUSABLE = 125
"""Exit code when the private host could not be made (as ``env`` and ``timeout`` do it)."""

# Paths of the hypervisor that each host has for itself, with the mode of the directory.
PRIVATE = {
    "/etc/libvirt": 0o755,
    "/var/lib/libvirt": 0o755,
    "/var/cache/libvirt": 0o711,
    "/var/log/libvirt": 0o755,
    "/var/lib/vmkeeper.libvirt": 0o700,
    "/run": 0o755,
}
# What another release's system shares with the machine besides those: devices, what tests write, and the checkout.
_SHARED = ("/dev", "/sys", "/tmp", str(Path(__file__).resolve().parents[2]))
# What of the real /etc/libvirt is copied: settings, never definitions of domains, networks or secrets, nor hooks.
_ETC_COPIED = ("*.conf", "nwfilter")

_CAPABILITIES = Path("qemu/capabilities")  # below /var/cache/libvirt

NEEDED = {
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon-system",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
}


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code of the command."""
    options = _parse(argv)
    problem = _unusable()
    if problem:
        print(f"enter: {problem}", file=sys.stderr)
        return EXIT_UNUSABLE
    if not options.no_libvirtd:
        try:
            probe.acceleration()  # builds the guest on first use
        except assets.AssetError as error:
            print(f"enter: {error}", file=sys.stderr)
            return EXIT_UNUSABLE
    if options.generation:
        try:
            options.system = generation.built_root(options.generation)
        except generation.GenerationError as error:
            print(f"enter: {error}", file=sys.stderr)
            return EXIT_UNUSABLE
    base = Path(os.environ.get("VMK_LAB_ROOT", "/var/tmp"))
    sweep(base)
    root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{options.name}-", dir=base))
    root.chmod(0o711)  # QEMU's user must reach the images below
    # Named only once it is locked: another host's sweep must not find it in between.
    lock = os.open(root / "lock.new", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(root / "lock.new", root / "lock")
    return _front(options, root)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="enter",
        description="Run CMD on a private test host: its own libvirtd, domains, /run and process tree.",
        epilog="VMK_LAB_ROOT (default /var/tmp) holds the host's directory while it lives.",
    )
    parser.add_argument("--name", default=f"h{os.getpid()}", help="name of the host (default: h<pid>)")
    parser.add_argument("--netns", action="store_true", help="give the host a network namespace of its own")
    parser.add_argument("--no-libvirtd", action="store_true", help="do not start virtlogd and libvirtd")
    parser.add_argument(
        "--generation", metavar="SUITE", help="run libvirtd, QEMU and modules on this Debian release (trixie, sid)"
    )
    parser.set_defaults(system=None)
    parser.add_argument("command", nargs="+", metavar="CMD", help="the command, after --")
    options = parser.parse_args(argv)
    if not options.name.replace("-", "").isalnum():
        parser.error("--name takes letters, digits and dashes only")
    return options


def _unusable(search: str | None = None) -> str | None:
    if os.geteuid() != 0:
        return "a private test host needs root: it mounts and makes namespaces"
    search = search or os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = {program: package for program, package in NEEDED.items() if not shutil.which(program, path=search)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        return f"not installed: {', '.join(sorted(missing))}; try: apt-get install {packages}"
    return None


def sweep(base: Path) -> None:
    """Remove what hosts whose processes were all killed at once have left below ``base``."""
    for root in base.glob(f"{PREFIX}*"):
        try:
            lock = os.open(root / "lock", os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(root)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _remove(root: Path) -> None:
    for node in kernel.loop_devices_backed_below(root):
        kernel.detach_loop(node)
    shutil.rmtree(root, ignore_errors=True)


# --- front -------------------------------------------------------------------------------------------


def _front(options: argparse.Namespace, root: Path) -> int:
    status_read, status_write = os.pipe()
    front = os.getpid()
    keeper = os.fork()
    if keeper == 0:
        os.close(status_read)
        _guarded(lambda: _keeper(options, root, front, status_write))
    os.close(status_write)
    # The terminal sends these to the whole foreground group: the command decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    with os.fdopen(status_read) as status:
        first = status.readline()
        if first:
            init = int(first)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda received, _frame: _pass_on(init, received))
        second = status.readline()
    os.waitpid(keeper, 0)
    if not second:  # the keeper was killed: its work is ours
        _remove(root)
        print("enter: the process that kept the test host was killed", file=sys.stderr)
        return EXIT_UNUSABLE
    return int(second)


def _pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _guarded(body: Callable[[], int]) -> NoReturn:
    code = EXIT_UNUSABLE
    try:
        code = body()
    except BaseException as error:  # noqa: BLE001  (a forked process must never return into its parent's code)
        print(f"enter: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- keeper ------------------------------------------------------------------------------------------


def _keeper(options: argparse.Namespace, root: Path, front: int, status: int) -> int:
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    front_fd = os.pidfd_open(front)
    if os.getppid() != front:  # it was gone before the descriptor was open
        _remove(root)
        return 0
    kernel.unshare(kernel.CLONE_NEWPID)
    init = os.fork()
    if init == 0:
        os.close(status)
        os.close(front_fd)
        _guarded(lambda: _init(options, root))
    # Off the front's process group, so that `kill -9 -- -<group>` leaves someone to clean up. Its session
    # stays, and init stays in the group: the command keeps the terminal.
    os.setpgid(0, 0)
    os.write(status, f"{init}\n".encode())
    init_fd = os.pidfd_open(init)
    poll = select.poll()
    poll.register(front_fd, select.POLLIN)
    poll.register(init_fd, select.POLLIN)
    if init_fd not in {fd for fd, _event in poll.poll()}:
        os.kill(init, signal.SIGKILL)
    _pid, how = os.waitpid(init, 0)
    if not options.no_libvirtd:
        _keep_capabilities(root, options.generation)
    _remove(root)
    os.write(status, f"{_exit_code(how)}\n".encode())
    return 0


def _keep_capabilities(root: Path, suite: str | None) -> None:
    """Save what libvirtd has learnt about QEMU for the next host.

    libvirt itself throws such a file away when QEMU, libvirt or the kernel have changed.
    """
    kept = _kept_capabilities(suite)
    kept.mkdir(parents=True, exist_ok=True)
    for source in (root / "var-cache-libvirt" / _CAPABILITIES).glob("*.xml"):
        partial = kept / f"{source.name}.{os.getpid()}"
        shutil.copy2(source, partial)
        partial.rename(kept / source.name)


def _kept_capabilities(suite: str | None) -> Path:
    release = f"-{suite}" if suite else ""
    return assets.cache_directory() / f"capabilities-{probe.acceleration()}{release}"


def _exit_code(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


# --- init --------------------------------------------------------------------------------------------


def _init(options: argparse.Namespace, root: Path) -> int:
    kernel.die_with_parent(signal.SIGKILL)
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS
    kernel.unshare(flags | (kernel.CLONE_NEWNET if options.netns else 0))
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    host_name = f"lab-{options.name}"
    kernel.set_hostname(host_name)
    _lay_mounts(root, host_name, options)
    if not options.no_libvirtd and probe.acceleration() == "qemu" and os.path.exists("/dev/kvm"):
        # A KVM that hangs guests also hangs libvirt's questions to QEMU (20 s each): nobody is to see it. What
        # stands there instead must be closed to QEMU's user, or libvirt asks QEMU again at every turn.
        closed = root / "no-kvm"
        os.mknod(closed, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # a device: libvirt cannot move a file's mount
        kernel.mount(str(closed), "/dev/kvm", None, kernel.MS_BIND)
    if options.system is not None:
        _lay_system(root, options.system)
    daemons.seed_run(options.name)
    if options.netns:
        os.system("ip link set lo up")
    if not options.no_libvirtd:
        daemons.start_virtlogd(options.system)
        daemons.start_libvirtd(system=options.system)
    environment = dict(os.environ, VMK_LAB_HOST=options.name, VMK_LAB_HOST_ROOT=str(root))
    if options.system is not None:
        environment["VMK_LAB_GENERATION"] = options.generation
        environment["VMK_LAB_SYSTEM"] = str(options.system)
        environment["VMK_LAB_PYTHON"] = str(generation.python_of(options.system, root))
        environment["ANSIBLE_REMOTE_TMP"] = str(root / "ansible")  # modules must find their files on both systems
    command = os.fork()
    if command == 0:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvpe(options.command[0], options.command, environment)
        except OSError as error:
            print(f"enter: {options.command[0]}: {error.strerror}", file=sys.stderr)
            os._exit(126 if isinstance(error, PermissionError) else 127)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: _pass_on(command, received))
    while True:
        pid, how = os.wait()
        if pid == command:
            return _exit_code(how)


def _lay_mounts(root: Path, host_name: str, options: argparse.Namespace) -> None:
    for path, mode in PRIVATE.items():
        own = root / path.strip("/").replace("/", "-")
        own.mkdir()
        own.chmod(mode)
        Path(path).mkdir(exist_ok=True)
    _seed_etc(root / "etc-libvirt", options.system)
    _seed_var(root, None if options.no_libvirtd else _kept_capabilities(options.generation))
    hosts = root / "hosts"
    hosts.write_text(Path("/etc/hosts").read_text() + f"127.0.1.1 {host_name}\n")
    # libvirtd looks its own name up; without this it waits for a resolver.
    kernel.mount(str(hosts), "/etc/hosts", None, kernel.MS_BIND)
    for path in PRIVATE:
        kernel.mount(str(root / path.strip("/").replace("/", "-")), path, None, kernel.MS_BIND)


def _lay_system(root: Path, system: Path) -> None:
    """Give another release's root file system the mounts that this host has, at the same places; the rest is read-only."""
    kernel.mount(str(system), str(system), None, kernel.MS_BIND)
    shared = [*PRIVATE, *_SHARED, os.environ.get("VMK_LAB_ROOT", "/var/tmp"), "/etc/hosts"]
    for path in shared:
        place = system / path.lstrip("/")
        if os.path.isdir(path):
            place.mkdir(parents=True, exist_ok=True)
        kernel.mount(path, str(place), None, kernel.MS_BIND | kernel.MS_REC)
    kernel.mount("proc", str(system / "proc"), "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    # A process below another root makes no user namespace (user_namespaces(7)); the first one of this host is below none.
    unshare = root / "unshare"
    unshare.write_text('#!/bin/sh\nexec /usr/bin/nsenter --target 1 --uts --root --wd -- /usr/bin/unshare "$@"\n')
    unshare.chmod(0o755)
    kernel.mount(str(unshare), str(system / "usr/bin/unshare"), None, kernel.MS_BIND)
    kernel.mount("none", str(system), None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY)


def _seed_etc(own: Path, system: Path | None) -> None:
    for pattern in _ETC_COPIED:
        for source in ((system or Path("/")) / "etc/libvirt").glob(pattern):
            if source.is_dir():
                shutil.copytree(source, own / source.name)
            else:
                shutil.copy2(source, own / source.name)
    # Control groups are the one thing that a mount namespace does not separate: two hosts with a domain of
    # the same name and number would share /sys/fs/cgroup/*/machine/qemu-1-name.
    with (own / "qemu.conf").open("a") as settings:
        settings.write("\n# the private test host\ncgroup_controllers = [ ]\n")
        if system is not None:
            # libvirt cannot make a private /dev below another root: the devices that it wants there are missing.
            settings.write("namespaces = [ ]\n")
    with (own / "libvirtd.conf").open("a") as settings:
        settings.write(
            "\n# the private test host\n"
            'log_filters = "2:qemu 3:util.object 3:rpc 3:remote 3:event"\n'
            'log_outputs = "3:file:/var/log/libvirt/libvirtd.log"\n'
        )


def _seed_var(root: Path, capabilities: Path | None) -> None:
    """The directories that Debian's package makes, with its owners and modes, and what libvirt knew about QEMU."""
    libvirt = root / "var-lib-libvirt"
    for name in ("boot", "images"):
        (libvirt / name).mkdir()
        (libvirt / name).chmod(0o711)
    (libvirt / "qemu").mkdir(mode=0o750)
    try:
        user = pwd.getpwnam("libvirt-qemu")
        os.chown(libvirt / "qemu", user.pw_uid, _group_of(user))
    except KeyError:  # another distribution's user: libvirtd sets it right when it starts
        pass
    (root / "var-log-libvirt" / "qemu").mkdir()
    known = root / "var-cache-libvirt" / _CAPABILITIES
    known.mkdir(parents=True)
    if capabilities is not None:
        for source in capabilities.glob("*.xml"):
            shutil.copy2(source, known)


def _group_of(user: pwd.struct_passwd) -> int:
    try:
        return grp.getgrnam(user.pw_name).gr_gid
    except KeyError:
        return user.pw_gid
