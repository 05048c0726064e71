# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""Write the table of docs/generations.md from what the runs of test_smoke.py found: ``python tests/generations/table.py``."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / ".cache" / "results" / "generations"
PAGE = ROOT / "docs" / "generations.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WORDS = {"passed": "works", "failed": "**fails**", "skipped": "not tried"}


def table(found: list[dict[str, Any]], day: str) -> str:
    """The table of these runs, oldest libvirt first, as Markdown."""
    found = sorted(found, key=lambda run: [int(part) for part in run["versions"]["libvirt"].split(".")])
    columns = [
        f"{run['versions']['system']}: libvirt {run['versions']['libvirt']}, QEMU {run['versions']['qemu']}, "
        f"Python {run['versions']['python']}"
        for run in found
    ]
    rows = list(dict.fromkeys(row for run in found for row in run["rows"]))
    lines = [f"Run on {day}.", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        outcomes = [WORDS[run["rows"].get(row, {"outcome": "skipped"})["outcome"]] for run in found]
        lines.append(f"| {row} | {' | '.join(outcomes)} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite the page; fails when a run found something that fails."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not found:
        print(f"{RESULTS} has no results: make test-nested makes them", file=sys.stderr)
        return 1
    before, _begin, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    text = table(found, datetime.now(timezone.utc).date().isoformat())
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    print(text)
    return 1 if "**fails**" in text else 0


if __name__ == "__main__":
    sys.exit(main())
