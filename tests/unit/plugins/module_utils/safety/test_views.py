# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Views: which file is meant by a path inside one. The mounts are tested where there is a hypervisor."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.domain_model import Layer
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.hypervisor.qemu_img import run
from ansible_collections.vmkeeper.libvirt.plugins.module_utils.safety import host_graph, places, views


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "views"
    path.mkdir()
    monkeypatch.setattr(places, "VIEWS", str(path))
    return path


def test_a_path_inside_a_view_means_the_file_that_it_shows(directory: Path) -> None:
    (directory / "one.origin").symlink_to("/srv/backup/domain")
    assert views.origin_of(f"{directory}/one/point/vda.qcow2") == "/srv/backup/domain/point/vda.qcow2"
    assert views.origin_of(f"{directory}/one") == "/srv/backup/domain"
    assert host_graph.canonical(f"{directory}/one/point/vda.qcow2") == "/srv/backup/domain/point/vda.qcow2"


def test_other_paths_mean_themselves(directory: Path) -> None:
    for path in ("/srv/vda.qcow2", f"{directory}/unknown/vda.qcow2", f"{directory}-not/one/x"):
        assert views.origin_of(path) == path


def test_a_view_that_was_never_opened_is_not_open_and_can_be_closed(directory: Path) -> None:
    assert not views.is_open("one")
    views.close_view("one")


def test_the_layers_below_a_view_that_is_not_open_are_still_known(directory: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for point in ("p1", "p2"):
        (repository / point).mkdir(parents=True)
    run(["create", "-q", "-f", "qcow2", str(repository / "p1/vda.qcow2"), "1M"], doing="test")
    below = ["-F", "qcow2", "-b", "../p1/vda.qcow2"]
    run(["create", "-q", "-f", "qcow2", "-u", *below, str(repository / "p2/vda.qcow2"), "1M"], doing="test")
    (directory / "one.origin").symlink_to(repository)
    seen = f"{directory}/one/p2/vda.qcow2"
    overlay = tmp_path / "overlay.qcow2"
    run(["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", seen, str(overlay), "1M"], doing="test")
    layers = host_graph.follow_names(Layer(str(overlay), "qcow2"))
    assert [host_graph.canonical(layer.path or "") for layer in layers] == [
        str(overlay),
        str(repository / "p2/vda.qcow2"),
        str(repository / "p1/vda.qcow2"),
    ]
    (repository / "p2/vda.qcow2").unlink()
    layers = host_graph.follow_names(Layer(str(overlay), "qcow2"))
    assert [layer.path for layer in layers] == [str(overlay), seen], "the missing one is still named"
