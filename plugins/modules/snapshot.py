#!/usr/bin/python
# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible module: consistent snapshots of one or several domains."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot
short_description: Take, go back to and remove consistent snapshots of domains
version_added: 0.1.0
description:
  - Takes a snapshot of a running or stopped domain, or of several domains at one instant.
  - A running guest is frozen through its guest agent, the snapshot is cut, and the guest is thawed, all in one call. Overlays
    are made before, so that the guest stands still for a fraction of a second only. A guard on the hypervisor thaws the guest
    by O(deadline) even if the module is killed.
  - The result tells how consistent the snapshot really is, how long the guest was frozen, and what the snapshot does not hold.
options:
  name:
    description: Name of the snapshot. Letters, digits and C(. _ + @ = -).
    type: str
    required: true
  state:
    description:
      - V(present) sees that every domain has the snapshot. If all have it already nothing is done, except that O(tags) and
        O(description) are brought up to date. If it exists with other content, or only on some of the domains, the task fails.
      - V(absent) removes it. The layer that it kept apart is merged with what came after, live or offline, and every other snapshot
        and the guest keep their content. Where several branches stand on that layer it stays, and
        RV(snapshot.layer_kept_for) says for whom.
      - V(reverted) goes back to it, always, also when it is the current one. Each disk gets a fresh overlay above the snapshot, so
        that one can go back to it again. What was since is thrown away and named in RV(snapshot.discarded), unless
        O(keep_present_as) keeps it.
    type: str
    choices: [present, absent, reverted]
    default: present
  keep_present_as:
    description:
      - With O(state=reverted), first take a snapshot of this name, so that the present is a branch that one can go back to.
      - The guest is frozen for it if its agent answers. The name must not exist yet.
    type: str
  allow_restart:
    description:
      - With O(state=reverted), a running guest is stopped at once and booted on a snapshot that holds no memory. V(false) forbids
        that, and the task refuses instead. The default is V(true).
      - A guest that is shut off stays so, and one whose snapshot holds memory is resumed, so these need no permission.
      - With O(state=absent), V(true) shuts a running guest down cleanly, merges its layers and starts it again where AppArmor denies every
        way to merge them live; see M(vmkeeper.libvirt.blockcommit). The default is V(false), and the task refuses instead.
    type: bool
  protected:
    description:
      - Protect the snapshot from being removed, by O(state=absent) or by M(vmkeeper.libvirt.blockcommit).
      - A new snapshot is not protected by default, and an existing one stays as it is.
    type: bool
  mode:
    description:
      - V(external) puts an overlay on each disk, and what was written before stays untouched below it.
      - V(internal) stores the snapshot inside the qcow2 images. It pauses the guest while its memory is written, and is refused
        where it hurts (raw disks, raw UEFI variables, checkpoints, left-out disks).
      - V(auto) chooses and says why in RV(snapshot.mode_reason).
    type: str
    choices: [auto, external, internal]
    default: auto
  memory:
    description:
      - Keep the memory of a running guest too, so that a revert resumes it where it was.
      - Not for several domains at once.
    type: bool
    default: false
  quiesce:
    description:
      - V(auto) freezes the guest if its agent answers, else takes a crash-consistent snapshot with a warning.
      - V(required) fails, before anything is changed, if the guest cannot be frozen.
      - V(never) does not freeze.
      - V(shutdown) shuts the guest down cleanly, takes the snapshot and starts it again.
      - With O(memory) nothing is frozen, since the frozen state would be part of the memory.
    type: str
    choices: [auto, required, never, shutdown]
    default: auto
  disks:
    description:
      - Targets of the only disks to hold, such as V(vda). One that the definition leaves out with C(snapshot='no') is then held.
    type: list
    elements: str
  exclude_disks:
    description: Targets of disks to leave out.
    type: list
    elements: str
  directory:
    description:
      - An existing directory of the hypervisor for overlays and memory. QEMU's user must be able to reach it.
      - By default an overlay lies beside its disk's image, or in C(/var/lib/libvirt/images) if the disk is a block device.
    type: path
  description:
    description: Text to keep with the snapshot.
    type: str
  tags:
    description: Dictionary of texts to keep with the snapshot. A JSON object in a string is accepted.
    type: raw
  deadline:
    description:
      - By when the guest is thawed at the latest, counted from just before the freeze.
      - A duration such as V(90s) or V(2m), or seconds.
    type: str
    default: 60s
  bandwidth:
    description: With O(state=absent), limit of the merge in bytes per second, such as V(100M). No limit when left out.
    type: str
  wait:
    description:
      - With O(state=absent), V(false) has the task checked and answered at once with RV(job), while a worker on the hypervisor does the
        work. M(vmkeeper.libvirt.domain_job) shows it, waits for it, limits or cancels it.
      - Where nothing is to be done there is no worker, and the task answers as one that waits. The same task again, while its worker is
        at work, answers with that worker.
    type: bool
    default: true
  wait_timeout:
    description:
      - With O(state=absent), how long to wait for each running job, such as V(2h). No limit when left out.
      - When it passes the task fails with the job's state. The job goes on, and the same task takes it up.
    type: str
extends_documentation_fragment:
  - vmkeeper.libvirt.hypervisor
  - vmkeeper.libvirt.hypervisor.changing
  - vmkeeper.libvirt.hypervisor.domains
  - vmkeeper.libvirt.attributes
attributes:
  idempotent:
    support: partial
    details:
      - O(state=present) and O(state=absent) are. O(state=reverted) is an action and always goes back.
notes:
  - A revert moves the disks that the snapshot holds, its UEFI variables, the current snapshot, and the definition of the next start. The
    rest of that definition stays today's, and so do disks that the snapshot does not hold. When memory is resumed the running guest
    has the hardware of that moment until it is shut off.
  - The UEFI variables of a domain are copied beside the overlays of an external snapshot, where they lie in a raw file. RV(snapshot.nvram)
    is the copy. Snapshots without one say so in RV(snapshot.not_captured), and going back to them leaves the variables as they are.
  - A revert ends the checkpoints that were made after the snapshot, so the next incremental backup is a full one.
  - V(absent) refuses, before anything is changed, a protected snapshot, a layer that another domain, an unknown image or a
    foreign process uses together with this domain, a managed-save image, a broken chain, a layer smaller than the one below it,
    internal snapshots in a layer that would go or below external ones, an encrypted disk of a stopped domain, another job
    on the domain or the disk, and a restart (O(allow_restart)) at which a disk would be another one.
  - V(reverted) refuses, before anything is changed, a running guest with O(allow_restart=false) and without memory, a snapshot that is
    being removed, missing images, a disk that the domain no longer has, a managed-save image, a transient domain, a running
    job, an internal snapshot under external layers that stand on it, and an internal one under dirty bitmaps, which would kill
    QEMU.
  - Several domains are frozen, then all paused for some milliseconds, then cut, so that their snapshots are of one instant. If
    one fails, none has the snapshot.
  - A domain with a managed-save image is refused, since its saved memory would resume on disks that have moved on.
seealso:
  - module: vmkeeper.libvirt.snapshot_info
  - module: vmkeeper.libvirt.blockcommit
  - module: vmkeeper.libvirt.recover_domain
  - module: vmkeeper.libvirt.fsfreeze
  - module: vmkeeper.libvirt.domain_info
author:
  - vmkeeper.libvirt contributors (@vmkeeper)
"""

EXAMPLES = r"""
- name: Take a consistent snapshot before an upgrade
  vmkeeper.libvirt.snapshot:
    domain: web01
    name: before-upgrade
    quiesce: required
    tags:
      change: CHG-1234

- name: Take a snapshot of an application's two machines at one instant
  vmkeeper.libvirt.snapshot:
    domains: [app01, db01]
    name: before-migration

- name: Take a snapshot with memory, leaving out the scratch disk
  vmkeeper.libvirt.snapshot:
    domain: db01
    name: with-memory
    memory: true
    exclude_disks: [vdc]

- name: Go back, and keep what is there now as a branch
  vmkeeper.libvirt.snapshot:
    domain: web01
    name: before-upgrade
    state: reverted
    keep_present_as: failed-upgrade

- name: Remove a snapshot and merge its layer
  vmkeeper.libvirt.snapshot:
    domain: web01
    name: before-upgrade
    state: absent
"""

RETURN = r"""
snapshots:
  description: One snapshot for each domain, in the order asked.
  returned: success
  type: list
  elements: dict
snapshot:
  description: The snapshot, when exactly one domain was asked for.
  returned: one domain
  type: dict
  contains:
    name:
      description: Name.
      type: str
    domain:
      description: Name of the domain.
      type: str
    mode:
      description: V(external) or V(internal).
      type: str
    mode_reason:
      description: Why that mode was chosen.
      type: str
    consistency:
      description:
        - V(application) when it was frozen and the guest's freeze hook proved that the applications went along.
        - V(filesystem) when the agent held the filesystems frozen over the whole cut.
        - V(memory) when it holds the memory.
        - V(offline) when the guest had shut down cleanly.
        - V(crash) for everything else.
      type: str
    frozen_ms:
      description: Milliseconds from before the freeze call until after the thaw call. None when nothing was frozen.
      type: int
    paused_ms:
      description: Milliseconds that the guest was paused by a group or an internal memory snapshot. None when it was not.
      type: int
    created:
      description: When it was taken, in ISO 8601. None in check mode.
      type: str
    description:
      description: Its description.
      type: str
    tags:
      description: Its tags.
      type: dict
    protected:
      description: Whether it is protected from removal.
      type: bool
    disks:
      description: The disks that it holds, each with C(target), C(mode), C(base) (its content) and C(overlay) (what came after).
      type: list
      elements: dict
    memory:
      description: Path of the memory image, V(true) for memory inside an image, or None.
      type: raw
    nvram:
      description: Path of the copy of the UEFI variables, or None.
      type: str
    not_captured:
      description: What it does not hold, each with C(kind), C(name), C(reason) and C(why).
      type: list
      elements: dict
    parent:
      description: Name of the snapshot before it.
      type: str
    current:
      description: Whether the domain's present state descends from it.
      type: bool
    layer_kept_for:
      description: The layers that stay, each with C(disk), C(path) and C(for), a list of who reads it.
      returned: O(state=absent)
      type: list
      elements: dict
    merged:
      description:
        - The disks whose layers were merged, each with C(disk), C(method) and C(why), as M(vmkeeper.libvirt.blockcommit) returns them.
      returned: O(state=absent)
      type: list
      elements: dict
    removed:
      description: Files that were deleted.
      returned: O(state=absent) or O(state=reverted)
      type: list
      elements: str
    discarded:
      description: What was thrown away, each with C(disk), C(path) of its layer and C(since), the snapshot that it came after.
      returned: O(state=reverted)
      type: list
      elements: dict
    kept_present_as:
      description: Name of the snapshot that keeps what was there before.
      returned: O(state=reverted)
      type: str
    nvram_restored:
      description: Whether the UEFI variables are the snapshot's now.
      returned: O(state=reverted)
      type: bool
    checkpoints_ended:
      description: Names of the checkpoints that ended with it.
      returned: O(state=reverted)
      type: list
      elements: str
    guest:
      description: V(resumed), V(paused), V(booted) or V(shut off), what the guest is after the revert.
      returned: O(state=reverted)
      type: str
job:
  description: The worker, with its C(id), C(operation), C(domains), C(state) (V(pending)) and C(started).
  returned: O(wait=false), where there is something to do
  type: dict
"""

from typing import Any

from ansible_collections.vmkeeper.libvirt.plugins.module_utils import _module
from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.connection import find_domains
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import names
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots import removing, revert_plan
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.plan import Request
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.reverting import revert
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.snapshots.taking import take

SHORTEST_DEADLINE = 2.0

#: Options that mean something only for some states.
ONLY_PRESENT = ("disks", "exclude_disks", "directory", "description", "tags", "protected")
ONLY_REVERTED = ("keep_present_as",)
ONLY_ABSENT = ("bandwidth", "wait_timeout")
NOT_PRESENT = ("allow_restart",)


def check_options(call: _module.Call) -> None:
    """An option that the state would ignore is refused: whoever gave it expects something of it."""
    state = call.params["state"]
    idle = [name for name in ONLY_PRESENT if state != "present" and call.params[name] is not None]
    idle += [name for name in ONLY_REVERTED if state != "reverted" and call.params[name] is not None]
    idle += [name for name in ONLY_ABSENT if state != "absent" and call.params[name] is not None]
    idle += ["wait"] if state != "absent" and not call.params["wait"] else []
    idle += [name for name in NOT_PRESENT if state == "present" and call.params[name] is not None]
    if idle:
        raise InvalidInput(f"{', '.join(idle)} means nothing with state: {state}", advice="Leave it out")


def request_of(call: _module.Call) -> Request:
    """The checked options of ``state: present``."""
    params = call.params
    deadline = names.parse_duration(params["deadline"], "deadline")
    if deadline < SHORTEST_DEADLINE:
        raise InvalidInput(
            f"deadline {params['deadline']} is too short", advice=f"Give at least {SHORTEST_DEADLINE:.0f} s"
        )
    description = params["description"]
    return Request(
        name=names.check_name(params["name"]),
        mode=params["mode"],
        memory=params["memory"],
        quiesce=params["quiesce"],
        disks=tuple(params["disks"]) if params["disks"] is not None else None,
        exclude=tuple(params["exclude_disks"]) if params["exclude_disks"] is not None else None,
        directory=names.check_directory(params["directory"]) if params["directory"] else None,
        description=names.check_text(description, "description") if description is not None else None,
        tags=names.check_tags(params["tags"]),
        deadline=deadline,
        protected=params["protected"],
    )


def present(call: _module.Call) -> _module.Answer:
    """See that the snapshot exists."""
    request = request_of(call)
    handles = find_domains(call.connection, call.params["domains"])
    taken = take(call.connection, call.uri, handles, request, check=call.check)
    return _module.Answer(
        changed=any(one.changed for one in taken),
        result=_module.one_or_all("snapshots", "snapshot", [one.snapshot for one in taken], len(handles)),
        warnings=[warning for one in taken for warning in one.warnings],
        diff=(
            {one.domain: {request.name: one.before} if one.before else {} for one in taken},
            {one.domain: {request.name: one.snapshot} for one in taken},
        ),
    )


def absent(call: _module.Call) -> _module.Answer:
    """See that the snapshot does not exist."""
    params = call.params
    name = names.check_name(params["name"])
    request = removing.Request(
        name=name,
        allow_restart=bool(params["allow_restart"]),
        bandwidth=names.parse_size(params["bandwidth"], "bandwidth") if params["bandwidth"] else 0,
    )
    seconds = names.parse_duration(params["wait_timeout"], "wait_timeout") if params["wait_timeout"] else None
    handles = find_domains(call.connection, params["domains"])
    if not params["wait"] and not call.check:
        answer = removing.start(call.uri, handles, request)
        if "job" in answer:
            return _module.Answer(changed=True, result={"job": answer["job"]})
    else:
        answer = removing.as_result(removing.remove(call.uri, handles, request, check=call.check, seconds=seconds))
    nowhere: dict[str, Any] = {handle.name(): {} for handle in handles}
    return _module.Answer(
        changed=answer["changed"],
        result=_module.one_or_all("snapshots", "snapshot", answer["snapshots"], len(handles)),
        warnings=answer["warnings"],
        diff=({**nowhere, **{one["domain"]: {name: one} for one in answer["snapshots"]}}, nowhere),
    )


def reverted(call: _module.Call) -> _module.Answer:
    """Go back to the snapshot."""
    keep = call.params["keep_present_as"]
    request = revert_plan.Request(
        name=names.check_name(call.params["name"]),
        keep_present_as=names.check_name(keep, "keep_present_as") if keep is not None else None,
        allow_restart=call.params["allow_restart"] is not False,
    )
    handles = find_domains(call.connection, call.params["domains"])
    done = revert(call.connection, call.uri, handles, request, check=call.check)
    return _module.Answer(
        changed=True,
        result=_module.one_or_all("snapshots", "snapshot", [one.snapshot for one in done], len(handles)),
        warnings=[warning for one in done for warning in one.warnings],
        diff=(
            {one.domain: {"current": one.before} for one in done},
            {one.domain: {"current": request.name} for one in done},
        ),
    )


def handle(call: _module.Call) -> _module.Answer:
    """Do what the state asks for."""
    check_options(call)
    return {"present": present, "absent": absent, "reverted": reverted}[call.params["state"]](call)


def main() -> None:
    """Entry point."""
    _module.run(
        {
            "domains": {**_module.DOMAINS_OPTION, "required": True},
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent", "reverted"], "default": "present"},
            "mode": {"type": "str", "choices": ["auto", "external", "internal"], "default": "auto"},
            "memory": {"type": "bool", "default": False},
            "quiesce": {
                "type": "str",
                "choices": ["auto", "required", "never", "shutdown"],
                "default": "auto",
            },
            "disks": {"type": "list", "elements": "str"},
            "exclude_disks": {"type": "list", "elements": "str"},
            "directory": {"type": "path"},
            "description": {"type": "str"},
            "tags": {"type": "raw"},
            "deadline": {"type": "str", "default": "60s"},
            "keep_present_as": {"type": "str"},
            "allow_restart": {"type": "bool"},
            "protected": {"type": "bool"},
            "bandwidth": {"type": "str"},
            "wait": {"type": "bool", "default": True},
            "wait_timeout": {"type": "str"},
        },
        handle,
    )


if __name__ == "__main__":
    main()
