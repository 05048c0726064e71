# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random histories: after every step guest, snapshots, files and definitions are what a small model says.

A step returns False where it would mean nothing now, and another one is chosen.  Every second history is one of two guests,
which are snapshotted, reverted and cleared together at times, and alone at others.

``VMK_HISTORY_SEED`` replays one sequence, or those from one to another (``71-200``).
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import libvirt
import pytest

from ansible_collections.vmkeeper.libvirt.tests.integration.snapshots import ways
from ansible_collections.vmkeeper.libvirt.tests.lab import tasks
from ansible_collections.vmkeeper.libvirt.tests.lab.guest import DiskSpec, Guest, GuestSpec
from ansible_collections.vmkeeper.libvirt.tests.lab.host import TestHost
from ansible_collections.vmkeeper.libvirt.tests.lab.spec import MIB

SCALE = int(os.environ.get("VMK_SCALE", "1"))
SEQUENCES = 2 * SCALE if SCALE < 10 else 10 * SCALE
STEPS = 12


@dataclass(eq=False)
class Layer:
    """An image; ``below`` is what it stands on."""

    below: Layer | None = None


@dataclass
class Point:
    """A snapshot of the model: its content lies in ``layer``."""

    parent: str | None
    layer: Layer
    content: str
    memory: bool


@dataclass
class Model:
    """What must be true of the domain."""

    content: str = "begin"
    top: Layer = field(default_factory=Layer)
    points: dict[str, Point] = field(default_factory=dict)
    current: str | None = None
    running: bool = True

    def chain(self, layer: Layer) -> list[Layer]:
        """From this layer down."""
        found = [layer]
        while found[-1].below is not None:
            found.append(found[-1].below)
        return found

    def alive(self) -> set[Layer]:
        """Every layer that somebody needs."""
        roots = [self.top, *(point.layer for point in self.points.values())]
        return {layer for root in roots for layer in self.chain(root)}

    def above(self, layer: Layer) -> list[Layer]:
        """The layers that stand directly on it."""
        return [one for one in self.alive() if one.below is layer]

    def merge(self, upper: Layer, into: Layer) -> None:
        """``upper`` becomes one with ``into``."""
        for one in self.above(upper):
            one.below = into
        for point in self.points.values():
            if point.layer is upper:
                point.layer = into
        if self.top is upper:
            self.top = into

    def take(self, name: str, memory: bool) -> None:
        """A snapshot was taken."""
        self.points[name] = Point(self.current, self.top, self.content, memory)
        self.top = Layer(self.top)
        self.current = name

    def revert(self, name: str) -> None:
        """The domain went back."""
        self.top = Layer(self.points[name].layer)
        self.content = self.points[name].content
        self.current = name
        self.running = self.running or self.points[name].memory

    def forget(self, name: str) -> Point:
        """Only the record goes."""
        gone = self.points.pop(name)
        for point in self.points.values():
            if point.parent == name:
                point.parent = gone.parent
        if self.current == name:
            self.current = gone.parent
        return gone

    def remove(self, name: str) -> bool:
        """A snapshot was removed; True when its layer stays for others."""
        layer = self.forget(name).layer
        upper = self.above(layer)
        named = self.top is layer or any(point.layer is layer for point in self.points.values())
        if layer not in self.alive():
            return False
        if named or len(upper) != 1:
            return True
        self.merge(upper[0], layer)
        return False

    def commit(self, keep: int) -> list[str] | None:
        """The oldest layers were merged until ``keep`` remain; the snapshots that ended, None where it must be refused."""
        chain = self.chain(self.top)
        if len(chain) <= keep:
            return []
        run = chain[keep - 1 :]
        for upper, lower in itertools.pairwise(run):
            if self.above(lower) != [upper]:
                return None
        ended = [name for name, point in self.points.items() if point.layer in run[1:]]
        for name in ended:
            self.forget(name)
        for upper in reversed(run[:-1]):
            self.merge(upper, run[-1])
        return ended


@dataclass(eq=False)
class Life:
    """A guest, and what must be true of it."""

    guest: Guest
    model: Model = field(default_factory=Model)


class History:
    """One sequence on one guest, or two."""

    def __init__(self, guests: list[Guest], host: TestHost, seed: int) -> None:
        self.lives = [Life(guest) for guest in guests]
        self.now = self.lives[:1]
        self.host = host
        self.random = random.Random(seed)
        self.names = (f"s{number}" for number in itertools.count(1))
        self.told: list[str] = []

    @property
    def guest(self) -> Guest:
        """The one that a step is about."""
        return self.now[0].guest

    @property
    def model(self) -> Model:
        """What must be true of it."""
        return self.now[0].model

    def run(self, steps: int) -> None:
        """Do the steps, checking after each what they were about, and all at the end."""
        for life in self.lives:
            self.now = [life]
            self.write()
            self.check()
        choices: dict[Callable[[], bool], int] = {
            self.snapshot: 6,
            self.write: 2,
            self.revert: 5,
            self.remove: 3,
            self.commit: 2,
            self.internal: 1,
            self.grow: 1,
            self.managed_save: 1,
            self.cold_start: 1,
            self.stop: 1,
            self.restart_libvirtd: 1,
        }
        if len(self.lives) > 1:
            choices |= {self.group_snapshot: 6, self.group_revert: 5, self.group_remove: 2}
        done = 0
        while done < steps:
            self.now = [self.random.choice(self.lives)]
            step = self.random.choices(list(choices), list(choices.values()))[0]
            if step():
                done += 1
                self.check_now()
        self.now = self.lives
        self.check_now()

    def check_now(self) -> None:
        """Compare each guest that the step was about with its model."""
        for life in list(self.now):
            self.now = [life]
            self.check()

    def tell(self, text: str) -> bool:
        """Note what is done, for the failure's message."""
        self.told.append(f"{'+'.join(life.guest.name for life in self.now)}: {text}")
        print(f"{time.strftime('%T')} {self.told[-1]}", flush=True)
        return True

    def task(self, **arguments: object) -> tasks.Outcome:
        """The snapshot module on this guest."""
        return tasks.ok("snapshot", domain=self.guest.name, **arguments)

    def group_task(self, **arguments: object) -> tasks.Outcome:
        """The snapshot module on all guests at once."""
        return tasks.ok("snapshot", domains=[life.guest.name for life in self.lives], **arguments)

    def up(self) -> None:
        """See that the guest runs and answers."""
        if not self.guest.is_running():
            self.guest.start()
        self.guest.wait_ready()
        self.model.running = True

    # --- steps

    def write(self) -> bool:
        self.up()
        self.model.content = f"content {self.random.getrandbits(64):x}"
        ways.write(self.guest, self.model.content)
        return self.tell("write")

    def snapshot(self) -> bool:
        name, memory = next(self.names), self.model.running and self.random.random() < 0.6
        self.tell(f"snapshot {name}{' with memory' if memory else ''}")
        self.task(name=name, memory=memory)
        self.model.take(name, memory)
        return True

    def revert(self) -> bool:
        if not self.model.points:
            return False
        name = self.random.choice(list(self.model.points))
        keep = next(self.names) if self.random.random() < 0.4 else None
        self.tell(f"revert to {name}, keeping the present as {keep}")
        answer = self.task(name=name, state="reverted", allow_restart=True, keep_present_as=keep)
        if keep:
            self.model.take(keep, False)
        self.model.revert(name)
        assert answer["snapshot"]["guest"] in ("resumed", "booted", "shut off")
        if self.model.running:
            self.guest.wait_ready()
        return True

    def remove(self) -> bool:
        if not self.model.points:
            return False
        name = self.random.choice(list(self.model.points))
        self.tell(f"remove {name}")
        answer = self.task(name=name, state="absent")
        assert bool(answer["snapshot"]["layer_kept_for"]) == self.model.remove(name)
        assert not self.task(name=name, state="absent").changed
        return True

    def commit(self) -> bool:
        keep = self.random.choice([1, 2, 3])
        self.tell(f"commit, keep {keep}")
        answer = tasks.run("blockcommit", domain=self.guest.name, keep=keep)
        ended = self.model.commit(keep)
        assert answer.failed == (ended is None), answer.message
        if ended is not None:
            assert sorted(one["name"] for one in answer["snapshots_ended"]) == sorted(ended)
        return True

    def internal(self) -> bool:
        if self.model.points:
            return False
        self.tell("internal snapshot, back and away")
        self.up()
        kept = self.model.content
        self.task(name="inside", mode="internal", memory=True)
        ways.write(self.guest, "lost")
        self.task(name="inside", state="reverted")
        self.guest.wait_ready()
        assert ways.read(self.guest) == {kept}
        self.task(name="inside", state="absent")
        return True

    def grow(self) -> bool:
        if not self.model.running:
            return False
        size = self.guest.domain().blockInfo("vda")[0] + MIB
        self.tell(f"grow vda to {size}")
        self.guest.domain().blockResize("vda", size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        return True

    def managed_save(self) -> bool:
        if not self.model.running:
            return False
        self.tell("managed save")
        self.guest.domain().managedSave(0)
        if self.model.points:
            name = self.random.choice(list(self.model.points))
            assert tasks.run("snapshot", domain=self.guest.name, name=name, state="absent").failed
            assert tasks.run("snapshot", domain=self.guest.name, name=name, state="reverted").failed
        self.guest.domain().create()
        return True

    def cold_start(self) -> bool:
        self.tell("cold start")
        if self.model.running:
            self.guest.shutdown()
        self.guest.start()
        self.model.running = True
        return True

    def stop(self) -> bool:
        if not self.model.running:
            return False
        self.tell("stop")
        self.guest.shutdown()
        self.model.running = False
        return True

    def restart_libvirtd(self) -> bool:
        self.tell("restart libvirtd")
        self.host.restart_libvirtd()
        return True

    # --- steps of a group

    def shared_names(self) -> list[str]:
        """The snapshots that every guest has."""
        first, *others = [life.model.points for life in self.lives]
        return [name for name in first if all(name in points for points in others)]

    def group_snapshot(self) -> bool:
        self.now = self.lives
        name = next(self.names)
        self.tell(f"snapshot {name}")
        self.group_task(name=name)
        for life in self.lives:
            life.model.take(name, False)
        return True

    def group_revert(self) -> bool:
        names = self.shared_names()
        if not names:
            return False
        self.now = self.lives
        name = self.random.choice(names)
        keep = next(self.names) if self.random.random() < 0.4 else None
        self.tell(f"revert to {name}, keeping the present as {keep}")
        self.group_task(name=name, state="reverted", keep_present_as=keep)
        for life in self.lives:
            if keep:
                life.model.take(keep, False)
            life.model.revert(name)
            if life.model.running:
                life.guest.wait_ready()
        return True

    def group_remove(self) -> bool:
        names = self.shared_names()
        if not names:
            return False
        self.now = self.lives
        name = self.random.choice(names)
        self.tell(f"remove {name}")
        answers = self.group_task(name=name, state="absent")["snapshots"]
        assert [bool(one["layer_kept_for"]) for one in answers] == [life.model.remove(name) for life in self.lives]
        return True

    # --- what must be true

    def check(self) -> None:
        """Compare guest, libvirt and files with the model."""
        guest, model = self.guest, self.model
        assert guest.is_running() == model.running
        assert ways.read(guest) == {model.content}
        assert ways.snapshots(guest) == {name: point.parent for name, point in model.points.items()}
        ways.assert_whole(guest)
        info = tasks.ok("snapshot_info", domain=guest.name)
        told = {one["name"]: one for one in info["snapshots"]}
        assert {name: one["parent"] for name, one in told.items()} == {
            name: point.parent for name, point in model.points.items()
        }
        assert [name for name, one in told.items() if one["current"]] == ([model.current] if model.current else [])
        assert all(one["bootable"] for one in told.values())
        assert {len(layers) for layers in info["chains"][guest.name].values()} == {len(model.chain(model.top))}

    def check_contents(self) -> None:
        """Every snapshot holds what the guest had written then."""
        for life in self.lives:
            for name, point in life.model.points.items():
                assert ways.content_of(life.guest, name) == {point.content}, name

    def end(self) -> None:
        """Remove every snapshot: the guests are what they were, on the images that they began with."""
        for life in self.lives:
            self.now = [life]
            for name in list(life.model.points):
                self.task(name=name, state="absent")
            tasks.ok("blockcommit", domain=life.guest.name)
            assert ways.read(life.guest) == {life.model.content}
            ways.assert_whole(life.guest)
            assert ways.files(life.guest) == {path.name for path in life.guest.images.values()}

    def sweep(self) -> None:
        """After a failure: what can go goes, so that the next history does not fail for this one's remains."""
        for life in self.lives:
            tasks.run("recover_domain", domain=life.guest.name)
            for name in ways.snapshots(life.guest):
                tasks.run("snapshot", domain=life.guest.name, name=name, state="absent", allow_restart=True)
            tasks.run("blockcommit", domain=life.guest.name)


@pytest.fixture(scope="module")
def guest(make_guest: Callable[..., Guest]) -> Guest:
    return make_guest(
        GuestSpec(
            "history",
            disks=(DiskSpec("vda", size=24 * MIB, writer=False), DiskSpec("vdb", size=16 * MIB, writer=False)),
        )
    )


@pytest.fixture(scope="module")
def partner(make_guest: Callable[..., Guest]) -> Guest:
    return make_guest(GuestSpec("partner", disks=(DiskSpec("vda", size=16 * MIB, writer=False),)))


def seeds() -> range:
    """The seed that is to be replayed, or all from the first to the last (``71-200``); else as many as the suite is large."""
    first, _to, last = os.environ.get("VMK_HISTORY_SEED", f"1-{SEQUENCES}").partition("-")
    return range(int(first), int(last or first) + 1)


@pytest.mark.parametrize("seed", seeds())
def test_a_random_history_is_what_the_model_says(
    guest: Guest, host: TestHost, seed: int, request: pytest.FixtureRequest
) -> None:
    guests = [guest] if seed % 2 else [guest, request.getfixturevalue("partner")]
    for one in guests:
        if not one.is_running():
            one.start()
    history = History(guests, host, seed)
    try:
        history.run(STEPS)
        history.check_contents()
        history.end()
    except BaseException:
        print(f"seed {seed}:", *history.told, sep="\n  ")
        history.sweep()
        raise
