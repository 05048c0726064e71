# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Take out of an image's disks what makes a machine this one, and what nobody else should read.

Done inside libguestfs, on the export's own copies, and looked at again before the disks are let go.  What is removed is also
discarded, so that the image does not carry it in its free space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .._errors import Unsupported, VmkeeperError
from ..hypervisor.appliance import Appliance

#: A device or volume by libguestfs' own naming (``/dev/sda1``, ``btrfsvol:/dev/sda2/@``).
_DEVICE = re.compile(r"[A-Za-z0-9:/_.@+-]{1,255}")

_MOST_LINES = 100_000


@dataclass(frozen=True)
class Operation:
    """One thing to seal. ``secret`` is what an image carries without it.

    ``removed`` and ``emptied`` are shell patterns; of ``trees`` the files go and the directories stay, since services expect
    theirs.
    """

    secret: str
    removed: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    trees: tuple[str, ...] = ()
    passwords: bool = False


_HOMES = ("/root", "/home/*")
_HISTORIES = (
    ".*_history",
    ".*history",
    ".lesshst",
    ".viminfo",
    ".local/share/fish/fish_history",
    ".local/state/*history",
    ".config/*/*history",
)

#: The operations by the names that a task gives them.
OPERATIONS = {
    "machine-id": Operation(
        "the machine-id and the seed of its random numbers",
        removed=("/var/lib/systemd/random-seed", "/var/lib/systemd/credential.secret", "/boot/loader/random-seed"),
        # Empty, not absent: systemd then makes a new one at each first boot, also on a root that is mounted read-only.
        emptied=("/etc/machine-id", "/var/lib/dbus/machine-id"),
    ),
    "ssh-hostkeys": Operation(
        "SSH host keys", removed=("/etc/ssh/ssh_host_*", "/etc/dropbear/dropbear_*_host_key", "/etc/dropbear/*.pem")
    ),
    "dhcp-leases": Operation(
        "DHCP leases",
        removed=(
            "/var/lib/dhcp/*",
            "/var/lib/dhclient/*",
            "/var/lib/dhcpcd/*",
            "/var/lib/NetworkManager/*lease*",
            "/var/lib/NetworkManager/timestamps",
            "/var/lib/NetworkManager/seen-bssids",
            "/var/lib/NetworkManager/secret_key",
            "/var/lib/wicked/*",
        ),
    ),
    "logs": Operation("logs", trees=("/var/log",), removed=("/var/crash/*", "/var/spool/abrt/*")),
    "histories": Operation(
        "histories of shells", removed=tuple(f"{home}/{name}" for home in _HOMES for name in _HISTORIES)
    ),
    "cloud-init": Operation("cloud-init's state and user data", removed=("/var/lib/cloud/*", "/run/cloud-init/*")),
    "passwords": Operation(
        "hashed passwords", removed=("/etc/shadow-", "/etc/gshadow-", "/etc/passwd-", "/etc/group-"), passwords=True
    ),
}


def unsealed(operations: Iterable[str]) -> str:
    """What an image that was sealed with these operations may still carry, in words."""
    done = set(operations)
    parts = [operation.secret for name, operation in OPERATIONS.items() if name not in done]
    return ", ".join([*parts, "users' keys and whatever applications keep"])


def without_passwords(content: bytes) -> bytes:
    """A shadow file in which no password lets anybody in. What was locked stays locked; keys work as before."""
    lines = []
    for line in content.split(b"\n"):
        fields = line.split(b":")
        if len(fields) > 2 and not line.startswith(b"#") and fields[1][:1] not in (b"*", b"!"):
            fields[1] = b"*"
        elif len(fields) > 2 and fields[1][:1] == b"!":
            fields[1] = b"!"  # "!" before a hash only locks it
        lines.append(b":".join(fields))
    return b"\n".join(lines)


def seal(disks: Sequence[str], operations: Sequence[str], *, doing: str, scratch: str, discards: bool = True) -> None:
    """Seal the one operating system on these disks. Raises where anything of it could not be done.

    ``disks`` are raw files: of a qcow2, QEMU drops only whole clusters.  ``discards``: their filesystem can have holes.
    """
    with Appliance([(disk, "raw") for disk in disks], doing=doing, scratch=scratch) as appliance:
        mounted = _mount(appliance, doing)
        for name in operations:
            _remove(appliance, OPERATIONS[name])
        left = [f"{name}: {what}" for name in operations for what in _left(appliance, OPERATIONS[name])]
        if left:
            raise VmkeeperError(
                f"{doing}: some of what had to go is still there ({'; '.join(left[:5])[:500]})",
                advice="Look at those files in the guest (are they immutable?), or leave that operation out",
            )
        for mountpoint in mounted:
            # Removed files must not stay in the free space.
            if not (discards and appliance.attempt("fstrim", mountpoint)):
                appliance.do("zero-free-space", mountpoint)


def _mount(appliance: Appliance, doing: str) -> list[str]:
    """Mount the one Linux on the disks as its fstab says; returns where."""
    roots = [line for line in appliance.do("inspect-os") if line]
    if len(roots) != 1 or not _DEVICE.fullmatch(roots[0]):
        raise Unsupported(
            f"{doing}: libguestfs finds {'no' if not roots else 'more than one'} operating system on its disks",
            advice="Seal machines whose disks hold one Linux that is not encrypted, and export all of its disks",
        )
    kind = appliance.do("inspect-get-type", roots[0])
    if kind[:1] != ["linux"]:
        raise Unsupported(f"{doing}: it is not a Linux", advice="Leave seal out, and generalize it by its own means")
    found = []
    for line in appliance.do("inspect-get-mountpoints", roots[0]):
        mountpoint, separator, device = line.rpartition(": ")
        if separator and mountpoint.startswith("/") and _DEVICE.fullmatch(device):
            found.append((mountpoint, device))
    for mountpoint, device in sorted(found, key=lambda one: len(one[0])):
        appliance.do("mount", device, mountpoint)
    return [mountpoint for mountpoint, _device in found]


def _expand(appliance: Appliance, patterns: Iterable[str]) -> list[str]:
    """What the patterns name, directories without the slash at their end."""
    return [
        path.rstrip("/") for pattern in patterns for path in appliance.do("glob-expand", pattern)[:_MOST_LINES] if path
    ]


def literal(path: str) -> str:
    """The pattern that names just this path."""
    return re.sub(r"([][*?{}~\\])", r"\\\1", path)


def _below(appliance: Appliance, tree: str) -> list[str]:
    if appliance.do("is-dir", tree) != ["true"]:
        return []
    return [f"{tree}/{name.lstrip('/')}" for name in appliance.do("find", tree)[:_MOST_LINES] if name]


def _remove(appliance: Appliance, operation: Operation) -> None:
    appliance.try_all([("glob", "rm-rf", pattern) for pattern in operation.removed])
    for tree in operation.trees:
        # rm-f removes no directory, so what it leaves are those, and names that a list of lines cannot tell.
        appliance.try_all([("rm-f", path) for path in _below(appliance, tree)])
        directories = [literal(path) for path in (tree, *_below(appliance, tree))]
        appliance.try_all([("glob", "rm-f", f"{path}/{kind}") for path in directories for kind in ("*", ".*")])
    for path in _expand(appliance, operation.emptied):
        if appliance.do("is-file", path) == ["true"]:
            appliance.do("truncate", path)
    if operation.passwords:
        for path in _expand(appliance, ("/etc/shadow", "/etc/gshadow")):
            content = appliance.read(path)
            if without_passwords(content) != content:
                appliance.do("write", path, without_passwords(content))


def _left(appliance: Appliance, operation: Operation) -> list[str]:
    """What should be gone and is not."""
    left = _expand(appliance, operation.removed)
    for tree in operation.trees:
        left += [path for path in _below(appliance, tree) if appliance.do("is-dir", path) != ["true"]]
    for path in _expand(appliance, operation.emptied):
        if appliance.do("is-file", path) == ["true"] and appliance.do("filesize", path) != ["0"]:
            left.append(path)
    if operation.passwords:
        for path in _expand(appliance, ("/etc/shadow", "/etc/gshadow")):
            content = appliance.read(path)
            left += [path] if without_passwords(content) != content else []
    return left
