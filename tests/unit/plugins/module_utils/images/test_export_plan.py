# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import (
    AgentSilent,
    Busy,
    InvalidInput,
    Refused,
    Unsupported,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.agent import AgentInfo
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    BlockJob,
    Disk,
    Domain,
    DomainState,
    Layer,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images import export_plan
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.images.export_plan import Facts, Request

AGENT = AgentInfo("7", frozenset({"guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"}))
DISK = Disk("vda", "disk", "file", "virtio", (Layer("/images/a.qcow2", "qcow2"),))
DOMAIN = Domain(
    "web", "u", DomainState("running"), True, (DISK,), machine="pc-q35-7.2", arch="x86_64", agent_configured=True
)
REQUEST = Request("/srv", "golden")
LIVE = Facts(DOMAIN, True, {"vda": 1 << 30}, {"vda": 1 << 20}, agent=AGENT)
CLEAN = replace(LIVE, domain=replace(DOMAIN, state=DomainState("shutoff", "shutdown")), live=False, agent=None)


def plan(request: Request = REQUEST, facts: Facts = LIVE, *, direct: bool = True) -> export_plan.ExportPlan:
    return export_plan.plan_export(request, facts, direct=direct, scratch="/scratch")


def test_a_running_guest_is_frozen_and_copied_straight_into_the_bundle() -> None:
    made = plan()
    assert (made.live, made.freeze, made.converts, made.copy_directory) == (True, True, False, None)
    assert made.expected_level == "filesystem"


@pytest.mark.parametrize(
    ("image_format", "compression", "direct"),
    [("raw", "none", True), ("qcow2", "zstd", True), ("qcow2", "none", False)],
)
def test_another_format_a_compression_or_a_remote_destination_is_converted_from_a_copy(
    image_format: str, compression: str, direct: bool
) -> None:
    assert plan(replace(REQUEST, format=image_format, compression=compression), direct=direct).converts


def test_the_copy_of_a_remote_destination_lies_in_the_scratch() -> None:
    made = plan(direct=False)
    assert made.copy_directory == "/scratch"
    assert {directory for directory, _size in made.needs("/srv")} == {"/srv", "/scratch"}


def test_room_that_no_write_of_the_guest_may_lack_is_kept_where_qemu_copies_to() -> None:
    assert ("/scratch", 5 << 20) in plan(direct=False).needs("/srv", 5 << 20)
    assert ("/srv", 5 << 20) in plan().needs("/srv", 5 << 20)
    stopped = replace(LIVE, live=False, domain=replace(LIVE.domain, state=DomainState("shutoff", "shutdown")))
    assert plan(facts=stopped).needs("/srv", 5 << 20) == plan(facts=stopped).needs("/srv")


@pytest.mark.parametrize(
    ("state", "reason", "saved", "level"),
    [
        ("shutoff", "shutdown", False, "offline"),
        ("shutoff", "shutdown", True, "crash"),
        ("shutoff", "destroyed", False, "crash"),
        ("paused", "user", False, "crash"),
    ],
)
def test_the_level_is_the_true_one(state: str, reason: str, saved: bool, level: str) -> None:
    domain = replace(DOMAIN, state=DomainState(state, reason), managed_save=saved)
    assert plan(facts=replace(LIVE, domain=domain, live=state == "paused")).expected_level == level


def test_required_means_required() -> None:
    required = replace(REQUEST, quiesce="required")
    assert plan(required, CLEAN).expected_level == "offline"
    with pytest.raises(AgentSilent):
        plan(required, replace(LIVE, agent=None))
    with pytest.raises(Refused, match="destroyed"):
        plan(required, replace(CLEAN, domain=replace(DOMAIN, state=DomainState("shutoff", "destroyed"))))
    with pytest.raises(Refused, match="crash-consistent"):
        plan(required, replace(CLEAN, snapshot="then", level="crash"))
    assert plan(required, replace(CLEAN, snapshot="then", level="filesystem")).expected_level == "filesystem"


def test_an_encrypted_disk_is_never_written_in_the_clear() -> None:
    with pytest.raises(Unsupported, match="encrypted"):
        plan(facts=replace(LIVE, domain=replace(DOMAIN, disks=(replace(DISK, encrypted=True),))))


def test_what_only_its_own_qemu_reads_is_exported_while_that_runs() -> None:
    disk = replace(DISK, chain=(Layer("/images/a.qcow2", "qcow2"), Layer(None, "raw", "network")))
    assert plan(facts=replace(LIVE, domain=replace(DOMAIN, disks=(disk,)))).live
    with pytest.raises(Unsupported, match=r"'vda' .* no local file or device.*Start it first"):
        plan(facts=replace(CLEAN, domain=replace(CLEAN.domain, disks=(disk,))))


def test_what_is_busy_is_left_alone() -> None:
    with pytest.raises(Busy, match="a backup"):
        plan(facts=replace(LIVE, job="a backup"))
    with pytest.raises(Busy, match="block job"):
        plan(facts=replace(LIVE, domain=replace(DOMAIN, disks=(replace(DISK, job=BlockJob("copy", False, None)),))))


def test_a_kernel_of_the_host_is_said_to_be_missing() -> None:
    assert "kernel" in [part["kind"] for part in plan(facts=replace(LIVE, direct_kernel=True)).not_captured]


@pytest.mark.parametrize(
    ("machine", "family"),
    [("pc-q35-7.2", "q35"), ("q35", "q35"), ("pc-i440fx-6.2", "pc"), ("pc", "pc"), ("virt-8.0", "virt")],
)
def test_a_machine_type_is_known_by_its_family(machine: str, family: str) -> None:
    assert export_plan.family_of(machine) == family


def test_an_exotic_machine_type_is_refused() -> None:
    with pytest.raises(Unsupported):
        export_plan.family_of("microvm")


@pytest.mark.parametrize(("image_format", "compression"), [("raw", "zlib"), ("vmdk", "zstd"), ("vhdx", "zlib")])
def test_a_compression_that_a_format_lacks_is_refused(image_format: str, compression: str) -> None:
    with pytest.raises(InvalidInput):
        export_plan.check_request(replace(REQUEST, format=image_format, compression=compression))


def test_a_guest_that_is_frozen_already_is_not_frozen_again_and_claims_only_what_is_proved() -> None:
    ours = plan(facts=replace(LIVE, frozen=True, frozen_whole=True))
    assert (ours.freeze, ours.standing, ours.expected_level) == (False, True, "filesystem")
    others = plan(facts=replace(LIVE, frozen=True))
    assert (others.freeze, others.standing, others.expected_level) == (False, False, "crash")
    with pytest.raises(Refused, match="by other means"):
        plan(replace(REQUEST, quiesce="required"), replace(LIVE, frozen=True))


def estimate(**facts: Any) -> int:
    (disk,) = plan(facts=replace(LIVE, **facts)).disks
    return disk.estimate


def test_room_is_for_the_content_and_for_what_qcow2_adds() -> None:
    tebibyte = 1 << 40
    assert estimate(sizes={"vda": tebibyte}, allocated={"vda": 1 << 30}) < 2 << 30
    whole = estimate(sizes={"vda": tebibyte}, allocated={"vda": tebibyte})
    assert whole > tebibyte + tebibyte // (64 << 10) * 16, "an entry of 8 bytes for each cluster, and its refcount"
    assert estimate(sizes={"vda": tebibyte}, allocated={}) == whole, "where it is not known"


def allocated(*layers: Layer) -> int | None:
    return export_plan._allocated([replace(DISK, chain=layers, alone=True)]).get("vda")


def test_what_a_chain_holds_is_counted_as_far_as_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "top.raw", tmp_path / "base.raw"]
    for file in files:
        file.write_bytes(b"x" * (1 << 20))
    top, base = [Layer(str(file), "raw") for file in files]
    assert allocated(top, base) == 2 << 20
    assert allocated(top, Layer(None, "raw", "network")) is None
    assert allocated(Layer(None, "raw", "network")) is None
    assert allocated(top, Layer(str(tmp_path / "gone"), "raw")) is None
    os.truncate(files[1], 500 << 20)
    monkeypatch.setattr(export_plan.chain.stat, "S_ISBLK", lambda _mode: True)  # devices, with no blocks of a file
    assert allocated(top, base) == 501 << 20


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_an_external_data_file_is_counted(tmp_path: Path) -> None:
    image, data = tmp_path / "vda.qcow2", tmp_path / "data.raw"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", str(image), str(16 << 20)]
    subprocess.run(create, check=True)
    data.write_bytes(b"x" * (4 << 20))
    assert 4 << 20 <= (allocated(Layer(str(image), "qcow2")) or 0) < 8 << 20
    data.unlink()
    assert allocated(Layer(str(image), "qcow2")) is None
