"""The floor of a command that changes something: two durable commits, alone and handed over."""

import sqlite3
from contextlib import closing
from pathlib import Path

from bench.raw.two_commits import OUTCOME_PAGES, PAGE_BYTES, two_commits


async def test_both_ways_commit_an_admission_and_then_an_outcome(tmp_path: Path) -> None:
    path = tmp_path / "floor.db"

    with two_commits(str(path)) as commits:
        assert await commits.alone_ms() > 0
        assert await commits.handed_over_ms() > 0

    with closing(sqlite3.connect(path)) as found:
        assert found.execute("SELECT length(data) FROM t").fetchall() == [
            (OUTCOME_PAGES * PAGE_BYTES,)
        ]
    assert not commits.thread.is_alive()
