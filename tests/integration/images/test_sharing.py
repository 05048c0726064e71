# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sharing: through a real OCI registry with a password and TLS, and in a directory by ACLs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from ansible_collections.vmkeeper.libvirt.tests.lab import evidence
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import Guest

from . import tasks
from .registries import Registry

JOURNAL = Path("/var/lib/vmkeeper.libvirt/journal")
SECRETS = Path("/run/vmkeeper.libvirt/secrets")
NOBODY = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
DAEMON = ["setpriv", "--reuid=daemon", "--regid=daemon", "--clear-groups"]


def content(bundle: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}


def hidden(library: Path) -> list[str]:
    return [path.name for path in library.iterdir() if path.name.startswith(".")]


def test_an_image_goes_through_the_registry_byte_by_byte(
    still: Guest, library: Path, registry: Registry, launched: list[str]
) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="sent", compression="zstd")
    reference = f"{registry.address}/images/still:v1"
    push = {"src": str(library / "sent"), "reference": reference}
    pull = {"dest": str(library), "name": "came", "reference": reference}
    wrong = {**registry.access, "password": "wrong"}
    untrusted = {key: value for key, value in registry.access.items() if key != "ca_cert"}
    tasks.refused("push_image", "username and password", **push, **wrong)
    tasks.refused("push_image", "certificate", "ca_cert", **push, **untrusted)
    tasks.refused("pull_image", "has no image", **pull, **registry.access)
    tasks.refused("push_image", "not understood", **{**push, "reference": "busybox"}, **registry.access)
    assert tasks.ok("push_image", check=True, **push, **registry.access).changed
    pushed = tasks.ok("push_image", **push, **registry.access)
    assert pushed.changed
    assert not tasks.ok("push_image", **push, **registry.access).changed
    tasks.refused("pull_image", "username and password", **pull, **wrong)
    assert tasks.ok("pull_image", check=True, **pull, **registry.access).changed
    # By digest: what was pushed, whatever becomes of the tag.
    by_digest = {**pull, "reference": f"{registry.address}/images/still@{pushed['digest']}"}
    assert tasks.ok("pull_image", **by_digest, **registry.access)["digest"] == pushed["digest"]
    assert not tasks.ok("pull_image", **pull, **registry.access).changed
    assert content(library / "came") == content(library / "sent")
    assert hidden(library) == []
    assert not list(SECRETS.iterdir())
    launched.append("lab-came")
    new = tasks.ok("import_image", src=str(library / "came"), domain="lab-came", virt_type="qemu")
    for disk in new["domain"]["disks"]:
        assert evidence.same_content(still.images[disk["target"]], Path(disk["path"]))


def test_a_registry_that_sends_more_than_it_says_does_not_fill_the_disk(
    still: Guest, library: Path, registry: Registry
) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="sent")
    reference = f"{registry.address}/rogue/still:v1"
    tasks.ok("push_image", src=str(library / "sent"), reference=reference, **registry.access)
    largest = max(
        (path for path in registry.storage.rglob("data") if path.is_file()), key=lambda path: path.stat().st_size
    )
    size = largest.stat().st_size
    os.truncate(largest, 8 << 30)
    try:
        tasks.refused(
            "pull_image", "do not trust it", reference=reference, dest=str(library), name="came", **registry.access
        )
    finally:
        os.truncate(largest, size)
    assert sum(path.stat().st_size for path in library.rglob("*") if path.is_file()) < 1 << 30
    pull = {"reference": reference, "dest": str(library), "name": "came", **registry.access}
    assert tasks.ok("pull_image", **pull).changed, "it behaves again"
    assert content(library / "came") == content(library / "sent")
    assert hidden(library) == []


def test_an_encrypted_image_goes_through_the_registry_and_stays_closed(
    still: Guest, library: Path, registry: Registry, launched: list[str]
) -> None:
    key = {"passphrase": "correct-Horse-battery-51"}
    tasks.ok("export_image", domain=still.name, dest=str(library), name="sent", disks=["vdb"], encryption=key)
    reference = f"{registry.address}/images/closed:v1"
    tasks.ok("push_image", src=str(library / "sent"), reference=reference, **registry.access)
    tasks.ok("pull_image", dest=str(library), name="came", reference=reference, **registry.access)
    assert content(library / "came") == content(library / "sent")
    launched.append("lab-came")
    launch = {"src": str(library / "came"), "domain": "lab-came", "virt_type": "qemu"}
    tasks.refused("import_image", "is encrypted", **launch)
    new = tasks.ok("import_image", **launch, **key)["domain"]
    assert evidence.same_content(still.images["vdb"], Path(new["disks"][0]["path"]))


def test_the_same_reference_is_a_container_disk(
    still: Guest, library: Path, registry: Registry, tmp_path: Path
) -> None:
    """Read as any container engine would: its layers hold the disk where KubeVirt looks for it, owned by its user."""
    tasks.ok("export_image", domain=still.name, dest=str(library), name="sent", disks=["vda"])
    reference = f"{registry.address}/images/container:v1"
    tasks.ok("push_image", src=str(library / "sent"), reference=reference, **registry.access)
    layout = tmp_path / "layout"
    subprocess.run(
        ["skopeo", "copy", "--src-creds", "pusher:right", "--src-tls-verify=false", f"docker://{reference}", f"dir:{layout}"],
        check=True, capture_output=True,
    )  # fmt: skip
    manifest = json.loads((layout / "manifest.json").read_text())
    layers = [layout / layer["digest"].partition(":")[2] for layer in manifest["layers"]]
    listing = "".join(
        subprocess.run(["tar", "-tvf", layer], check=True, capture_output=True, text=True).stdout for layer in layers
    )
    assert "-r--r----- 107/107" in listing
    assert " disk/vda.qcow2\n" in listing
    disk = subprocess.run(["tar", "-xOf", layers[0], "disk/vda.qcow2"], check=True, capture_output=True).stdout
    assert disk == (library / "sent" / "vda.qcow2").read_bytes()


def test_a_push_or_pull_that_is_killed_at_any_step_is_finished_by_the_same_task(
    still: Guest, library: Path, registry: Registry, tmp_path: Path
) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="sent")
    push = {"src": str(library / "sent"), **registry.access}
    steps = tasks.steps_of("push_image", tmp_path / "log", reference=f"{registry.address}/kills/list:v1", **push)
    assert {"begin", "layout", "push", "pushed"} <= set(steps)
    for step in steps:
        reference = f"{registry.address}/kills/{step}:v1"
        tasks.kill_at(step, "push_image", tmp_path / "log", reference=reference, **push)
        tasks.ok("push_image", reference=reference, **push)
        assert not list(JOURNAL.iterdir()), step
        assert hidden(library) == [], step
        assert not tasks.ok("push_image", reference=reference, **push).changed, step
    pull = {"dest": str(library), "name": "came", "reference": reference, **registry.access}
    steps = tasks.steps_of("pull_image", tmp_path / "log", **pull)
    assert {"begin", "fetch", "unpack", "publish", "published"} <= set(steps)
    for step in steps:
        shutil.rmtree(library / "came")
        tasks.kill_at(step, "pull_image", tmp_path / "log", **pull)
        tasks.ok("pull_image", **pull)
        assert content(library / "came") == content(library / "sent"), step
        assert not list(JOURNAL.iterdir()), step
        assert hidden(library) == [], step


def test_who_is_not_in_the_list_cannot_read(still: Guest, library: Path) -> None:
    tasks.ok("export_image", domain=still.name, dest=str(library), name="one")
    bundle = library / "one"
    share = {"src": str(bundle)}

    def reads(who: list[str], path: Path) -> bool:
        return subprocess.run([*who, "cat", path], capture_output=True, check=False).returncode == 0

    Path("/var/lib/libvirt/images").chmod(0o711)
    files = list(bundle.iterdir())
    assert not any(reads(NOBODY, path) for path in files)
    tasks.refused("share_image", "not understood", **share, share_with=["nobody"])
    tasks.refused("share_image", "there is no user", **share, share_with=["user:no-such-user"])
    assert tasks.ok("share_image", check=True, **share, share_with=["user:nobody"]).changed
    assert not any(reads(NOBODY, path) for path in files)
    assert tasks.ok("share_image", **share, share_with=["user:nobody"]).changed
    assert all(reads(NOBODY, path) for path in files)
    assert not any(reads(DAEMON, path) for path in files)
    assert not tasks.ok("share_image", **share, share_with=["user:nobody"]).changed
    catalogue = subprocess.run(
        [*NOBODY, "cat", library / "CATALOGUE.md"], check=True, capture_output=True, text=True
    ).stdout
    assert "## one" in catalogue
    assert "user:nobody" in catalogue
    assert not reads(DAEMON, library / "CATALOGUE.md")
    # Whoever is left out has no access any more.
    assert tasks.ok("share_image", **share, share_with=["group:daemon"]).changed
    assert not any(reads(NOBODY, path) for path in files)
    assert all(reads(DAEMON, path) for path in files)
    assert tasks.ok("share_image", **share, share_with=[]).changed
    assert not any(reads(DAEMON, path) for path in [*files, library / "CATALOGUE.md"])
    assert not tasks.ok("share_image", **share, share_with=[]).changed
