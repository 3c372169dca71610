"""Unsent messages: order, memory limit, backlog."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from schemas import codec
from schemas.envelopes import EventKind
from schemas.records import Status
from tests.fakes.shell_worker import REF
from tests.unit.journal.journals import opened, record
from worker.journal import memory, outbox
from worker.journal.journal import Journal


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


def unsent(journal: Journal) -> tuple[int, int]:
    """Outbox rows and dirty states that the file has."""
    with sqlite3.connect(journal.store.path) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM outbox").fetchone()
        (states,) = connection.execute("SELECT count(*) FROM state WHERE dirty").fetchone()
    return rows, states


async def send_all(journal: Journal) -> None:
    """As the bus does."""
    journal.outbox.sent(await journal.outbox.pending("event", 10))
    for row in journal.outbox.dirty():
        journal.outbox.written(row.key, row.seq)


async def test_what_was_sent_is_noted_with_the_next_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SENT_S", 3600.0)  # never alone
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record())
        await send_all(journal)
        before = unsent(journal)
        await journal.records.put_instance(record(status=Status.STOPPED))

        assert (before, unsent(journal)) == ((1, 1), (1, 1))
        await send_all(journal)
        await journal.records.drop_instance(REF, None)
        await send_all(journal)
    async with opened(tmp_path) as journal:  # an orderly end notes it too
        assert unsent(journal) == (0, 0)
        assert journal.outbox.depth == 0


async def test_what_was_sent_is_noted_on_a_host_that_commits_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SENT_S", 0.0)
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record())
        await send_all(journal)

        async with asyncio.timeout(10):
            while unsent(journal) != (0, 0):
                await asyncio.sleep(0)
