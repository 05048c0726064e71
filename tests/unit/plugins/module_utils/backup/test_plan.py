# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Full or increment: the proof of invariant 7, on facts alone."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils._errors import Busy, InvalidInput, Refused, Unsupported
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import plan as planning
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.checkpoints import Checkpoint, parse_checkpoint
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.manifest import Point, SourceLayer, StoredDisk
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import History
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import (
    Disk,
    Domain,
    DomainState,
    Encryption,
    Layer,
)
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import Passphrase

CP = "vmk-01234567-20261120T201500Z-7f3a"
ID = "20261120T201500Z-7f3a"
UUID = "8b2f4a3e-0000-4000-8000-000000000001"
SIZE = 1 << 30
RUNNING = DomainState("running", "booted")


def layer(
    path: str, *, size: int = SIZE, bitmaps: tuple[str, ...] = (), inode: int | None = None
) -> planning.LayerFacts:
    return planning.LayerFacts(
        path, "qcow2", hash(path) % 1000 if inode is None else inode, size, 10 << 20, 3, frozenset(bitmaps)
    )


def facts(
    layers: tuple[planning.LayerFacts, ...],
    *,
    recorded: tuple[planning.LayerFacts, ...],
    whole: bool = True,
    covers: bool = True,
    recorded_size: int = SIZE,
    state: DomainState = RUNNING,
) -> planning.Facts:
    source = tuple(SourceLayer(one.path, one.format, one.inode, one.size) for one in recorded)
    stored = StoredDisk("vda", "full", "first", None, recorded_size, 1, 1, source=source)
    last = Point(
        ID, 1, "web", UUID, "2026-11-20T20:15:00+00:00", "full", "first", None, "crash", (stored,), checkpoint=CP
    )
    disk = Disk("vda", "disk", "file", "virtio", tuple(Layer(one.path, "qcow2") for one in layers))
    checkpoint = Checkpoint(CP, frozenset({"vda"} if covers else ()), {"vda": 5 << 20} if whole else {})
    return planning.Facts(
        domain=Domain("web", UUID, state, True, (disk,)),
        disks={"vda": planning.DiskFacts(disk, layers[0].size, layers)},
        history=History((last,)),
        last=last,
        checkpoint=checkpoint,
        our_checkpoints=(CP,),
    )


BASE = layer("/i/base")
TOP = layer("/i/top")


def reason_of(found: planning.Facts) -> str:
    return planning.plan_point(planning.Request(), found).disks[0].reason


def test_one_layer_that_never_changed_is_proved() -> None:
    plan = planning.plan_point(planning.Request(), facts((BASE,), recorded=(BASE,)))
    assert (plan.type, plan.parent, plan.disks[0].reason) == ("incremental", ID, "proved")
    assert plan.retire == (CP,)
    assert plan.checkpoint_parent == CP
    assert 5 << 20 < plan.estimate < 20 << 20


def test_a_snapshot_above_the_recorded_layer_is_proved_when_the_sealed_layer_states_the_bitmap() -> None:
    sealed = replace(BASE, bitmaps=frozenset({CP}))
    assert reason_of(facts((TOP, sealed), recorded=(BASE,))) == "proved"
    assert reason_of(facts((TOP, BASE), recorded=(BASE,))) == "pulled"


def test_an_overlay_committed_into_its_base_is_proved() -> None:
    assert reason_of(facts((BASE,), recorded=(TOP, BASE))) == "proved"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (facts((TOP,), recorded=(BASE,)), "pulled"),
        (facts((TOP,), recorded=(BASE,), whole=False), "disk replaced"),
        (facts((TOP, BASE), recorded=(BASE,), whole=False), "reverted"),
        (facts((BASE,), recorded=(BASE,), whole=False), "bitmap inconsistent"),
        (facts((replace(BASE, inode=7),), recorded=(replace(BASE, inode=8),)), "disk replaced"),
        (facts((replace(TOP, size=2 * SIZE), replace(BASE, bitmaps=frozenset({CP}))), recorded=(BASE,)), "resized"),
        (facts((replace(BASE, size=2 * SIZE),), recorded=(TOP, BASE)), "resized"),
        (facts((replace(BASE, size=SIZE // 2),), recorded=(BASE,)), "shrunk"),
        (facts((BASE,), recorded=(BASE,), covers=False), "checkpoint missing"),
        (facts((BASE,), recorded=(BASE,), state=DomainState("shutoff", "shutdown")), "cold cut"),
    ],
)
def test_what_is_not_proved_gets_a_full_that_says_why(found: planning.Facts, reason: str) -> None:
    plan = planning.plan_point(planning.Request(), found)
    assert (plan.type, plan.disks[0].reason) == ("full", reason)
    with pytest.raises(Refused, match="incrementally"):
        planning.plan_point(planning.Request(type="incremental"), found)


def test_a_disk_that_only_grew_stays_incremental() -> None:
    grown = replace(BASE, size=2 * SIZE)
    plan = planning.plan_point(planning.Request(), facts((grown,), recorded=(BASE,)))
    assert plan.disks[0].reason == "proved"
    assert plan.disks[0].parent_size == SIZE


def test_first_lost_and_asked_for() -> None:
    found = facts((BASE,), recorded=(BASE,))
    assert reason_of(replace(found, last=None, history=History())) == "first"
    assert reason_of(replace(found, checkpoint=None)) == "checkpoint missing"
    assert planning.plan_point(planning.Request(type="full"), found).disks[0].reason == "asked for"
    assert reason_of(replace(found, domain=replace(found.domain, persistent=False))) == "transient domain"


def test_raw_and_old_images_are_full_and_not_tracked() -> None:
    found = facts((replace(BASE, format="raw"),), recorded=(BASE,))
    plan = planning.plan_point(planning.Request(), found)
    assert plan.disks[0].reason == "raw"
    assert plan.tracked == ()
    assert planning.checkpoint_xml(plan, "x") is None
    assert reason_of(facts((replace(BASE, qcow2_version=2),), recorded=(BASE,))) == "old qcow2"


def test_a_chain_ends_at_its_limit_and_a_broken_one_is_not_gone_on_with() -> None:
    found = facts((BASE,), recorded=(BASE,))
    points = []
    for number in range(planning.CHAIN_LIMIT):
        identifier = f"20261120T2015{number:02d}Z-7f3a"
        parent = points[-1].id if points else None
        disk = replace(found.last.disks[0], parent=parent, type="incremental" if parent else "full")
        points.append(replace(found.last, id=identifier, sequence=number + 1, disks=(disk,)))
    assert reason_of(replace(found, last=points[-1], history=History(tuple(points)))) == "chain limit"
    assert reason_of(replace(found, last=points[-2], history=History(tuple(points)))) == "proved"
    assert reason_of(replace(found, last=points[-1], history=History(tuple(points[5:])))) == "chain broken"


def test_a_cold_cut_leaves_the_live_chain_alone() -> None:
    plan = planning.plan_point(
        planning.Request(), facts((BASE,), recorded=(BASE,), state=DomainState("shutoff", "shutdown"))
    )
    assert plan.retire == ()
    assert plan.tracked == ()
    assert plan.expected_level == "offline"


def test_busy_encrypted_and_unclean_are_refused() -> None:
    found = facts((BASE,), recorded=(BASE,))
    with pytest.raises(Busy):
        planning.plan_point(planning.Request(), replace(found, job="a save"))
    secret = replace(found.domain.disks[0], encrypted=True)
    with pytest.raises(Unsupported, match="not with LUKS"):
        planning.plan_point(planning.Request(), replace(found, domain=replace(found.domain, disks=(secret,))))
    off = replace(found, domain=replace(found.domain, state=DomainState("shutoff", "destroyed")))
    with pytest.raises(Refused, match="quiesce"):
        planning.plan_point(planning.Request(quiesce="required"), off)


def test_the_xml_names_every_disk_and_increments_by_checkpoint() -> None:
    plan = planning.plan_point(planning.Request(), facts((BASE,), recorded=(BASE,)))
    xml = planning.backup_xml(plan, "/r/u/.new-x")
    assert f'backupmode="incremental" incremental="{CP}"' in xml
    assert 'file="/r/u/.new-x/vda.qcow2"' in xml
    assert 'checkpoint="bitmap"' in (planning.checkpoint_xml(plan, "vmk-x") or "")


def test_a_point_from_the_future_is_not_young() -> None:
    known = facts((BASE,), recorded=(BASE,))
    created = known.history.points[0].created_at
    young = planning.Request(min_age=60)
    assert planning.young_enough(young, known, created + datetime.timedelta(seconds=59)) is not None
    assert planning.young_enough(young, known, created + datetime.timedelta(seconds=61)) is None
    assert planning.young_enough(young, known, created - datetime.timedelta(seconds=1)) is None


def test_a_young_point_of_something_else_does_not_stand_for_what_is_asked() -> None:
    known = facts((BASE,), recorded=(BASE,))
    (point,) = known.history.points
    now = point.created_at + datetime.timedelta(seconds=1)

    def young(request: planning.Request, **changes: object) -> bool:
        changed = replace(known, history=replace(known.history, points=(replace(point, **changes),)))
        return planning.young_enough(replace(request, min_age=60), changed, now) is not None

    assert young(planning.Request())
    assert not young(planning.Request(), disks=())
    assert young(planning.Request(quiesce="required"), consistency="filesystem")
    assert not young(planning.Request(quiesce="required"), consistency="crash")
    assert not young(planning.Request(passphrase=Passphrase(b"correct horse battery")))


def test_only_disks_with_a_counted_bitmap_are_whole() -> None:
    found = parse_checkpoint(
        "<domaincheckpoint><name>c</name><disks><disk name='vda' checkpoint='bitmap' size='65536'/>"
        "<disk name='vdb' checkpoint='bitmap'/><disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
    )
    assert found == Checkpoint("c", frozenset({"vda", "vdb"}), {"vda": 65536})


# --- compression, encryption, and the way over a scratch directory ---------------------------------------

KEY = Passphrase(b"a passphrase of somebody")


def encrypted(found: planning.Facts, *, told: bool = True, kind: str = "luks") -> planning.Facts:
    """The same domain with a disk that is encrypted, whose passphrase libvirt tells or not."""
    known = found.disks["vda"]
    disk = replace(known.disk, encrypted=True, encryption=Encryption(kind, UUID, None))
    return replace(
        found,
        domain=replace(found.domain, disks=(disk,)),
        disks={"vda": replace(known, disk=disk, passphrase=KEY if told else None)},
    )


def last_point_encrypted(found: planning.Facts) -> planning.Facts:
    assert found.last is not None
    disk = replace(found.last.disks[0], encryption={"format": "luks"})
    last = replace(found.last, disks=(disk,))
    return replace(found, last=last, history=History((last,)))


def test_encryption_that_comes_or_goes_makes_a_full() -> None:
    plain = facts((BASE,), recorded=(BASE,))
    closed = last_point_encrypted(plain)
    for found, passphrase, reason in (
        (plain, None, "proved"),
        (plain, KEY, "encryption changed"),
        (closed, None, "encryption changed"),
        (closed, KEY, "proved"),
    ):
        assert planning.plan_point(planning.Request(passphrase=passphrase), found).disks[0].reason == reason


def test_compression_may_change_within_a_chain() -> None:
    plan = planning.plan_point(planning.Request(compression="zstd"), facts((BASE,), recorded=(BASE,)))
    assert (plan.disks[0].reason, plan.disks[0].compression) == ("proved", "zstd")


def test_compression_and_encryption_exclude_each_other() -> None:
    planning.refuse_impossible(planning.Request(compression="zstd"))
    planning.refuse_impossible(planning.Request(passphrase=KEY))
    with pytest.raises(InvalidInput, match="exclude each other"):
        planning.refuse_impossible(planning.Request(compression="zstd", passphrase=KEY))


@pytest.mark.parametrize(
    ("request_", "local", "staged"),
    [
        (planning.Request(), True, False),
        (planning.Request(), False, True),
        (planning.Request(compression="zlib"), True, True),
        (planning.Request(passphrase=KEY), True, True),
        (planning.Request(scratch="/somewhere"), True, True),
    ],
)
def test_qemu_writes_into_a_scratch_directory_where_it_must(request_, local: bool, staged: bool) -> None:
    running = planning.plan_point(request_, facts((BASE,), recorded=(BASE,)))
    stopped = planning.plan_point(request_, facts((BASE,), recorded=(BASE,), state=DomainState("shutoff", "shutdown")))
    assert planning.must_stage(request_, [running], local=local) is staged
    assert not planning.must_stage(request_, [stopped], local=local), "nobody waits for it"


def test_an_encrypted_disk_stays_encrypted_by_its_own_passphrase_or_the_given_one() -> None:
    found = encrypted(last_point_encrypted(facts((BASE,), recorded=(BASE,))))
    own = planning.plan_point(planning.Request(compression="zstd"), found).disks[0]
    assert (own.passphrase, own.compression, own.reason) == (KEY, None, "proved")
    other = Passphrase(b"another passphrase")
    assert planning.plan_point(planning.Request(passphrase=other), found).disks[0].passphrase == other
    assert planning.must_stage(planning.Request(), [planning.plan_point(planning.Request(), found)], local=True)


def test_an_encrypted_disk_that_nobody_could_keep_encrypted_is_refused() -> None:
    running = facts((BASE,), recorded=(BASE,))
    stopped = facts((BASE,), recorded=(BASE,), state=DomainState("shutoff", "shutdown"))
    with pytest.raises(Refused, match=r"encryption\.passphrase"):
        planning.plan_point(planning.Request(), encrypted(running, told=False))
    planning.plan_point(planning.Request(passphrase=KEY), encrypted(running, told=False))
    with pytest.raises(Refused, match="Start it"):
        planning.plan_point(planning.Request(passphrase=KEY), encrypted(stopped, told=False))
    with pytest.raises(Unsupported, match="not with LUKS"):
        planning.plan_point(planning.Request(passphrase=KEY), encrypted(running, kind="qcow"))


def test_no_text_of_a_plan_tells_a_passphrase() -> None:
    plan = planning.plan_point(planning.Request(passphrase=KEY), encrypted(facts((BASE,), recorded=(BASE,))))
    assert KEY.value.decode() not in repr(plan)
    assert KEY.value.decode() not in planning.backup_xml(plan, "/scratch", UUID)


def test_the_target_of_an_encrypted_disk_has_the_key_of_the_scratch() -> None:
    found = facts((BASE,), recorded=(BASE,))
    plan = planning.plan_point(planning.Request(passphrase=KEY), found)
    assert f'<encryption format="luks"><secret type="passphrase" uuid="{UUID}" /></encryption>' in planning.backup_xml(
        plan, "/scratch", UUID
    )
    plain = planning.plan_point(planning.Request(), found)
    assert "encryption" not in planning.backup_xml(plain, "/scratch", UUID)


def test_a_guest_that_is_frozen_already_is_not_frozen_again_and_claims_only_what_is_proved() -> None:
    known = replace(facts((BASE,), recorded=(BASE,)), frozen=True)
    others = planning.plan_point(planning.Request(), known)
    assert (others.freeze, others.standing, others.expected_level) == (False, False, "crash")
    ours = planning.plan_point(planning.Request(), replace(known, frozen_whole=True))
    assert (ours.freeze, ours.standing, ours.expected_level) == (False, True, "filesystem")


def test_a_chain_that_leads_elsewhere_is_read_by_the_guests_own_qemu_or_not_at_all() -> None:
    running = facts((TOP,), recorded=(BASE,))
    disk = replace(running.domain.disks[0], chain=(Layer("/i/top", "qcow2"), Layer(None, "qcow2", "network")))
    remote = replace(running.disks["vda"], disk=disk)
    running = replace(running, domain=replace(running.domain, disks=(disk,)), disks={"vda": remote})
    plan = planning.plan_point(planning.Request(), running)
    assert plan.disks[0].estimate >= SIZE, "nobody here knows how much the layer that is elsewhere holds"
    off = replace(running, domain=replace(running.domain, state=DomainState("shutoff", "shutdown")))
    with pytest.raises(Unsupported, match=r"'vda' .* no local file or device.*Start it first"):
        planning.plan_point(planning.Request(), off)
