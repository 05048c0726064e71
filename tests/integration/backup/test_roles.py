# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The playbooks and roles, as ``ansible-playbook vmkeeper.libvirt.backup`` runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.ansible import run_playbook
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.integration.backup import points
from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import ok


def test_backup_then_restore_by_playbook(module_guest_factory, directory: Path) -> None:
    disk = DiskSpec("vda", size=8 * MIB, fs=None, writer=False)
    guest = module_guest_factory(GuestSpec("roles", disks=(disk,)), start=False)
    repository = directory / "repository"
    repository.mkdir()
    variables = {
        "consistent_backup_repository": str(repository),
        "consistent_backup_domains": [guest.name, "lab-nobody"],
        "consistent_backup_verify": "digest",
    }
    run = run_playbook("vmkeeper.libvirt.backup", extra_vars=variables)
    assert run.rc != 0, "one domain does not exist"
    assert "FAILED" in run.stdout + str(run.tasks)
    made = ok("backup_info", repository=str(repository), domain=guest.name)["restore_points"]
    assert len(made) == 1, run.stdout
    assert made[0]["verified"]["verified"]
    variables["consistent_backup_domains"] = [guest.name]
    chosen = {**variables, "consistent_backup_domains": [], "consistent_backup_select": f"[?name=='{guest.name}']"}
    again = run_playbook("vmkeeper.libvirt.backup", extra_vars={**chosen, "consistent_backup_min_age": "1d"})
    assert again.rc == 0, again.stdout
    assert len(ok("backup_info", repository=str(repository))["restore_points"]) == 1
    proved = run_playbook(
        "vmkeeper.libvirt.verify",
        # Where ansible-core looks for the interpreter, it warns in the result of each task.
        extra_vars={
            "target": "localhost",
            "repository": str(repository),
            "level": "digest",
            "ansible_python_interpreter": "auto",
        },
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert proved.rc == 0, proved.stdout + str(proved.tasks)
    assert "discovered Python interpreter" in proved.stdout + proved.stderr + str(proved.tasks)
    none = {"restore_domain_source": guest.name, "restore_domain_select": "[?consistency=='memory']"}
    missing = run_playbook(
        "vmkeeper.libvirt.restore", extra_vars={**none, "restore_domain_repository": str(repository)}
    )
    assert missing.rc != 0
    assert "that restore_domain_select chooses" in missing.stdout + str(missing.tasks)
    assert "proved" in proved.stdout + str(proved.tasks)
    unproved = run_playbook(
        "vmkeeper.libvirt.verify",
        extra_vars={"target": "localhost", "repository": str(repository), "domains": [guest.name, "lab-nobody"]},
    )
    assert unproved.rc != 0
    assert "lab-nobody has no restore point" in unproved.stdout + str(unproved.tasks)
    policy = {**variables, "consistent_backup_keep": {"last": 1}}
    nothing_goes_while_the_newest_point_is_not_proved(guest, repository, policy)
    young = {**policy, "consistent_backup_min_age": "1d"}
    with next(repository.glob(f"*/{made[0]['id']}/vda.qcow2")).open("rb"):
        held = run_playbook("vmkeeper.libvirt.backup", extra_vars=young)
    assert held.rc != 0, "somebody reads what has to go"
    assert "1 of the backups, proofs or removals failed" in held.stdout + str(held.tasks)
    assert "so no point that it is part of can be removed" in held.stdout + str(held.tasks), held.stdout
    pruned = run_playbook("vmkeeper.libvirt.backup", extra_vars=young)
    assert pruned.rc == 0, pruned.stdout
    assert "removed" in str(pruned.tasks), pruned.tasks
    left = ok("backup_info", repository=str(repository))["restore_points"]
    assert len(left) == 1
    assert left[0]["id"] != made[0]["id"]
    restored = run_playbook(
        "vmkeeper.libvirt.restore",
        extra_vars={
            "restore_domain_repository": str(repository),
            "restore_domain_source": guest.name,
            "restore_domain_select": "[?verified.verified]",
            "restore_domain_name": "lab-roles-r",
            "restore_domain_directory": str(directory),
        },
    )
    assert restored.rc == 0, restored.stdout
    image = directory / "lab-roles-r.vda.qcow2"
    assert points.content(image) == points.content(guest.images["vda"])
    points.forget_domain(guest, "lab-roles-r")
    at_once = run_playbook(
        "vmkeeper.libvirt.restore",
        extra_vars={
            "restore_domain_repository": str(repository),
            "restore_domain_source": guest.name,
            "restore_domain_name": "lab-roles-i",
            "restore_domain_directory": str(directory),
            "restore_domain_mode": "instant",
            "restore_domain_network": "disconnected",
        },
    )
    assert at_once.rc == 0, at_once.stdout
    assert guest.connection().lookupByName("lab-roles-i").isActive()
    points.forget_domain(guest, "lab-roles-i")
    assert points.content(directory / "lab-roles-i.vda.qcow2") == points.content(guest.images["vda"])
    made_image = next(repository.glob("*/*/vda.qcow2"))
    points.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", made_image)
    unreadable = made_image.parent.with_name("20200101T000000Z-0000")
    unreadable.mkdir()
    damaged = run_playbook("vmkeeper.libvirt.verify", extra_vars={"target": "localhost", "repository": str(repository)})
    assert damaged.rc != 0
    assert "FAILED" in damaged.stdout + str(damaged.tasks)
    assert "2 of the proofs failed" in damaged.stdout + str(damaged.tasks)
    assert f"{unreadable.name}: {unreadable.parent.name}: " in damaged.stdout + str(damaged.tasks)


def nothing_goes_while_the_newest_point_is_not_proved(guest: Guest, repository: Path, policy: dict[str, Any]) -> None:
    """Neither at once nor when the same play runs again and finds that point young enough, whether it proves it or not."""
    older = {one["id"] for one in ok("backup_info", repository=str(repository))["restore_points"]}
    newest = Path(points.directory_of(repository, points.point(guest, repository)), "vda.qcow2")
    good = newest.read_bytes()
    points.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", newest)
    young = {**policy, "consistent_backup_min_age": "1d"}
    for proof in ("digest", "none"):
        run = run_playbook("vmkeeper.libvirt.backup", extra_vars={**young, "consistent_backup_verify": proof})
        assert (run.rc != 0) == (proof == "digest"), run.stdout
        left = {one["id"] for one in ok("backup_info", repository=str(repository))["restore_points"]}
        assert older < left, run.stdout
    newest.write_bytes(good)
