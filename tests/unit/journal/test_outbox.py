"""Unsent messages: order, memory limit, backlog."""

from pathlib import Path

import pytest

from schemas import codec
from schemas.envelopes import EventKind
from tests.unit.journal.journals import opened
from worker.journal import memory, outbox


async def test_rows_beyond_the_cache_are_read_from_the_file_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "OUT_CACHE", 4)
    seen: list[int] = []
    async with opened(tmp_path) as journal:
        for _ in range(11):
            await journal.records.event(EventKind.DRIFT)
        while rows := await journal.outbox.pending("event", 3):
            seen += [codec.decode_event(row.payload).seq for row in rows]
            journal.outbox.sent(rows)
            if len(seen) in (3, 12):
                await journal.records.event(EventKind.DRIFT)

        assert seen == list(range(1, 14))
        assert journal.outbox.depth == 0
    async with opened(tmp_path) as journal:
        assert await journal.outbox.pending("event", 3) == []


async def test_a_backlog_is_reported_until_a_tenth_of_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BACKLOG_ROWS", 10)
    told: list[bool] = []
    async with opened(tmp_path) as journal:
        journal.store.watch(lambda: told.append(journal.outbox.backlogged))
        for _ in range(11):
            await journal.records.event(EventKind.DRIFT)
        assert (journal.outbox.backlogged, told) == (True, [True])
        journal.outbox.sent(await journal.outbox.pending("event", 1))
        assert journal.outbox.backlogged
        journal.outbox.sent(await journal.outbox.pending("event", 2))
        assert (journal.outbox.backlogged, told) == (False, [True, False])
