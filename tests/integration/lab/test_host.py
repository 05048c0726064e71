# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""The private host's daemons come and go; its guests outlive libvirtd and die in a power cut."""

from __future__ import annotations

import subprocess
from pathlib import Path

import libvirt
import pytest
from lab import evidence
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.host import TestHost
from lab.waiting import until


@pytest.fixture(scope="module")
def guest(module_guest_factory) -> Guest:
    return module_guest_factory(GuestSpec("survivor"))


def test_guest_survives_a_restart_of_libvirtd(host: TestHost, guest: Guest) -> None:
    pid = host.qemu_pids()[guest.name]
    daemon = host.libvirtd_pid()
    before = guest.gaps("vda").count
    host.restart_libvirtd()
    assert host.libvirtd_pid() not in (None, daemon)
    assert host.qemu_pids()[guest.name] == pid
    assert guest.is_running()
    guest.wait_agent()
    until(lambda: guest.gaps("vda").count > before, "the writer going on")


def test_guest_survives_the_death_of_libvirtd(host: TestHost, guest: Guest) -> None:
    pid = host.qemu_pids()[guest.name]
    host.kill_libvirtd()
    assert host.libvirtd_pid() is None
    with pytest.raises(libvirt.libvirtError):
        host.connect()
    host.start()
    assert host.qemu_pids()[guest.name] == pid
    guest.wait_agent()
    assert guest.writer_log("vda").is_intact


def test_images_belong_to_the_user_of_qemu_while_the_guest_runs_and_to_root_after(
    host: TestHost, guest_factory
) -> None:
    guest = guest_factory(GuestSpec("owner"))
    assert guest.images["vda"].owner() == "libvirt-qemu"
    guest.destroy()
    assert guest.images["vda"].owner() == "root"


def test_reboot_ends_guests_and_detached_processes_and_starts_autostart_domains(host: TestHost, guest: Guest) -> None:
    stray = subprocess.Popen(["setsid", "--fork", "sleep", "987"])
    stray.wait()
    child = subprocess.Popen(["sleep", "988"])
    Path("/run/vmkeeper-test-leftover").touch()
    before = guest.gaps("vda").count
    guest.domain().setAutostart(1)
    pid = host.qemu_pids()[guest.name]
    host.reboot()
    assert host.qemu_pids().get(guest.name) != pid
    assert child.wait(10) == -9
    assert subprocess.run(["pgrep", "-f", "sleep 987"], check=False, stdout=subprocess.PIPE).returncode == 1
    assert not Path("/run/vmkeeper-test-leftover").exists()
    until(guest.is_running, "the autostart of the guest")
    guest.wait_ready()
    until(lambda: guest.gaps("vda").count >= before - 200, "the writer going on")
    guest.domain().setAutostart(0)
    guest.destroy()
    assert evidence.fsck(guest.images["vda"]).clean


def test_host_state_names_what_changed(host: TestHost, guest_factory, tmp_path: Path) -> None:
    guest = guest_factory(GuestSpec("state", disks=(DiskSpec("vda", fs=None),)), start=False)
    connection = host.connect()
    before = evidence.host_state(connection, [guest.directory])
    assert evidence.host_state(connection, [guest.directory]).differences(before) == []
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    guest.domain().snapshotCreateXML("<domainsnapshot><name>s1</name></domainsnapshot>", flags)
    changed = evidence.host_state(connection, [guest.directory]).differences(before)
    assert f"domain {guest.name} snapshot s1" in changed
    assert f"domain {guest.name} inactive" in changed
    assert f"file {guest.directory}/vda.s1" in changed


def test_the_private_host_is_not_the_machine(host: TestHost) -> None:
    assert subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.startswith("lab-")
    assert not Path("/run/systemd/system").exists()
    assert Path("/proc/1/comm").read_text().strip() == "enter"
