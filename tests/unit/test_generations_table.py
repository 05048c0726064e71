# Copyright: vmkeeper.libvirt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of docs/generations.md says what the last runs found, and of which day."""

from __future__ import annotations

import json

import pytest

from ansible_collections.vmkeeper.libvirt.tests.generations import table


def run_of(libvirt, day, *, whole=True, **outcomes):
    rows = {name: {"outcome": outcome, "note": "", "seconds": 40.4} for name, outcome in outcomes.items()}
    versions = {"system": "Debian", "libvirt": libvirt, "qemu": "10.0.0", "python": "3.13.5"}
    return {"versions": versions, "day": day, "whole": whole, "acceleration": "qemu", "rows": rows}


def test_a_whole_run_forgets_what_no_longer_exists():
    earlier = run_of("9.0.0", "2026-01-01", removed="passed", kept="passed")
    assert table.joined(earlier, run_of("9.0.0", "2026-02-02", kept="failed"))["rows"].keys() == {"kept"}


def test_a_selection_replaces_its_rows_and_stays_of_the_day_of_the_whole_run():
    earlier = run_of("9.0.0", "2026-01-01", one="failed", two="passed")
    found = table.joined(earlier, run_of("9.0.0", "2026-02-02", whole=False, one="passed"))
    assert {name: row["outcome"] for name, row in found["rows"].items()} == {"one": "passed", "two": "passed"}
    assert (found["day"], found["whole"]) == ("2026-01-01", True)
    assert table.joined(earlier, other := run_of("9.1.0", "2026-02-02", whole=False, one="passed")) == other
    assert table.joined(None, other) == other


def test_every_release_has_its_outcomes_its_time_and_its_day():
    newer = run_of("11.3.0", "2026-02-02", whole=False, one="failed")
    older = run_of("9.0.0", "2026-01-01", one="passed", two="passed")
    older["rows"]["two"]["note"] = "refused: a reason"
    lines = table.table([newer, older]).splitlines()
    assert lines[0].startswith("|  | Debian: libvirt 9.0.0, QEMU 10.0.0, Python 3.13.5 | Debian: libvirt 11.3.0, ")
    assert lines[2:] == [
        "| one | works | **fails** |",
        "| two | refused: a reason | not tried |",
        "| all of it took | 1 min 21 s, emulated guests | 0 min 40 s, emulated guests |",
        "| run on | 2026-01-01 | 2026-02-02, in part |",
    ]


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("failed", 1)])
def test_the_page_is_written_and_a_failure_is_one_of_the_command(tmp_path, monkeypatch, outcome, status):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    (tmp_path / "machine.json").write_text(json.dumps(run_of("9.0.0", "2026-01-01", one=outcome)))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "PAGE", page)
    assert table.main() == status
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n|  |")
    assert text.endswith(f"|\n{table.END}\nafter\n")
    assert "old" not in text
