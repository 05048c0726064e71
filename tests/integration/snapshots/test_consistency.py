# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A level is claimed only when it is true: judged by what the guest wrote, what it saw, and e2fsck."""

from __future__ import annotations

import os
import signal
import statistics
import time

import libvirt
import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import proof
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks

HOOK = (tasks.ROOT / "docs" / "guest" / "50-vmkeeper").read_text()

#: An application that can be told to fail, and that leaves a trace of what it was told.
APPLICATION = b"""#!/bin/sh
echo "$1" >>/run/application
[ "$1" = freeze ] && [ -e /run/application-is-broken ] && exit 1
exit 0
"""


@pytest.fixture(scope="module")
def guest(make_guest) -> Guest:
    return make_guest(
        GuestSpec(
            "level",
            disks=(
                DiskSpec("vda", size=64 * MIB, cache="unsafe"),
                DiskSpec("vdb", size=64 * MIB, format="raw", cache="unsafe"),
            ),
            hooks={"50-vmkeeper": HOOK},
            files={"/etc/vmkeeper/freeze.d/10-application": APPLICATION},
        )
    )


def test_ten_quiesced_snapshots_are_clean_and_of_one_instant_and_tell_how_long_the_guest_stood(guest):
    proof.use_agent(guest, "real")  # without hooks, whose time is theirs
    gaps, frozen, skews = [], [], []
    for number in range(10):
        before = guest.gaps("vda").tick
        taken = tasks.ok("snapshot", domains=[guest.name], name=f"n{number}", quiesce="required")["snapshot"]
        assert taken["consistency"] in ("filesystem", "application")
        assert taken["paused_ms"] is None
        largest = [gap for disk in ("vda", "vdb") for gap in guest.gaps(disk).largest]
        # Where a busy machine made longer ones before, that of the freeze was at most as long as the shortest kept.
        gaps.append(max((gap.ns for gap in largest if gap.tick > before), default=min(gap.ns for gap in largest)) / 1e6)
        frozen.append(taken["frozen_ms"])
        ends = [proof.clean(disk["base"]).last.tick for disk in taken["disks"]]
        skews.append(max(ends) - min(ends))
    print(f"gaps {gaps}\nfrozen {frozen}\nskews {skews}")
    gap, said = statistics.median(gaps), statistics.median(frozen)
    assert abs(gap - said) <= max(50, 0.2 * said), (gaps, frozen)
    # The agent freezes one filesystem after the other: a busy machine may stretch one of ten, never beyond the freeze.
    assert statistics.median(skews) <= 2, skews
    assert all(skew * 20 <= 40 + stood for skew, stood in zip(skews, frozen)), (skews, frozen)


def test_application_is_claimed_only_when_the_guest_proves_it(guest):
    def level(name: str) -> str:
        return str(tasks.ok("snapshot", domains=[guest.name], name=name, quiesce="required")["snapshot"]["consistency"])

    proof.use_agent(guest, "hooks")
    guest.exec("rm -f /run/application")
    assert level("proved") == "application"
    told = guest.read_file("/run/application").decode().split()
    assert told[0] == "freeze"
    assert set(told[1:]) == {"thaw"}
    guest.exec("touch /run/application-is-broken")
    assert level("broken") == "filesystem"
    guest.exec("rm /run/application-is-broken")
    # A stamp of an earlier freeze proves nothing, nor does one that somebody left lying there.
    guest.exec("chmod a-x /etc/vmkeeper/freeze.d/10-application; echo stale >/run/vmkeeper.stamp")
    assert level("nobody") == "filesystem"
    guest.exec("chmod a+x /etc/vmkeeper/freeze.d/10-application")


def test_paused_is_crash_consistent_and_stays_paused(guest):
    guest.domain().suspend()
    try:
        refused = tasks.run("snapshot", domains=[guest.name], name="paused", quiesce="required")
        assert refused.failed
        assert "is paused" in refused.message
        taken = tasks.ok("snapshot", domains=[guest.name], name="paused")
        assert taken["snapshot"]["consistency"] == "crash"
        assert any("paused" in warning for warning in taken.warnings)
        assert guest.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    finally:
        guest.domain().resume()


def test_a_clean_shutdown_for_the_snapshot_is_offline_and_the_guest_runs_again(guest):
    refused = tasks.run("snapshot", domains=[guest.name], name="down", quiesce="shutdown", memory=True)
    assert refused.failed
    predicted = tasks.ok("snapshot", domains=[guest.name], name="down", quiesce="shutdown", check=True)
    assert predicted["snapshot"]["consistency"] == "offline"
    assert guest.is_running()
    taken = tasks.ok("snapshot", domains=[guest.name], name="down", quiesce="shutdown")["snapshot"]
    assert taken["consistency"] == "offline"
    assert guest.is_running()
    for disk in taken["disks"]:
        proof.clean(disk["base"])
    guest.wait_ready()
    assert not tasks.ok("snapshot", domains=[guest.name], name="down", quiesce="shutdown").changed


@pytest.mark.parametrize(("step", "kept"), [("shut-off", False), ("label", True)])
def test_a_guest_that_is_off_for_its_snapshot_when_libvirtd_goes_away_runs_again(guest, host, tmp_path, step, kept):
    log, asked = tmp_path / "steps", {"domains": [guest.name], "name": f"lost-{step}", "quiesce": "shutdown"}
    process = tasks.killed_at(step, "snapshot", log, how="stop", **asked)
    until(lambda: f"!{step}" in tasks.steps_in(log), "the step", 120)
    assert not guest.is_running()
    host.kill_libvirtd()
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(2)  # in which the task finds nobody
    host.start()
    outcome = tasks.finish(process)
    assert outcome.failed
    assert "defect" not in outcome.message
    assert ("The snapshot exists" in outcome.message) is kept, outcome.message
    guest.wait_ready()
    assert (asked["name"] in [one.getName() for one in guest.domain().listAllSnapshots()]) is kept
    again = tasks.ok("snapshot", **asked)
    assert again["snapshot"]["consistency"] == "offline"
    guest.wait_ready()
    for disk in again["snapshot"]["disks"]:
        proof.clean(disk["base"])


def test_a_saved_domain_is_refused_and_resumes_untouched(guest):
    guest.domain().managedSave()
    before = evidence.host_state(guest.connection(), [guest.directory])
    refused = tasks.run("snapshot", domains=[guest.name], name="saved")
    assert refused.failed
    assert "managed-save" in refused.message
    assert "virsh managedsave-remove" in refused.message
    assert before.differences(evidence.host_state(guest.connection(), [guest.directory])) == []
    info = tasks.ok("domain_info", domains=[guest.name])["domain"]
    assert info["managed_save"]
    assert info["state_reason"] == "saved"
    guest.start()
    count = guest.gaps("vda").count
    until(lambda: guest.gaps("vda").count > count, "the writer going on where it was")


def test_cleanly_stopped_is_offline_and_everything_else_that_is_off_is_crash(guest, host):
    guest.shutdown()
    clean = tasks.ok("snapshot", domains=[guest.name], name="clean", quiesce="required")["snapshot"]
    assert clean["consistency"] == "offline"
    assert clean["frozen_ms"] is None
    guest.start(wait=False)
    guest.destroy()
    refused = tasks.run("snapshot", domains=[guest.name], name="destroyed", quiesce="required")
    assert refused.failed
    assert "(destroyed)" in refused.message
    assert tasks.ok("snapshot", domains=[guest.name], name="destroyed")["snapshot"]["consistency"] == "crash"
    guest.start(wait=False)
    os.kill(host.qemu_pids()[guest.name], signal.SIGKILL)
    guest.wait_shutoff()
    crashed = tasks.ok("snapshot", domains=[guest.name], name="crashed")
    assert crashed["snapshot"]["consistency"] == "crash"
    assert any("crashed" in warning for warning in crashed.warnings)
    # After a daemon restart libvirt itself does not know any more how the domain ended.
    host.restart_libvirtd()
    assert tasks.ok("snapshot", domains=[guest.name], name="unknown")["snapshot"]["consistency"] == "crash"
