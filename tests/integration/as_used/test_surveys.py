# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Every playbook as a job template whose survey sends all answers as text; what it did is looked at from outside."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lab import evidence
from lab.ansible import CHECKOUT
from lab.guest import DiskSpec, Guest, GuestSpec
from lab.spec import MIB

from ansible_collections.vmkeeper.libvirt.tests.integration.as_used.runner import Controller
from ansible_collections.vmkeeper.libvirt.tests.integration.conftest import GuestFactory


@pytest.fixture(scope="module")
def server(module_guest_factory: GuestFactory) -> Guest:
    """A machine that runs."""
    return module_guest_factory(GuestSpec("server", vcpus=1, max_vcpus=2, disks=(DiskSpec("vda", size=64 * MIB),)))


@pytest.fixture(scope="module")
def archive(module_guest_factory: GuestFactory) -> Guest:
    """A machine that is shut off."""
    disks = tuple(DiskSpec(target, size=8 * MIB, fs=None, writer=False) for target in ("vda", "vdb"))
    return module_guest_factory(GuestSpec("archive", disks=disks), start=False)


def test_all_playbooks_are_tried_here() -> None:
    calls = re.findall(r'controller\.(?:run|succeed|launch)\(\s*"(\w+)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(calls) == {path.stem for path in (CHECKOUT / "playbooks").glob("*.yml")}


def test_snapshot_and_revert_and_flatten(controller: Controller, server: Guest, archive: Guest) -> None:
    server.write_file("/disk/vda/kept", b"before")
    both = f"{server.name}, {archive.name}"
    unsaid = dict.fromkeys(("target", "state", "quiesce", "allow_restart", "keep_present_as"), "")
    job = controller.succeed("snapshot", domains=f"{both},", snapshot="before-upgrade", **unsaid)
    assert {item["msg"] for item in job.results("Tell what it is worth")} == {
        f"{server.name}: before-upgrade, consistency filesystem",
        f"{archive.name}: before-upgrade, consistency crash",
    }
    server.write_file("/disk/vda/kept", b"after")
    reverted = {"domains": server.name, "snapshot": "before-upgrade", "state": "reverted", "allow_restart": "false"}
    refused = controller.run("snapshot", **reverted)
    assert (refused.rc, refused.status) == (2, "failed")
    assert server.read_file("/disk/vda/kept") == b"after", "allow_restart was false"
    controller.succeed("snapshot", **{**reverted, "allow_restart": "yes"})
    server.wait_ready()
    assert server.read_file("/disk/vda/kept") == b"before"
    refused = controller.run("flatten", domains=both, keep="0")
    assert (refused.rc, refused.status) == (2, "failed")
    job = controller.succeed("flatten", domains=f"{both}, ", keep="", bandwidth="", allow_restart="")
    assert len(job.results("Tell how long the chains are")) == 3
    for guest in (server, archive):
        assert len(guest.chain("vda")) == 1
    evidence.check(archive.images["vda"])
    assert server.read_file("/disk/vda/kept") == b"before"


def test_backup_and_restore(controller: Controller, server: Guest, archive: Guest, launched: list[str]) -> None:
    repository = archive.directory / "repository"
    repository.mkdir(mode=0o711)
    survey = {
        "target": "hypervisors",
        "batch": "",
        "consistent_backup_repository": str(repository),
        "consistent_backup_domains": f"{server.name},{archive.name}",
        "consistent_backup_exclude_disks": "vdz, vdb,",
        "consistent_backup_exclude": server.name,
        "consistent_backup_groups": json.dumps([[server.name]]),
        "consistent_backup_tags": json.dumps({"ticket": "1234"}),
        "consistent_backup_min_age": "",
        "consistent_backup_description": "",
        "consistent_backup_verify": "digest",
        "consistent_backup_jobs_per_repository": "1",
        "consistent_backup_keep": json.dumps({"last": 3}),
    }
    job = controller.succeed("backup", **survey)
    points = [point for made in job.results("Back up") for point in made["restore_points"]]
    assert {(point["domain"], point["consistency"]) for point in points} == {
        (server.name, "filesystem"),
        (archive.name, "crash"),
    }
    assert all(point["tags"] == {"ticket": "1234"} for point in points)
    assert not list(repository.glob("*/*/vdb.*")), "a disk that one of the two has was to be left out"
    assert [proof["verified"] for proof in job.results("Prove the points that no proof has passed yet")] == [True, True]

    unsaid = ("type", "quiesce", "tags", "compression", "verify", "keep", "fold", "jobs_per_repository")
    empty = {f"consistent_backup_{name}": "" for name in unsaid}
    kept = controller.succeed("backup", **{**survey, **empty, "consistent_backup_min_age": "1d"})
    assert not any(made["changed"] for made in kept.results("Back up"))
    wrong = controller.run("backup", **{**survey, "consistent_backup_keep": json.dumps({"latest": 3})})
    assert (wrong.rc, wrong.status) == (2, "failed")
    misspelt = {
        "target": "hypervisors",
        "consistent_backup_repository": str(repository),
        "consistent_backup_select": "[?name=='lab-nobody']",
    }
    nothing = controller.run("backup", **misspelt)
    assert (nothing.rc, nothing.status) == (2, "failed")
    assert "There is no domain to back up" in nothing.output
    controller.succeed("backup", **misspelt, consistent_backup_allow_none="yes")

    survey = {"target": "hypervisors", "repository": str(repository), "level": "", "boot_check": "", "passphrase": ""}
    proofs = controller.succeed("verify", domains=f"{server.name}, {archive.name}", **survey).results("Prove them")
    assert [proof["verified"] for proof in proofs] == [True, True]
    assert len(controller.succeed("verify", domains="", **survey).results("Prove them")) == 2
    refused = controller.run("verify", domains=f"{server.name}, lab-nobody", **survey)
    assert (refused.rc, refused.status) == (2, "failed")

    launched.append("lab-archive-again")
    survey = {
        "target": "hypervisors",
        "restore_domain_repository": str(repository),
        "restore_domain_source": archive.name,
        "restore_domain_id": "",
        "restore_domain_before": "",
        "restore_domain_name": "lab-archive-again",
        "restore_domain_directory": str(archive.directory),
        "restore_domain_network": "disconnected",
        "restore_domain_in_place": "false",
        "restore_domain_confirm": "",
        **{f"restore_domain_{name}": "" for name in ("mode", "wait", "state", "select", "bandwidth")},
        **{f"restore_domain_{name}": "" for name in ("verify", "passphrase", "boot_check")},
    }
    several = controller.run("restore", **{**survey, "target": ""})
    assert (several.rc, several.status) == (2, "failed")
    assert "This play has 2 hosts (" in several.output
    assert not several.results("Find the points"), "nothing was begun"
    controller.succeed("restore", **survey)
    restored = archive.directory / "lab-archive-again.vda.qcow2"
    assert evidence.same_content(restored, archive.images["vda"])


def test_scale(controller: Controller, server: Guest) -> None:
    survey = {
        "target": "hypervisors",
        "vertical_scale_domains": server.name,
        "scale_serial": "",
        "vertical_scale_vcpus": "2",
        "vertical_scale_disks": json.dumps([{"target": "vda", "size": "80M"}]),
        "vertical_scale_overcommit": "true",
        "vertical_scale_snapshot": "false",
        "vertical_scale_extra_sizes": json.dumps({"huge": {"vcpus": 64, "memory": "1T"}}),
    }
    job = controller.succeed("scale", **survey)
    (result,) = job.results("Change the size")
    assert {change["what"]: change["applied"] for change in result["changes"]} == {
        "vcpus": "live",
        "disk vda": "live",
        "filesystem vda": "live",
    }
    assert server.exec("nproc").text.strip() == "2"
    assert server.domain().blockInfo("vda")[0] == 80 * MIB
    assert not server.domain().listAllSnapshots(), "vertical_scale_snapshot was false"
    again = controller.succeed("scale", **survey)
    assert not again.results("Change the size")[0]["changed"]


def test_share_what_an_expression_chooses_again_while_it_runs(controller: Controller, server: Guest) -> None:
    library = server.directory / "library"
    survey = {
        "image_share_library": str(library),
        "image_share_select": f"[?name=='{server.name}']",
        "image_share_name": "{domain}-7",
        "image_share_with": "",
        "image_share_disks": "vda",
        "image_share_passphrase": "correct horse battery",
        "image_share_seal": "",
    }
    controller.succeed("share", **survey)
    manifest = library / f"{server.name}-7" / "manifest.json"
    (disk,) = json.loads(manifest.read_text(encoding="utf-8"))["disks"]
    assert disk["encryption"] == "luks"
    before = manifest.stat()

    # The same task again is about the image that is there: the handing over may have failed.
    again = controller.succeed("share", **{**survey, "image_share_with": "user:nobody"})
    assert "may be something else now" in str(again.results("Tell the age of an image that was there"))
    assert (manifest.stat().st_ino, manifest.stat().st_mtime) == (before.st_ino, before.st_mtime)
    assert "user:nobody" in acl(manifest)

    # One that was made in another way is not what is asked for.
    job = controller.run("share", **{**survey, "image_share_passphrase": "", "image_share_compression": "none"})
    assert job.status == "failed"


def test_several_machines_do_not_share_one_name(controller: Controller, archive: Guest, server: Guest) -> None:
    job = controller.run(
        "share",
        image_share_select=f"[?name=='{server.name}' || name=='{archive.name}']",
        image_share_name="golden",
        image_share_library=str(server.directory / "library-of-several"),
    )
    assert job.status == "failed"
    assert "need a name each" in job.output
    assert not (server.directory / "library-of-several").exists()


def test_share_and_launch(controller: Controller, archive: Guest, launched: list[str]) -> None:
    library = archive.directory / "library"
    survey = {
        "image_share_library": str(library),
        "image_share_domain": archive.name,
        "image_share_name": "golden",
        "image_share_quiesce": "never",
        "image_share_disks": "vda",
        "image_share_tags": json.dumps({"release": "7"}),
        "image_share_with": "user:nobody, group:nogroup,",
        **{f"image_share_{name}": "" for name in ("reference", "format", "compression", "bandwidth", "snapshot")},
    }
    library.mkdir()
    library.chmod(0o755)
    controller.succeed("share", **survey)
    assert {"user:nobody", "group:nogroup"} <= acl(library / "golden" / "manifest.json")
    assert library.stat().st_mode & 0o7777 == 0o755, "a library that was there keeps the mode that somebody chose"
    launched.append("lab-clone")
    survey = {
        "image_share_library": str(library),
        "image_share_name": "golden",
        "image_share_new_domain": "lab-clone",
        "image_share_directory": str(archive.directory),
        "image_share_vcpus": "2",
        "image_share_memory": "192M",
        **{
            f"image_share_{name}": ""
            for name in ("network", "reference", "mode", "virt_type", "registry_validate_certs")
        },
        "image_share_state": "defined",
    }
    controller.succeed("launch", **survey)
    definition = ElementTree.fromstring(archive.connection().lookupByName("lab-clone").XMLDesc())
    assert (definition.findtext("vcpu"), definition.findtext("memory")) == ("2", str(192 * 1024))
    (image,) = archive.directory.glob("lab-clone*vda*")
    assert evidence.same_content(image, archive.images["vda"])
    again = controller.succeed("launch", **survey)
    assert not again.results("Launch the image")[0]["changed"]


def acl(path: Path) -> set[str]:
    """Who is named in the file's ACL: user:NAME, group:NAME."""
    lines = subprocess.run(["getfacl", "-cp", path], capture_output=True, text=True, check=True).stdout.splitlines()
    return {":".join(line.split(":")[:2]) for line in lines if not line.startswith(("user::", "group::")) and line}
