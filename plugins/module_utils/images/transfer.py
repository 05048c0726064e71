# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Share images through an OCI registry: push a bundle, pull one."""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from typing import Any

from .._errors import Conflict, NotFound
from ..safety import locks, places, settlement, space
from ..safety.journal import Journal
from . import bundle, exporting, foreign_header, oci, settle
from .manifest import FILE_NAME, refuse
from .registry import Access, open_registry


@dataclass
class Transferred:
    """The result. ``digest`` names the image in the registry for ever, whatever becomes of its tag."""

    reference: str
    digest: str
    image: dict[str, Any] | None
    changed: bool


def push(uri: str, src: str, reference: oci.Reference, access: Access, *, check: bool = False) -> Transferred:
    """See that the registry has the bundle under that tag. Nothing is changed with ``check``."""
    key = bundle.lock_key(f"{src}.push")
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(locks.hold([(key, src)], f"push of {src}"))
        settlement.settle_named(uri, [(key, src)], settle.SETTLERS, check=check)
        registry = stack.enter_context(open_registry(reference, access))
        opened = stack.enter_context(bundle.Opened(src))
        manifest, digest = opened.read_manifest()
        image = exporting.as_result(src, manifest, digest)
        raw = registry.inspect(reference)
        blob = oci.build(opened, manifest, digest, oci.Layout(None))
        if raw is not None and f"sha256:{bundle.sha256_of_bytes(raw)}" == blob.digest:
            return Transferred(str(reference), blob.digest, image, changed=False)
        if check:
            return Transferred(str(reference), blob.digest, image, changed=True)
        parent, name = os.path.split(os.path.realpath(src))
        staging = os.path.join(parent, f".{name}.push-{secrets.token_hex(6)}")
        space.require([(parent, sum(disk.stored_size for disk in manifest.disks) + (1 << 20))], f"Pushing {src}")
        journal = Journal.begin(settle.PUSH, [(key, src)], {"staging": staging, "reference": str(reference)})
        try:
            journal.step("layout")
            os.mkdir(staging, 0o700)
            oci.build(opened, manifest, digest, oci.Layout(staging))
            journal.step("push")
            registry.push(staging, reference)
            journal.step("pushed")
        finally:
            settle.settle_push(uri, journal)
        return Transferred(str(reference), blob.digest, image, changed=True)


def pull(uri: str, reference: oci.Reference, path: str, access: Access, *, check: bool = False) -> Transferred:
    """See that the bundle ``path`` is what the registry has. Nothing is changed with ``check``."""
    key = bundle.lock_key(path)
    with contextlib.ExitStack() as stack:
        if not check:
            stack.enter_context(locks.hold([(key, path)], f"pull of {reference}"))
        settlement.settle_named(uri, [(key, path)], settle.SETTLERS, check=check)
        registry = stack.enter_context(open_registry(reference, access))
        raw = registry.inspect(reference)
        if raw is None:
            raise NotFound(
                f"The registry has no image {reference}", advice="See that it was pushed, and under which tag"
            )
        remote = oci.parse_remote(raw, str(reference))
        if reference.digest is not None and reference.digest != remote.digest:
            raise refuse(f"the registry sent another manifest than {reference.digest}")
        if os.path.lexists(path):
            return _compare_existing(path, remote, reference)
        parent, name = os.path.split(path)
        space.require([(parent, 2 * remote.size + (1 << 20))], f"Pulling {reference}")
        if check:
            return Transferred(str(reference), remote.digest, None, changed=True)
        # Named after the digest, so that a later run finds the layers that an interrupted one has fetched.
        blobs = os.path.join(parent, f".{name}.blobs-{remote.digest[7:19]}")
        kept = settle.fetched_before(key)
        if kept not in (None, blobs):
            bundle.remove(str(kept))  # the tag names something else now
        staging = bundle.staging_of(path, secrets.token_hex(6))
        journal = Journal.begin(settle.PULL, [(key, path)], {"path": path, "staging": staging, "blobs": blobs})
        try:
            journal.step("fetch")
            pinned = oci.Reference(reference.host, reference.path, None, remote.digest)
            registry.pull(pinned, blobs, largest=max(one.size for one in remote.layers))
            journal.step("unpack")
            os.mkdir(staging, 0o700)
            manifest = oci.unpack(blobs, remote, staging)
            for disk in manifest.disks:
                file = os.path.join(staging, disk.file)
                foreign_header.check(file, disk.format, disk.virtual_size, disk.file, disk.encryption)
            for name in [FILE_NAME, *(file for file, _size, _sha256 in manifest.files())]:
                places.fsync_file(os.path.join(staging, name))
            journal.step("publish")
            bundle.publish(staging, path)
            journal.step("published")
        finally:
            settle.settle_pull(uri, journal)
        image = exporting.as_result(path, manifest, remote.manifest_digest[7:])
        return Transferred(str(reference), remote.digest, image, changed=True)


def _compare_existing(path: str, remote: oci.Remote, reference: oci.Reference) -> Transferred:
    with bundle.Opened(path) as opened:
        manifest, digest = opened.read_manifest()
        damaged = [name for name, size, sha256 in manifest.files() if opened.digest(name, size) != sha256]
    if f"sha256:{digest}" != remote.manifest_digest or damaged:
        what = f"its {', '.join(damaged)} is damaged" if damaged else f"it is not the one of {reference}"
        raise Conflict(
            f"There is an image {path}, and {what}", advice="Choose another name, or remove that directory first"
        )
    return Transferred(str(reference), remote.digest, exporting.as_result(path, manifest, digest), changed=False)
