# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: vmkeeper.libvirt contributors
"""A real database under load, data and write-ahead log on two disks: every restore point comes up whole.

What the database acknowledged before a point must be in it, its books must balance, and amcheck must find every page and
index whole. It boots a whole Debian guest once for each point, so it runs with ``VMK_SCALE`` above 1 only (make test-long).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab.debian import DebianGuest
from lab.host import TestHost
from lab.waiting import until

from ansible_collections.vmkeeper.libvirt.tests.integration.backup.points import SCALE, ok

pytestmark = [
    pytest.mark.skipif(SCALE < 2, reason="boots whole Debian guests; VMK_SCALE=2 and above (make test-long)"),
    pytest.mark.timeout(5400),
]

LOAD = "systemd-run --quiet --unit=load --uid=postgres pgbench -n -c 4 -T 7200 bench"
AMCHECK = "/usr/lib/postgresql/*/bin/pg_amcheck"
COUNT = "SELECT count(*) FROM pgbench_history"
BOOKS = (
    "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
    " AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
    " AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
)


@dataclass(frozen=True)
class Kept:
    """A point, and how many transactions were acknowledged before it began and after it ended."""

    point: dict[str, Any]
    before: int
    after: int


@pytest.fixture
def database(host: TestHost) -> Iterator[DebianGuest]:
    """A running guest whose database is under load."""
    guest = DebianGuest(host, "lab-postgresql")
    try:
        guest.define()
        guest.start()
        assert guest.run(LOAD).rc == 0
        yield guest
    finally:
        guest.cleanup()


def test_every_point_of_a_database_under_load_is_whole(
    database: DebianGuest, make_repository: Callable[[], Path], host: TestHost
) -> None:
    repository = make_repository()
    kept = []
    for number, quiesce in enumerate(("required", "never", "required", "never")):
        wait_for_transactions(database)
        if number == 2:
            ok("snapshot", domain=database.name, name="before", quiesce="required")
        before = int(database.sql(COUNT))
        made = ok("backup", domain=database.name, repository=str(repository), quiesce=quiesce)["restore_point"]
        kept.append(Kept(made, before, int(database.sql(COUNT))))
        assert made["type"] == ("full" if number == 0 else "incremental"), made["reason"]
        assert made["consistency"] == ("filesystem" if quiesce == "required" else "crash")
        if number == 2:
            ok("blockcommit", domain=database.name)
    assert database.run("systemctl is-active load").output.strip() == "active"  # no statement of it ever failed
    assert database.run("systemctl stop load").rc == 0
    database.domain().destroy()

    for one in kept:
        restored = DebianGuest(host, "lab-postgresql-restored")
        restored.directory.mkdir()
        restored.directory.chmod(0o711)
        try:
            ok(
                "restore",
                repository=str(repository),
                id=one.point["id"],
                domain=restored.name,
                directory=str(restored.directory),
                state="running",
            )
            assert_whole(restored, one)
        finally:
            restored.cleanup()


def wait_for_transactions(guest: DebianGuest, more: int = 200) -> None:
    """Wait until the load has come further."""
    start = int(guest.sql(COUNT))
    until(lambda: int(guest.sql(COUNT)) >= start + more, "the load going on", 600)


def assert_whole(guest: DebianGuest, kept: Kept) -> None:
    """Nothing acknowledged is missing, nothing later is there, the books balance, pages and indexes are whole."""
    guest.wait_database()
    assert kept.before <= int(guest.sql(COUNT)) <= kept.after
    assert guest.sql(BOOKS) == "t"
    ran = guest.run(f"runuser -u postgres -- {AMCHECK} --heapallindexed --parent-check -d bench", 900)
    assert (ran.rc, ran.output) == (0, "")
    failed = guest.sql("SELECT sum(checksum_failures) FROM pg_stat_database")
    assert failed in ("", "0")
