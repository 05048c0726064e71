# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Points made without a guest: images written by qemu-io, whose content the test knows from a model in its memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup import digests, manifest, verifying
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.listing import Found
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.manifest import Point, StoredDisk
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.backup.repository import Repository, open_repository
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor import image_node, qemu_img
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.image_node import Passphrase
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import places

UUID = "8b2f4a3e-0000-4000-8000-00000000f01d"
NAME = "lab-built"
BLOCK = 65536


@dataclasses.dataclass
class Built:
    """A repository of one domain. ``contents``: id -> target -> what a guest would see."""

    path: Path
    contents: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    points: list[Point] = dataclasses.field(default_factory=list)
    passphrase: Passphrase | None = None
    #: Bytes of every disk beyond its last whole cluster; the fulls hold data there.
    tail: int = 0

    @property
    def repository(self) -> Repository:
        return open_repository(str(self.path), create=not self.contents)

    def image(self, identifier: str, target: str) -> Path:
        return self.path / UUID / identifier / f"{target}.qcow2"

    def add(
        self,
        rng: random.Random,
        parents: dict[str, str | None],
        *,
        grow: int = 0,
        blocks: int = 6,
        noise: bool = False,
        compression: str | None = None,
        **changes: object,
    ) -> str:
        """A point with a disk for each of ``parents``, changed in up to ``blocks`` places of up to four blocks.

        It is encrypted if the repository has a passphrase.
        """
        number = len(self.points) + 1
        identifier = f"202601{1 + number // 24:02d}T{number % 24:02d}0000Z-{number:04x}"
        directory = Path(self.repository.point_directory(UUID, identifier))
        directory.mkdir(parents=True)
        self.contents[identifier] = {}
        disks = [
            self._disk(rng, identifier, target, parent, grow, blocks, noise, compression)
            for target, parent in parents.items()
        ]
        increments = [disk for disk in disks if disk.parent]
        definition = _definition(parents)
        (directory / "domain.xml").write_text(definition)
        point = Point(
            id=identifier,
            sequence=number,
            domain=NAME,
            domain_uuid=UUID,
            created=f"2026-01-{1 + number // 24:02d}T{number % 24:02d}:00:00+00:00",
            type="incremental" if increments else "full",
            reason="made by hand",
            parent=increments[0].parent if increments else None,
            consistency="offline",
            disks=tuple(disks),
            files={"domain.xml": hashlib.sha256(definition.encode()).hexdigest()},
            stored_bytes=sum(disk.stored_bytes for disk in disks),
            changed_bytes=sum(disk.changed_bytes for disk in disks),
        )
        point = dataclasses.replace(point, **changes)  # type: ignore[arg-type]
        places.write_json(str(directory / "manifest.json"), manifest.to_json(point))
        self.points.append(point)
        return identifier

    def _disk(
        self,
        rng: random.Random,
        identifier: str,
        target: str,
        parent: str | None,
        grow: int,
        blocks: int,
        noise: bool,
        compression: str | None,
    ) -> StoredDisk:
        path = self.image(identifier, target)
        coded = compression is not None or self.passphrase is not None
        if coded:
            path = path.with_suffix(".plain")
        before = self.contents[parent][target] if parent else bytes(64 * BLOCK + self.tail)
        content = bytearray(before + bytes(grow * BLOCK))
        run = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if parent and not self.passphrase:
            run += ["-u", "-F", "qcow2", "-b", f"../{parent}/{target}.qcow2"]
        subprocess.run([*run, path, str(len(content))], check=True)
        commands = []
        if self.tail and not parent:
            commands += ["-c", f"write -P 7 {len(content) - self.tail} {self.tail}"]
            content[-self.tail :] = bytes([7]) * self.tail
        for number in range(blocks if parent else 3 * blocks):
            length = rng.randint(1, 4) * BLOCK
            # Nothing is taken over from an encrypted parent, which qemu-io could not open here.
            start = rng.randrange(0, len(content) - length, BLOCK if self.passphrase else 4096)
            if noise:
                data = rng.randbytes(BLOCK)
                one = path.with_name(f"{number}.noise")
                one.write_bytes(data)
                commands += ["-c", f"write -s {one} {start} {length}"]
                content[start : start + length] = data * (length // BLOCK)
            elif rng.random() < 0.2:
                commands += ["-c", f"write -z {start} {length}"]
                content[start : start + length] = bytes(length)
            else:
                value = rng.randint(1, 255)
                commands += ["-c", f"write -P {value} {start} {length}"]
                content[start : start + length] = bytes([value]) * length
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], check=True, stdout=subprocess.DEVNULL)
        for one in path.parent.glob("*.noise*"):
            one.unlink()
        self.contents[identifier][target] = bytes(content)
        if coded:
            self._code(path, parent, len(content), compression)
            path.unlink()
        os.chmod(self.image(identifier, target), 0o600)
        return self._described(identifier, target, parent, len(content), compression)

    def _code(self, plain: Path, parent: str | None, size: int, compression: str | None) -> None:
        source = image_node.Image(str(plain))
        target = image_node.Image(str(plain.with_suffix(".qcow2")), "qcow2", self.passphrase)
        link = f"../{parent}/{plain.stem}.qcow2" if parent else None
        qemu_img.create_layer(target, size, backing=link, compression=compression, milliseconds=10)
        if link:
            below = self._layers(parent, plain.stem)
            qemu_img.copy_layer(
                source, target, size, backing=link, below=below, compression=compression, doing="coding"
            )
        else:
            qemu_img.copy_chain([source], target, compression=compression, doing="coding")

    def _layers(self, identifier: str | None, target: str) -> list[image_node.Image]:
        """The images of a disk from that point down."""
        layers = []
        while identifier:
            layers.append(image_node.Image(str(self.image(identifier, target)), "qcow2", self.passphrase))
            holder = next(point for point in self.points if point.id == identifier).disk(target)
            identifier = holder.parent if holder else None
        return layers

    def _described(
        self, identifier: str, target: str, parent: str | None, size: int, compression: str | None
    ) -> StoredDisk:
        path = self.image(identifier, target)
        grown_from = len(self.contents[parent][target]) if parent else None
        layers = [image_node.Image(str(path), "qcow2", self.passphrase), *self._layers(parent, target)]
        extents = digests.extents_of(layers)
        if grown_from == size:
            grown_from = None
        with digests.content_of(layers, extents) as content:
            sums = digests.sums_of(content, extents, size, complete=not parent, grown_from=grown_from)
        digests.write_sums(str(path.with_suffix(".sums")), sums)
        own = [extent for extent in extents if extent.depth == 0]
        coded = compression is not None or self.passphrase is not None
        return StoredDisk(
            target,
            "incremental" if parent else "full",
            "made by hand",
            parent,
            size,
            path.stat().st_blocks * 512,
            sum(extent.length for extent in own if extent.data or parent),
            digests.metadata_digest(str(path), () if coded else extents),
            "qcow2",
            compression=compression,
            encryption=manifest.LUKS if self.passphrase is not None else None,
        )

    def copy(self, where: Path) -> Built:
        """The same repository elsewhere."""
        shutil.rmtree(where, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", self.path, where], check=True)
        return dataclasses.replace(self, path=where)

    # --- what is there, never through the product -------------------------------------------------

    def ids(self) -> list[str]:
        """The points that exist."""
        return sorted(path.parent.name for path in self.path.glob(f"{UUID}/*/manifest.json"))

    def assert_exact(self, story: object) -> None:
        """Every point whose manifest exists holds its instant's content, read by qemu-img alone."""
        for identifier in self.ids():
            for target, expected in self.contents[identifier].items():
                raw = self.path / "content.raw"
                subprocess.run([*self._reading(identifier, target), raw], check=True)
                found = hashlib.sha256(raw.read_bytes()).digest()
                raw.unlink()
                assert found == hashlib.sha256(expected).digest(), (identifier, target, story)

    def _reading(self, identifier: str, target: str) -> list[str | Path]:
        run: list[str | Path] = ["qemu-img", "convert", "-O", "raw"]
        if self.passphrase is None:
            return [*run, "-f", "qcow2", self.image(identifier, target)]
        key = self.path.parent / "key"
        key.write_bytes(self.passphrase.value)
        node: dict[str, object] | None = None
        chain = json.loads(
            subprocess.run(
                ["qemu-img", "info", "-U", "--backing-chain", "--output=json", self.image(identifier, target)],
                check=True,
                capture_output=True,
            ).stdout
        )
        for layer in reversed(chain):
            node = {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": layer["filename"]},
                "encrypt": {"format": "luks", "key-secret": "k"},
                "backing": node,
            }
        return [*run, "--object", f"secret,id=k,file={key}", "json:" + json.dumps(node)]

    def findings(self) -> list[str]:
        """What backup_verify would find, at its level structure."""
        history = self.repository.history(UUID)
        assert not history.broken
        return [
            finding.problem
            for point in history.points
            for finding in verifying.verify(self.repository, Found(history, point), "structure", self.passphrase)
        ]

    def assert_settled(self, expected: list[str]) -> None:
        """Exactly these points, nothing half done, and manifests that say what lies there."""
        assert self.ids() == sorted(expected)
        directory = self.path / UUID
        assert sorted(path.name for path in directory.iterdir()) == sorted(expected)
        history = self.repository.history(UUID)
        for point in history.points:
            names = sorted(path.name for path in (directory / point.id).iterdir())
            files = [name for disk in point.disks for name in (disk.file, disk.sums)]
            assert names == sorted(["manifest.json", "domain.xml", *files])
            assert point.type == ("incremental" if point.parents else "full")
            assert point.parent is None or point.parent in point.parents
            for disk in point.disks:
                assert disk.parent is None or disk.parent in expected
                if disk.metadata is None:
                    assert disk.stored_bytes == self.image(point.id, disk.target).stat().st_blocks * 512
            assert point.stored_bytes == sum(disk.stored_bytes for disk in point.disks)


def _definition(targets: Iterable[str]) -> str:
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/nowhere/{target}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
        for target in targets
    )
    return (
        f"<domain type='qemu'><name>{NAME}</name><uuid>{UUID}</uuid><memory>65536</memory>"
        f"<os><type arch='x86_64'>hvm</type></os><devices>{disks}</devices></domain>"
    )
