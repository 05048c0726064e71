# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""What is built of Debian releases is built once, and of sid anew after a while."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from lab import releases

TODAY = datetime.date(2026, 3, 20)


@pytest.mark.parametrize(
    ("existing", "chosen"),
    [
        ([], "2026-03-20"),
        (["sid-other-2026-03-19", "sid-one", "lock"], "2026-03-20"),
        (["sid-one-2026-03-12"], "2026-03-20"),
        (["sid-one-2026-03-13"], "2026-03-13"),
        (["sid-one-2026-03-01", "sid-one-2026-03-15", "sid-one-2026-02-28"], "2026-03-15"),
    ],
)
def test_the_newest_build_is_used_while_it_is_new(existing: list[str], chosen: str) -> None:
    assert releases.newest("sid-one", existing, TODAY) == f"sid-one-{chosen}"


def test_use_keeps_a_build_of_a_stable_release_but_makes_none_of_sid_younger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = []

    def build(scratch: Path) -> Path:
        built.append(scratch)
        made = scratch / "made"
        made.mkdir()
        return made

    for suite, old in (("bookworm", "bookworm-one"), ("sid", "sid-one-2020-01-01")):
        (tmp_path / old).mkdir()
        first = releases.kept(tmp_path, suite, "one", build)
        assert releases.kept(tmp_path, suite, "one", build) == first
        assert (first.name == old) == (suite == "bookworm")
    assert len(built) == 1
    assert "building it anew" in capsys.readouterr().err
    # It may still be in use: it goes when nobody has used it for long, and what a killed build left at once.
    unused, abandoned = tmp_path / "sid-one-2020-01-01", tmp_path / "building-x"
    abandoned.mkdir()
    assert unused.exists()
    os.utime(unused, (0, 0))
    releases.kept(tmp_path, "bookworm", "two", build)
    assert not unused.exists()
    assert not abandoned.exists()
