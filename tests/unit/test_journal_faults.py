"""A disk that is full or broken: nothing half done, nobody told otherwise, and back by itself."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from handlers.errors import HostFault
from schemas.codes import Code
from tests.fakes.shell import command, shell, start
from tests.unit.test_journal import accept, events, opened, record
from worker.journal import Found, Journal
from worker.journal_writer import JournalFault, Transaction

ROOM = 2**30


async def set_pages(journal: Journal, pages: int) -> None:
    """Bound the file's size, as a full disk would. Forgotten by SQLite when it opens anew."""
    await journal._writer.read(
        lambda tx: tx.execute(f"PRAGMA max_page_count={pages}").fetchone(),
    )


async def fill(journal: Journal) -> int:
    """Write until the disk is full; returns how many events were committed."""
    for n in range(1000):
        try:
            await journal.event("audit", detail={"pad": "x" * 2000})
        except JournalFault:
            return n
    raise AssertionError("the file never filled up")


async def test_a_full_disk_is_a_typed_fault_and_heals_by_itself(tmp_path: Path) -> None:
    told: list[bool] = []
    async with opened(tmp_path) as journal:
        journal.watch(lambda: told.append(journal.writable))
        await journal.put_instance(record("a1"))
        await set_pages(journal, 1)
        written = await fill(journal)
        assert told[:1] == [False]
        await asyncio.wait_for(journal.until_writable(), 10)
        await journal.put_instance(record("a2"))

        assert told == [False, True]
        assert [e.seq for e in await events(journal)] == list(range(1, written + 3))
    async with opened(tmp_path) as journal:
        assert [e.seq for e in await events(journal)] == list(range(1, written + 3))


async def test_a_fault_fails_its_whole_commit_and_memory_follows_the_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.put_instance(record("a0"))

        def break_it(tx: Transaction) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        results = await asyncio.gather(
            journal.put_instance(record("a1")),
            journal._writer.submit(break_it),
            journal.put_instance(record("a2")),
            return_exceptions=True,
        )
        assert isinstance(results[1], JournalFault)
        assert isinstance(results[1], HostFault)
        await asyncio.wait_for(journal.until_writable(), 10)
        written = [name for name, n in (("a1", 0), ("a2", 2)) if results[n] is None]
        names = {"a0", *written}
        assert {r.ref.instance_id for r in journal.instances()} == names
    async with opened(tmp_path) as journal:
        assert {r.ref.instance_id for r in journal.instances()} == names


async def test_a_bug_in_one_part_fails_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:

        def bug(tx: Transaction) -> None:
            tx.execute("DELETE FROM instance")
            raise KeyError("bug")

        results = await asyncio.gather(
            journal.put_instance(record("a1")),
            journal._writer.submit(bug),
            journal.put_instance(record("a2")),
            return_exceptions=True,
        )

        assert [type(r) for r in results] == [type(None), KeyError, type(None)]
        assert journal.writable
    async with opened(tmp_path) as journal:
        assert len(journal.instances()) == 2


async def test_reads_go_on_while_nothing_can_be_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        assert (await accept(journal, command(start()))).kind is Found.NEW
        await set_pages(journal, 1)
        await fill(journal)

        assert not journal.writable
        assert await journal.result("other") is None
        assert journal.is_unfinished("c1")


async def test_while_the_journal_cannot_commit_the_stream_keeps_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shell(tmp_path / "j") as worker:
        broken = True

        def commit_fails(tx: Transaction) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        writer = worker.journal._writer
        transact = writer._transact
        monkeypatch.setattr(
            writer,
            "_transact",
            lambda *args: commit_fails(Transaction(*args[:1], 0, 0)) if broken else transact(*args),
        )
        with pytest.raises(JournalFault):
            await worker.journal.put_meta("a", "b")
        worker.send(start())
        async with asyncio.timeout(10):
            while not worker.bus.paused:
                worker.bus.changed.clear()
                await worker.bus.changed.wait()
        assert (len(worker.bus.commands), worker.replies()) == (1, [])

        broken = False
        reply = await worker.reply()
        await worker.bus.until_acked()
        assert (reply.code, worker.bus.paused) == (Code.OK, False)
        assert worker.machine.things.made == ["acme/web/a1"]
