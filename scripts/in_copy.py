# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a command in a throw-away copy of the collection: `.venv/bin/python scripts/in_copy.py COMMAND...`.

The copy holds what git knows of or would add, uncommitted changes too, and lies at
`.../ansible_collections/vmkeeper/libvirt`, where ansible-test insists on being run. It is a git
repository of its own: inside an ignored directory of ours ansible-test would find nothing to test
and succeed. `ansible-galaxy collection build` is run here too, because it packs whatever lies about.

The command's HOME is `.cache/home`. ansible-test keeps its virtual environments there, and it starts
them with a `get-pip.py` from a download site; the one put there beforehand uses Python's own
`ensurepip` instead, so that nothing but the configured package index is needed.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
HOME = CACHE / "home"

GET_PIP = """\
# Stands in for get-pip.py. ensurepip runs in a process of its own: it switches pip's configuration off
# for the process that it runs in.
import subprocess
import sys

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a not in ("--no-setuptools", "--no-wheel")]
    subprocess.check_call([sys.executable, "-m", "ensurepip"], stdout=subprocess.DEVNULL)
    sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *arguments]))
"""


def tracked_files() -> Iterator[Path]:
    """Yield what git tracks or would add, relative to ROOT; not what was deleted but not yet committed."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    for name in listing.decode().split("\0"):
        path = Path(name)
        if name and os.path.lexists(ROOT / path):
            yield path


@contextmanager
def collection_copy() -> Iterator[Path]:
    """Make the copy, yield its root, remove it."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="copy-", dir=CACHE) as top:
        root = Path(top, "ansible_collections", "vmkeeper", "libvirt")
        root.mkdir(parents=True)
        for path in tracked_files():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, root / path, follow_symlinks=False)
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
        yield root


def pip_bootstrap_names() -> list[str]:
    """Return the file names under which the installed ansible-test looks for its get-pip.py.

    They carry the pip version that it pins. Raises RuntimeError when they cannot be found out,
    which a new ansible-core may cause.
    """
    source = Path(sys.executable).parent.parent.glob(
        "lib/python3*/site-packages/ansible_test/_internal/python_requirements.py"
    )
    text = "".join(path.read_text(encoding="utf-8") for path in source)
    versions = re.findall(r"pip=['\"]([0-9.]+)['\"]", text)
    if not versions:
        raise RuntimeError("cannot tell which pip ansible-test wants: see pip_bootstrap_names in scripts/in_copy.py")
    return [f"get_pip_{version.replace('.', '_')}.py" for version in versions]


def pip_configuration() -> str:
    """Return pip's settings in effect here as a pip.conf.

    ansible-test drops pip's environment variables, and with another HOME the user's file is not read.
    """
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    settings: dict[str, str] = {}
    # pip has merged its files already; what it lists as ":env:" overrides them.
    for section in ("global", "install", ":env:"):
        for match in re.finditer(rf"^{section}\.(?P<name>[^=]+)=(?P<value>.*)$", listing, re.MULTILINE):
            settings[match["name"]] = str(ast.literal_eval(match["value"]))
    settings.pop("config-file", None)
    settings["quiet"] = "2"  # errors only: ansible-test's own findings would drown
    return "[global]\n" + "".join(f"{name} = {' '.join(value.split())}\n" for name, value in settings.items())


def prepare_home() -> None:
    """Fill HOME with pip's configuration (which may hold a password) and the bootstrap scripts."""
    configuration = HOME / ".config" / "pip" / "pip.conf"
    configuration.parent.mkdir(parents=True, exist_ok=True)
    configuration.touch(mode=0o600)
    configuration.write_text(pip_configuration(), encoding="utf-8")
    bootstrap = HOME / ".ansible" / "test" / "cache"
    bootstrap.mkdir(parents=True, exist_ok=True)
    for name in pip_bootstrap_names():
        (bootstrap / name).write_text(GET_PIP, encoding="utf-8")


def main(command: list[str]) -> int:
    """Run the command in a copy; return its exit status."""
    if not command:
        sys.exit("usage: in_copy.py COMMAND...")
    prepare_home()
    environment = {**os.environ, "HOME": str(HOME)}
    # .venv first, and no pyenv shims: ansible-test would take their interpreters for the system's.
    environment["PATH"] = f"{ROOT / '.venv/bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    with collection_copy() as root:
        return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
