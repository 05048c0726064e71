# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import subprocess

from ansible_collections.vmkeeper.libvirt.scripts import in_copy


def test_the_copy_holds_the_work_tree_as_git_would_commit_it(tmp_path, monkeypatch):
    monkeypatch.setattr(in_copy, "ROOT", tmp_path)
    monkeypatch.setattr(in_copy, "CACHE", tmp_path / ".cache")

    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    for name in (".gitignore", "changed.py", "deleted.py", "new.py", "ignored.log"):
        (tmp_path / name).write_text("*.log\n.cache\n", encoding="utf-8")
    (tmp_path / "run").symlink_to("changed.py")
    git("add", "changed.py", "deleted.py", "run", ".gitignore")
    (tmp_path / "changed.py").write_text("edited = True\n", encoding="utf-8")
    (tmp_path / "deleted.py").unlink()

    with in_copy.collection_copy() as root:
        assert root.parts[-3:] == ("ansible_collections", "vmkeeper", "libvirt")
        assert {path.name for path in root.iterdir()} == {".git", ".gitignore", "changed.py", "new.py", "run"}
        assert (root / "changed.py").read_text(encoding="utf-8") == "edited = True\n"
        assert (root / "run").is_symlink()
    assert not root.exists()
