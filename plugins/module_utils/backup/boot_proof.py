# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prove that a point boots: a guest of its own stands on it, is asked whether it is well, and is thrown away.

It has a fresh identity, no network and no device of the host (:mod:`.throwaway`), writes into overlays in a private
directory, and reads the repository through a view that nobody can write to.  libvirt destroys it as soon as this process's
connection ends, and the journal, under a UUID of its own, names what else has to go.

What is encrypted is opened by libvirt secrets that are in libvirtd's memory only and that nobody reads back; the guest's own
writes over it are encrypted with a key that ends with the proof.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid as uuids
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree import ElementTree

from .._errors import LibvirtFailed, Refused, Unsupported, VmkeeperError
from ..hypervisor import apparmor, definition, health, image_node, libvirt_secret, qemu_img, screenshot
from ..hypervisor.binding import libvirt
from ..hypervisor.connection import code_of, constant, explaining, find_by_uuid, open_connection
from ..hypervisor.domain_model import Domain, DomainState, Layer, parse_domain, qemu_owner
from ..hypervisor.image_node import Image, Passphrase
from ..safety import journal as journals
from ..safety import locks, places, space, views
from ..safety.journal import Journal
from . import digests, stored
from .host import read_host, stored_definition
from .lending import Loan, lend, let_open, plan_loan
from .listing import Found
from .mapping import Target, fit
from .repository import Repository
from .throwaway import throw_away
from .verifying import BootOutcome

KIND = "boot-proof"

#: What a guest writes while it boots; asked of the filesystem of its overlays (bytes).
_WRITTEN = 1 << 30
_GONE_SECONDS = 60.0


@dataclass(frozen=True)
class Request:
    """``command`` is run in the guest until it ends with status 0; None: the agent has to answer. ``seconds`` is for both."""

    command: tuple[str, ...] | None = None
    seconds: float = 300.0


@dataclass(frozen=True)
class _Plan:
    uuid: str
    name: str
    xml: str
    loan: Loan
    nvram: str | None
    overlay_secret: str | None

    @property
    def secrets(self) -> list[str]:
        """The UUIDs of the libvirt secrets that it needs."""
        return [secret for secret in (self.loan.secret, self.overlay_secret) if secret is not None]


def boot(
    connection: Any,
    uri: str,
    repository: Repository,
    found: Found,
    request: Request,
    passphrase: Passphrase | None = None,
    *,
    check: bool = False,
) -> BootOutcome | None:
    """Boot a point and throw the guest away. Call it with the points' lock shared. With ``check`` it is only planned: None.

    Raises :class:`InvalidInput` where an encrypted point is not opened by the ``passphrase``.
    """
    point = found.point
    # One at a time for each domain: the name is the same each time, and so is libvirt's log of it.
    uuid = str(uuids.uuid5(uuids.UUID(repository.uuid), f"boot-proof/{point.domain_uuid}"))
    with locks.hold([(uuid, f"boot proof of {point.domain}")], f"booting {point.id}"):
        left = journals.unfinished(uuid)
        if left is not None and not check:
            settle_proof(uri, left)
        plan = _plan(connection, repository, found, uuid, passphrase)
        if check:
            return None
        journal = Journal.begin(
            KIND,
            [(uuid, plan.name)],
            {"uuid": uuid, "point": point.id, "loan": asdict(plan.loan), "secrets": plan.secrets},
        )
        try:
            return _carry_out(connection, repository, found, plan, request, journal, passphrase)
        finally:
            clear(uri, journal)


def _plan(connection: Any, repository: Repository, found: Found, uuid: str, passphrase: Passphrase | None) -> _Plan:
    point = found.point
    definition_then = stored_definition(repository, point)
    domain = parse_domain(definition_then, DomainState("shutoff"))
    _require_bootable(definition_then, domain, point.id)
    loan = plan_loan(repository, found, [disk.target for disk in point.disks], uuid)
    stored.require_opening(
        repository, point, loan.chains, passphrase, advice="Give the passphrase that it was backed up with"
    )
    views.require_support(loan.source, qemu_owner(connection.getCapabilities()))
    places.passable_directory(places.PROOFS)
    space.require_memory(domain.memory_max, f"Booting point {point.id}")
    space.require([(places.PROOFS, min(_WRITTEN, sum(loan.sizes.values())))], f"Booting point {point.id}")
    name = f"vmk-proof-{uuid[:8]}"
    scratch = os.path.join(places.PROOFS, uuid)
    nvram = os.path.join(scratch, "nvram.fd") if point.nvram is not None else None
    overlay_secret = str(uuids.uuid4()) if loan.encrypted else None
    mapped = fit(
        definition_then,
        Target(
            name=name,
            uuid=uuid,
            fresh=True,
            disks={target: Layer(_overlay(uuid, target), "qcow2") for target in loan.chains},
            nvram=nvram,
            network="disconnected",
            secrets=dict.fromkeys(loan.chains, overlay_secret) if overlay_secret else {},
        ),
        read_host(connection, definition_then),
    )
    xml = throw_away(mapped.xml, f"Boot proof of {point.domain} {point.id}", loan.chains)
    models = definition.security_models(connection.getCapabilities())
    xml = definition.with_backing(xml, loan.layers(), models, loan.secrets())
    return _Plan(uuid, name, xml, loan, nvram, overlay_secret)


def _require_bootable(xml: str, domain: Domain, identifier: str) -> None:
    if not domain.agent_configured:
        raise Unsupported(
            f"The domain of point {identifier} has no guest agent channel, so that nothing in it can say that it has booted",
            advice="Give the domain a guest agent, or prove the point with level: structure",
        )
    for tag in ("kernel", "initrd", "dtb"):
        path = ElementTree.fromstring(xml).findtext(f"os/{tag}")
        if path and not os.path.exists(path):
            raise Unsupported(
                f"The domain of point {identifier} boots from the {tag} {path} of its host, which is not here",
                advice="Put it there, or prove the point on the host that has it",
            )


def _overlay(uuid: str, target: str) -> str:
    return os.path.join(places.PROOFS, uuid, f"{target}.qcow2")


def _carry_out(
    connection: Any,
    repository: Repository,
    found: Found,
    plan: _Plan,
    request: Request,
    journal: Journal,
    passphrase: Passphrase | None,
) -> BootOutcome:
    owner = qemu_owner(connection.getCapabilities())
    journal.step("scratch")
    places.passable_directory(os.path.join(places.PROOFS, plan.uuid))
    journal.step("lend")
    lend(plan.loan, owner)
    journal.step("overlay")
    key = _define_secrets(connection, plan, passphrase)
    for target, layers in plan.loan.layers().items():
        overlay = Image(_overlay(plan.uuid, target), "qcow2", key)
        size, milliseconds = plan.loan.sizes[target], qemu_img.KEY_MILLISECONDS
        qemu_img.create_layer(overlay, size, backing=layers[0].path, milliseconds=milliseconds, owner=owner)
    if plan.nvram is not None:
        _copy_nvram(repository, found, plan.nvram)
    journal.step("boot")
    with explaining(
        f"Starting a guest on point {found.point.id}", state="Nothing is left of it.", advice="See libvirt's log"
    ):
        handle = connection.createXML(plan.xml, constant("VIR_DOMAIN_START_AUTODESTROY") or 0)
    began = time.monotonic()
    journal.step("wait")
    problem = _wait(handle, request.command, request.seconds)
    seconds = round(time.monotonic() - began, 1)
    journal.step("look")
    return BootOutcome(
        None if problem is None else f"booted, {problem}", None if problem else seconds, _screenshot(handle)
    )


def _define_secrets(connection: Any, plan: _Plan, passphrase: Passphrase | None) -> Passphrase | None:
    """Let libvirt open what is encrypted; the key of the overlays, None where nothing is."""
    if plan.loan.secret is None or plan.overlay_secret is None or passphrase is None:
        return None
    key = image_node.random_key()
    let_open(connection, plan.loan, passphrase, "a boot proof")
    libvirt_secret.define(connection, plan.overlay_secret, key, "vmkeeper.libvirt: a boot proof", ephemeral=True)
    return key


def _wait(handle: Any, command: Sequence[str] | None, seconds: float) -> str | None:
    try:
        return health.wait_until_well(handle, command, seconds, option="boot_check")
    except LibvirtFailed as error:
        if error.facts.get("code") == constant("VIR_ERR_NO_DOMAIN"):
            return "it stopped by itself"  # a guest that was never defined is gone when it stops
        raise


def _screenshot(handle: Any) -> bytes | None:
    try:
        return screenshot.take(handle)
    except VmkeeperError:
        return None


def _copy_nvram(repository: Repository, found: Found, path: str) -> None:
    source = os.path.join(repository.point_directory(found.point.domain_uuid, found.point.id), "nvram.fd")
    if digests.file_digest(source) != found.point.files.get("nvram.fd"):
        raise Refused(f"{source} is not what was written", advice="Restore another point")
    shutil.copyfile(source, path)
    os.chmod(path, 0o600)


def clear(uri: str, journal: Journal) -> None:
    """Destroy the guest and remove what it stood on, down to the journal. Every step looks first at what is there."""
    uuid = journal.operation.plan["uuid"]
    journal.step("clear")
    _destroy(uri, uuid)
    apparmor.forget(uuid)
    _forget_secrets(uri, journal.operation.plan.get("secrets", ()))
    shutil.rmtree(os.path.join(places.PROOFS, uuid), ignore_errors=True)
    views.close_view(Loan.from_json(journal.operation.plan["loan"]).name)
    journal.finish()


def _destroy(uri: str, uuid: str) -> None:
    handle = find_by_uuid(open_connection(uri), uuid)
    if handle is None:
        return
    try:
        handle.destroy()
    except libvirt.libvirtError as error:
        if code_of(error) not in (constant("VIR_ERR_NO_DOMAIN"), constant("VIR_ERR_OPERATION_INVALID")):
            raise LibvirtFailed(
                f"Destroying the guest {handle.name()!r} of a boot proof: {error}",
                state="It may still run; it has no network and none of the original's disks.",
                advice="Run recover_domain",
            ) from error


def _forget_secrets(uri: str, secrets: Sequence[str]) -> None:
    if not secrets:
        return
    connection = open_connection(uri)
    with explaining("Removing the key of a boot proof", state="No guest uses it.", advice="Run recover_domain"):
        for uuid in secrets:
            libvirt_secret.forget(connection, uuid)


def settle_proof(uri: str, pending: Journal) -> dict[str, str]:
    """Remove what an interrupted proof left; returns ``{what, action}``."""
    clear(uri, pending)
    return {"what": f"an interrupted boot proof of {pending.operation.plan['point']}", "action": "removed"}
