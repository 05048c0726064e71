# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A guest whose agent runs no programs, as RHEL ships it: the role grows what is on its disks over its own inventory host.

It boots a whole Debian guest, so it runs with ``VMK_SCALE`` above 1 only (make test-long).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from lab import ansible, evidence
from lab.host import TestHost
from lab.inventory_guest import ROOT_PARTITION, InventoryGuest

from ansible_collections.vmkeeper.libvirt.tests.integration.sizing.resizing import MIB

pytestmark = [
    pytest.mark.skipif(
        int(os.environ.get("VMK_SCALE", "1")) < 2,
        reason="boots a whole Debian guest; VMK_SCALE=2 and above (make test-long)",
    ),
    pytest.mark.timeout(3600),  # it is built first
]

#: An emulated guest takes long to let anybody in.
PATIENT = {"ANSIBLE_TIMEOUT": "300", "ANSIBLE_PIPELINING": "true"}

#: Numbers one line a time, each on the disk before the next, at / and at /srv.
WRITER = """
for place in /var/lib /srv; do
systemd-run --quiet --unit=writer$(basename $place) sh -c \\
    "n=\\$(cat $place/numbers 2>/dev/null | wc -l); \\
    while :; do n=\\$((n + 1)); echo \\$n >>$place/numbers; sync $place/numbers; sleep 0.2; done"
done
"""


@pytest.fixture(scope="module")
def guest(host: TestHost) -> Iterator[InventoryGuest]:
    machine = InventoryGuest(host, "lab-inventory")
    try:
        machine.define()
        machine.start()
        machine.run(WRITER)
        yield machine
    finally:
        machine.cleanup()


def scale(guest: InventoryGuest, sizes: dict[str, int], *, check: bool = False) -> ansible.PlaybookRun:
    return ansible.run_playbook(
        "vmkeeper.libvirt.scale",
        extra_vars={
            "target": "localhost",
            "vertical_scale_domains": [guest.name],
            "vertical_scale_disks": [{"target": target, "size": f"{size}M"} for target, size in sizes.items()],
            "vertical_scale_guests": {guest.name: {"host": "inside", "mounts": ["/", "/srv"]}},
            "vertical_scale_snapshot": False,
        },
        more_hosts={"inside": guest.as_inventory_host()},
        env=PATIENT,
        check=check,
    )


def changed(run: ansible.PlaybookRun) -> list[str]:
    """The tasks that changed something."""
    assert run.rc == 0, str([task for task in run.tasks if "failed" in task.outcome]) + run.stdout + run.stderr
    return [task.task.rpartition(" : ")[2] for task in run.tasks if task.result.get("changed") and task.outcome == "ok"]


def sizes(guest: InventoryGuest) -> dict[str, int]:
    """Bytes of the two file systems, by their own account."""
    root = guest.run("dumpe2fs -h /dev/vda1 2>/dev/null")
    numbers = dict(line.split(":", 1) for line in root.splitlines() if ":" in line)
    srv = guest.run("xfs_info /srv | grep ^data").replace(",", " ").split()
    fields = dict(word.split("=", 1) for word in srv if "=" in word and not word.startswith("="))
    return {
        "/": int(numbers["Block count"]) * int(numbers["Block size"]),
        "/srv": int(fields["blocks"]) * int(fields["bsize"]),
    }


def test_check_mode_looks_and_changes_nothing(guest: InventoryGuest) -> None:
    before = sizes(guest)
    changed(scale(guest, {"vda": 1200, "vdb": 384}, check=True))
    assert sizes(guest) == before
    assert guest.domain().blockInfo("vda")[0] < 1200 * MIB


def test_root_and_data_grow_over_the_guests_own_connection_while_it_writes(guest: InventoryGuest) -> None:
    run = scale(guest, {"vda": 1200, "vdb": 384})
    assert changed(run) == ["Change the size", *_GROWN]
    (module,) = [task.result for task in run.tasks if task.task.endswith("Change the size")]
    assert any("guest-exec" in change["why"] for change in module["changes"] if change["what"] == "filesystem vda")
    now = sizes(guest)
    assert 1190 * MIB - 9 * MIB <= now["/"] <= 1191 * MIB
    assert 380 * MIB <= now["/srv"] <= 384 * MIB


_GROWN = ["Grow the partition", "Tell the kernel its new size", "Grow the filesystem", "Grow the filesystem"]


def test_the_second_time_there_is_nothing_to_do(guest: InventoryGuest) -> None:
    assert changed(scale(guest, {"vda": 1200, "vdb": 384})) == []


def test_after_a_restart_the_guest_is_waited_for(guest: InventoryGuest) -> None:
    run = ansible.run_playbook(
        "vmkeeper.libvirt.scale",
        extra_vars={
            "target": "localhost",
            "vertical_scale_domains": [guest.name],
            "vertical_scale_vcpus": 1 + guest.domain().maxVcpus(),
            "vertical_scale_overcommit": True,
            "vertical_scale_allow_restart": True,
            "vertical_scale_health_timeout": "30m",
            "vertical_scale_shutdown_timeout": "20m",
            "vertical_scale_disks": [{"target": "vdb", "size": "400M"}],
            "vertical_scale_guests": {guest.name: {"host": "inside", "mounts": ["/"]}},
            "vertical_scale_snapshot": False,
        },
        more_hosts={"inside": guest.as_inventory_host()},
        env=PATIENT,
    )
    assert run.rc == 0, run.stdout + run.stderr
    (module,) = [task.result for task in run.tasks if task.task.endswith("Change the size")]
    assert module["restarted"]
    assert any(task.task.endswith("See what is mounted") and task.outcome == "ok" for task in run.tasks)
    guest.run(WRITER)


def test_a_place_that_is_no_partition_or_disk_is_refused(guest: InventoryGuest) -> None:
    run = ansible.run_playbook(
        "vmkeeper.libvirt.scale",
        extra_vars={
            "target": "localhost",
            "vertical_scale_domains": [guest.name],
            "vertical_scale_disks": [{"target": "vdb", "size": "400M"}],
            "vertical_scale_guests": {guest.name: {"host": "inside", "mounts": ["/run"]}},
        },
        more_hosts={"inside": guest.as_inventory_host()},
        env=PATIENT,
    )
    assert run.rc != 0
    (failed,) = [task.result["msg"] for task in run.tasks if task.outcome in ("failed", "item_failed")]
    assert "tmpfs" in failed
    assert "/run" in failed


def test_with_an_agent_that_may_the_module_grows_the_root_itself(guest: InventoryGuest) -> None:
    guest.run("rm /etc/qemu/qemu-ga.conf; systemctl restart qemu-guest-agent")
    wanted: dict[str, Any] = {"domain": guest.name, "disks": [{"target": "vda", "size": "1300M"}]}
    result = ansible.run_module("resize_domain", **wanted)
    assert not result["failed"], result["msg"]
    assert {change["what"]: change["applied"] for change in result["changes"]} == {
        "disk vda": "live",
        "filesystem vda": "live",
    }
    assert sizes(guest)["/"] >= 1290 * MIB - 9 * MIB
    assert not ansible.run_module("resize_domain", **wanted)["changed"]


def test_all_that_it_wrote_is_there_in_sound_filesystems(guest: InventoryGuest) -> None:
    # Each number follows the one before it, and both writers still write.
    for place in ("/var/lib", "/srv"):
        unit = place.rpartition("/")[2]
        last = int(guest.run(f"tail -n 1 {place}/numbers"))
        assert guest.run(f"systemctl is-active writer{unit}").strip() == "active"
        guest.run(f"systemctl stop writer{unit}; awk '$1 != NR {{ exit 1 }}' {place}/numbers")
        assert int(guest.run(f"wc -l <{place}/numbers")) >= last > 0
    guest.shutdown()
    for target, partition in (("vda", ROOT_PARTITION), ("vdb", None)):
        checked = evidence.fsck(guest.image(target), partition)
        assert checked.clean, checked.output
