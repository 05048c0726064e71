# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import host_graph
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety.host_graph import HostGraph, Reader, unneeded

WEB = Reader("domain", "web", "u1")
DB = Reader("domain", "db", "u2")
ONE = Reader("snapshot", "one", "u1", "web")

# base <- left <- top (web); base <- clone (db); one holds left; base <- stray
GRAPH = HostGraph(
    named={"/top": (WEB,), "/clone": (DB,), "/left": (ONE,)},
    below={"/top": "/left", "/left": "/base", "/clone": "/base", "/stray": "/base"},
)


def test_everybody_above_an_image_reads_it_and_an_image_that_nobody_names_stands_for_itself() -> None:
    assert set(GRAPH.readers("/base")) == {WEB, DB, ONE, Reader("file", "/stray")}
    assert set(GRAPH.readers("/left")) == {WEB, ONE}
    assert GRAPH.readers("/top") == (WEB,)


def test_strangers_are_readers_of_other_domains_and_of_none() -> None:
    assert set(GRAPH.strangers("/base", "u1")) == {DB, Reader("file", "/stray")}
    assert GRAPH.strangers("/left", "u1") == ()


def test_a_chain_ends_at_its_base_and_a_loop_ends_too() -> None:
    assert GRAPH.chain("/top") == ("/top", "/left", "/base")
    assert HostGraph(below={"/a": "/b", "/b": "/a"}).chain("/a") == ("/a", "/b")


def test_only_overlays_that_nobody_reads_are_unneeded_from_the_top_down() -> None:
    without = GRAPH.without([WEB])
    assert unneeded(without, ["/left", "/top", "/base"]) == ("/top",)
    assert unneeded(without.without([ONE]), ["/left", "/top", "/base"]) == ("/top", "/left")


def test_an_image_without_a_backing_file_is_never_unneeded() -> None:
    assert unneeded(HostGraph(), ["/base"]) == ()


# --- read from libvirt's own test driver and from files ---------------------------------------------------------------


def image(path: Path, backing: str | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    below = [] if backing is None else ["-u", "-F", "qcow2", "-b", backing]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, str(path), "1M"], check=True)
    return path


class Host:
    """Domains of the test driver that are only defined."""

    def __init__(self, connection, directory: Path) -> None:
        self.connection = connection
        self.directory = directory
        self.made: list = []

    def domain(self, name: str, path: Path):
        return self.define(name, "file", f"<source file='{path}'/>")

    def define(self, name: str, kind: str, source: str, image_format: str = "qcow2"):
        disk = f"<disk type='{kind}'><driver type='{image_format}'/>{source}<target dev='vda'/></disk>"
        handle = self.connection.defineXML(
            f"<domain type='test'><name>{name}</name><memory>8192</memory><os><type>hvm</type></os>"
            f"<devices>{disk}</devices></domain>"
        )
        self.made.append(handle)
        return handle

    def pool(self, *, active: bool) -> None:
        self.made.append(
            self.connection.storagePoolDefineXML(
                f"<pool type='dir'><name>stopped</name><target><path>{self.directory}</path></target></pool>"
            )
        )
        if active:
            self.made[-1].create()

    def readers(self, path: Path) -> set[str]:
        return {str(reader) for reader in host_graph.read_graph(self.connection).readers(str(path))}

    def end(self) -> None:
        for one in self.made:
            if one.isActive():
                one.destroy()
            for snapshot in one.listAllSnapshots() if hasattr(one, "listAllSnapshots") else ():
                snapshot.delete()
            one.undefine()
        self.connection.close()


@pytest.fixture
def host(tmp_path):
    libvirt = pytest.importorskip("libvirt")
    libvirt.registerErrorHandler(lambda *_: None, None)
    host = Host(libvirt.open("test:///default"), tmp_path)
    yield host
    host.end()


@pytest.fixture
def base(tmp_path) -> Path:
    return image(tmp_path / "base.qcow2")


@pytest.mark.parametrize("name", ["{}", "file:{}", 'json:{{"file.filename": "{}"}}', "blkdebug::{}"])
def test_a_base_is_read_by_the_domain_of_an_overlay_however_that_names_it(host: Host, base: Path, name: str) -> None:
    host.domain("clone", image(host.directory / "clones" / "clone.qcow2", name.format(base)))
    assert host.readers(base) == {"domain 'clone'"}


def test_an_image_of_nobody_reads_what_its_backing_name_mentions(host: Host, base: Path) -> None:
    host.domain("web", image(host.directory / "web.qcow2", str(base)))
    stray = image(host.directory / "stray.qcow2", f"blkdebug::{base}")
    assert host.readers(base) == {"domain 'web'", f"the image {stray}"}


def test_images_that_mention_each_other_end(host: Host, tmp_path: Path) -> None:
    one, two = tmp_path / "one.qcow2", tmp_path / "two.qcow2"
    image(one, f"blkdebug::{two}")
    image(two, f"blkdebug::{one}")
    host.domain("clone", one)
    assert "domain 'clone'" in host.readers(two)


def test_what_a_linked_image_stands_on_depends_on_the_link(host: Host, tmp_path: Path, base: Path) -> None:
    other = image(tmp_path / "data" / "base.qcow2")
    real = image(tmp_path / "data" / "real.qcow2", "base.qcow2")
    link = tmp_path / "link.qcow2"
    link.symlink_to(real)
    host.domain("linked", link)
    assert host.readers(base) == {"domain 'linked'"}
    host.domain("real", real)
    assert "domain 'real'" in host.readers(other)
    assert "domain 'linked'" in host.readers(base)


def test_a_base_is_read_by_whoever_names_it_by_another_link(host: Host, tmp_path: Path, base: Path) -> None:
    other = tmp_path / "other.qcow2"
    os.link(base, other)
    host.domain("clone", image(tmp_path / "clones" / "clone.qcow2", str(other)))
    host.domain("template", other)
    assert host.readers(base) == {"domain 'clone'", "domain 'template'"}
    graph = host_graph.read_graph(host.connection)
    assert [str(reader) for reader in graph.named_by(str(base))] == ["domain 'template'"]
    assert graph.children(str(base)) == (str(tmp_path / "clones" / "clone.qcow2"),)


def test_a_second_link_of_an_overlay_that_nobody_names_is_an_image_of_its_own(host: Host, base: Path) -> None:
    overlay = image(host.directory / "web.qcow2", str(base))
    host.domain("web", overlay)
    kept = host.directory / "kept.qcow2"
    os.link(overlay, kept)
    assert host.readers(base) == {"domain 'web'", f"the image {kept}"}


def test_a_guests_raw_disk_is_no_image_by_any_name(host: Host, tmp_path: Path, base: Path) -> None:
    raw = image(tmp_path / "raws" / "raw.img", str(base))
    os.link(raw, tmp_path / "other.img")
    host.define("web", "file", f"<source file='{raw}'/>", "raw")
    host.domain("beside", image(tmp_path / "beside.qcow2"))
    assert host.readers(base) == set()


def test_a_process_is_found_by_every_name_of_the_file_that_it_has_open(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.touch()
    os.link(one, two)
    with one.open() as stream, subprocess.Popen(["sleep", "60"], stdin=stream) as holder:
        try:
            found = host_graph.openers([str(one), str(two), str(tmp_path / "gone")], besides="")
        finally:
            holder.kill()
    assert {path: [str(reader) for reader in readers] for path, readers in found.items()} == {
        str(path): [f"process sleep ({holder.pid})"] for path in (one, two)
    }


@pytest.mark.parametrize("active", [False, True])
def test_a_volume_is_read_by_its_domain_and_by_its_snapshots_whether_the_pool_runs_or_not(
    host: Host, base: Path, active: bool
) -> None:
    host.pool(active=active)
    source = "<source pool='stopped' volume='base.qcow2'/>"
    template = host.define("template", "volume", source)
    assert host.readers(base) == {"domain 'template'"}
    xml = template.XMLDesc(0)
    host.domain("elsewhere", image(host.directory / "elsewhere" / "disk.qcow2"))
    snapshot = (
        "<domainsnapshot><name>one</name><state>shutoff</state><creationTime>1</creationTime>"
        "<disks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='/gone'/></disk></disks>"
        f"{xml}</domainsnapshot>"
    )
    template.snapshotCreateXML(snapshot, 1)
    assert host.readers(base) == {"domain 'template'", "snapshot 'one' of domain 'template'"}
