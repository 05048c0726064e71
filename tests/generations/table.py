# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Write the table of docs/generations.md from what the runs of tests/generations found: ``python tests/generations/table.py``.

A run is ``{versions: {system, libvirt, qemu, python}, day, whole, acceleration, rows: {row: {outcome, note, seconds}}}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / ".cache" / "results" / "generations"
PAGE = ROOT / "docs" / "generations.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
FAILS, NOT_TRIED = "**fails**", "not tried"
GUESTS = {"kvm": "guests with KVM", "qemu": "emulated guests"}


def joined(earlier: dict[str, Any] | None, run: dict[str, Any]) -> dict[str, Any]:
    """What is known of a release after a run of it.

    A whole run begins anew, so that what was removed or renamed is forgotten. A selection replaces its rows of what ran earlier
    on the same versions, and the day stays.
    """
    if run["whole"] or earlier is None or earlier["versions"] != run["versions"]:
        return run
    return {**earlier, "rows": earlier["rows"] | run["rows"]}


def table(found: list[dict[str, Any]]) -> str:
    """The table of these runs, oldest libvirt first, as Markdown."""
    found = sorted(found, key=lambda run: [int(part) for part in run["versions"]["libvirt"].split(".")])
    columns = [
        f"{run['versions']['system']}: libvirt {run['versions']['libvirt']}, QEMU {run['versions']['qemu']}, "
        f"Python {run['versions']['python']}"
        for run in found
    ]
    rows = list(dict.fromkeys(row for run in found for row in run["rows"]))
    return "\n".join(
        [
            _line("", columns),
            "|---" * (len(columns) + 1) + "|",
            *(_line(row, [_outcome(run["rows"].get(row)) for run in found]) for row in rows),
            _line("all of it took", [_time(run) for run in found]),
            _line("run on", [run["day"] + ("" if run["whole"] else ", in part") for run in found]),
        ]
    )


def _line(head: str, cells: list[str]) -> str:
    return f"| {' | '.join([head, *cells])} |"


def _outcome(row: dict[str, Any] | None) -> str:
    if row is None or row["outcome"] == "skipped":
        return NOT_TRIED
    return (row["note"] or "works") if row["outcome"] == "passed" else FAILS


def _time(run: dict[str, Any]) -> str:
    seconds = round(sum(row["seconds"] for row in run["rows"].values()))
    return f"{seconds // 60} min {seconds % 60:02} s, {GUESTS[run['acceleration']]}"


def main() -> int:
    """Rewrite the page; fails when a run found something that fails."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not found:
        print(f"{RESULTS} has no results: make test-nested makes them", file=sys.stderr)
        return 1
    before, _begin, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    text = table(found)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    print(text)
    return 1 if FAILS in text else 0


if __name__ == "__main__":
    sys.exit(main())
