"""A disk that is full or faulty: no partial commit, no false answer, and recovery without help."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from handlers.errors import HostFault
from schemas.codes import Code
from schemas.envelopes import Command, EventKind
from schemas.requests import Request
from tests.fakes.shell_worker import FakeHandlers, ShellWorker, command, shell_worker, start, stop
from tests.unit.journal.journals import accept, events, opened, record
from worker.journal.admission import Verdict
from worker.journal.journal import Journal
from worker.journal.transaction import Transaction
from worker.journal.writer import JournalFault


async def set_pages(journal: Journal, pages: int) -> None:
    """Bound the size of the file, as a full disk does; in effect until it is reopened."""
    await journal.store.writer.read(
        lambda tx: tx.execute(f"PRAGMA max_page_count={pages}").fetchone(),
    )


async def fill(journal: Journal) -> int:
    """Write until the disk is full; returns how many events were committed."""
    for n in range(1000):
        try:
            await journal.records.event(EventKind.DRIFT, detail={"pad": "x" * 2000})
        except JournalFault:
            return n
    raise AssertionError("the file never filled up")


async def test_a_full_disk_is_a_typed_fault_and_commits_resume_when_it_has_room(
    tmp_path: Path,
) -> None:
    reported: list[bool] = []
    async with opened(tmp_path) as journal:
        journal.store.watch(lambda: reported.append(journal.store.writable))
        await journal.records.put_instance(record("a1"))
        await set_pages(journal, 1)
        written = await fill(journal)
        assert reported[:1] == [False]
        await asyncio.wait_for(journal.store.until_writable(), 10)
        await journal.records.put_instance(record("a2"))

        assert reported == [False, True]
        assert [e.seq for e in await events(journal)] == list(range(1, written + 3))
        assert journal.store.applied == journal.store.seq == written + 2
    async with opened(tmp_path) as journal:
        assert [e.seq for e in await events(journal)] == list(range(1, written + 3))


async def test_a_fault_fails_its_whole_commit_and_memory_matches_the_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record("a0"))

        def break_it(tx: Transaction) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        results = await asyncio.gather(
            journal.records.put_instance(record("a1")),
            journal.store.writer.submit(break_it),
            journal.records.put_instance(record("a2")),
            return_exceptions=True,
        )
        assert isinstance(results[1], JournalFault)
        assert isinstance(results[1], HostFault)
        await asyncio.wait_for(journal.store.until_writable(), 10)
        written = [name for name, n in (("a1", 0), ("a2", 2)) if results[n] is None]
        names = {"a0", *written}
        assert {r.ref.instance_id for r in journal.records.instances()} == names
    async with opened(tmp_path) as journal:
        assert {r.ref.instance_id for r in journal.records.instances()} == names


async def test_a_bug_in_one_part_does_not_fail_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:

        def bug(tx: Transaction) -> None:
            tx.execute("DELETE FROM instance")
            raise KeyError("bug")

        results = await asyncio.gather(
            journal.records.put_instance(record("a1")),
            journal.store.writer.submit(bug),
            journal.records.put_instance(record("a2")),
            return_exceptions=True,
        )

        assert [type(r) for r in results] == [type(None), KeyError, type(None)]
        assert journal.store.writable
    async with opened(tmp_path) as journal:
        assert len(journal.records.instances()) == 2


async def test_a_bug_where_nobody_waits_is_logged_and_what_was_done_before_it_is_done_once(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:

        def bug(tx: Transaction) -> None:
            tx.execute("DELETE FROM instance")
            raise KeyError("bug")

        with capture_logs() as logs:
            first = asyncio.create_task(journal.records.event(EventKind.DRIFT))
            await asyncio.sleep(0)
            journal.store.writer.later(bug)
            await journal.records.put_instance(record("a1"))
            await first

        assert [line["error"] for line in logs] == ["KeyError('bug')"]
        assert [e.seq for e in await events(journal)] == [1, 2]
    async with opened(tmp_path) as journal:
        assert len(journal.records.instances()) == 1


async def test_what_nobody_waits_for_is_committed_at_the_earliest_time_asked_for(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        both, done = asyncio.Event(), list[int]()
        later = journal.store.writer.later

        later(lambda tx: done.append(1), within_s=3600.0)
        later(lambda tx: done.append(2), apply=lambda _: both.set(), within_s=0.0)

        async with asyncio.timeout(10):
            await both.wait()
        assert done == [1, 2]


async def test_reads_work_while_nothing_can_be_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        assert (await accept(journal, command(start()))).verdict is Verdict.NEW
        await set_pages(journal, 1)
        await fill(journal)

        assert not journal.store.writable
        assert await journal.commands.result("other") is None
        assert journal.commands.is_unfinished("c1")


def break_commits(worker: ShellWorker, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on no commit succeeds, until the function returned is called."""
    broken = True
    writer = worker.journal.store.writer
    transact = writer._transact

    def breaking(connection: sqlite3.Connection, batch: list[Any]) -> Transaction:
        if broken:
            raise sqlite3.OperationalError("database or disk is full")
        return transact(connection, batch)

    def mend() -> None:
        nonlocal broken
        broken = False

    monkeypatch.setattr(writer, "_transact", breaking)
    return mend


async def until_paused(worker: ShellWorker) -> None:
    async with asyncio.timeout(10):
        while not worker.bus.paused:
            worker.bus.changed.clear()
            await worker.bus.changed.wait()


async def test_while_the_journal_cannot_commit_the_stream_keeps_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        mend = break_commits(worker, monkeypatch)
        with pytest.raises(JournalFault):
            await worker.journal.store.put_meta("a", "b")
        worker.send(start())
        await until_paused(worker)
        assert (len(worker.bus.commands), worker.replies()) == (1, [])

        mend()
        reply = await worker.reply()
        await worker.bus.until_acked()
        assert (reply.code, worker.bus.paused) == (Code.OK, False)
        assert worker.machine.things.made == ["acme/web/a1"]


@pytest.mark.parametrize("request_", [start(), stop()])
async def test_a_command_whose_commit_fails_has_no_effect_until_it_is_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: Request
) -> None:
    machine = FakeHandlers()
    machine.things.there.add("acme/web/a1")
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        mend = break_commits(worker, monkeypatch)
        worker.send(request_)
        await until_paused(worker)
        assert machine.things.there == {"acme/web/a1"}
        assert machine.things.made == []
        assert (len(worker.bus.commands), worker.journal.commands.unfinished()) == (1, [])

        mend()
        reply = await worker.reply()
        await worker.bus.until_acked()
        assert reply.code is Code.OK
        assert reply.changed is (request_ == stop())
        assert worker.meters.done == [(request_.kind, Code.OK)]
        assert len(worker.bus.replies()) == 1


async def test_a_running_command_waits_for_the_disk_and_then_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        await machine.at_gate.wait()
        mend = break_commits(worker, monkeypatch)
        gate.set()
        await until_paused(worker)
        assert worker.replies() == []

        mend()
        reply = await worker.reply()
        assert (reply.code, reply.attempts, machine.things.made) == (Code.OK, 1, ["acme/web/a1"])


def commit_in_vain(worker: ShellWorker, monkeypatch: pytest.MonkeyPatch, *, whole: bool) -> None:
    """The next commit is in the file, and fails: in its sync, or if `whole` in the reading after
    a commit that failed with nothing in the file."""
    writer = worker.journal.store.writer
    transact, load = writer._transact, writer._load

    def failing(connection: sqlite3.Connection, batch: list[Any]) -> Transaction:
        monkeypatch.setattr(writer, "_transact", transact)
        if not whole:
            transact(connection, batch)
        raise sqlite3.OperationalError("disk I/O error")

    def unreadable(connection: sqlite3.Connection) -> Any:
        monkeypatch.setattr(writer, "_load", load)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(writer, "_transact", failing)
    if whole:
        monkeypatch.setattr(writer, "_load", unreadable)


def known_as(command_id: str) -> bool:
    """The answer of a journal whose file may have the ID."""
    return command_id != ""


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("known", [False, True])
async def test_a_command_whose_failed_commit_is_in_the_file_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, whole: bool, known: bool
) -> None:
    """With `known` the file may have its ID, so it is queued only after its commit."""
    async with shell_worker(tmp_path / "j") as worker:
        if known:
            monkeypatch.setattr(worker.journal.commands, "_is_stored", known_as)
        commit_in_vain(worker, monkeypatch, whole=whole)
        worker.send(start(), reply_to="_INBOX.1")
        reply = await worker.reply()
        await worker.bus.until_acked()
        await worker.bus.until(sent=1)
        await worker.outbox.drained()

        assert worker.bus.sent_to("_INBOX.1") == [worker.bus.replies()[0].payload]
        assert (reply.code, reply.changed, worker.machine.things.made) == (
            Code.OK,
            True,
            ["acme/web/a1"],
        )
        assert worker.meters.done == [("StartInstance", Code.OK)]
        assert worker.lanes.counts() == {"busy": 0, "waiting": 0}


def fail_behind(
    worker: ShellWorker, monkeypatch: pytest.MonkeyPatch, arrive: Callable[[], None]
) -> None:
    """The next commit fails once what arrives meanwhile waits for the commit behind it."""
    writer = worker.journal.store.writer
    transact, loop = writer._transact, asyncio.get_running_loop()

    def failing(connection: sqlite3.Connection, batch: list[Any]) -> Transaction:
        monkeypatch.setattr(writer, "_transact", transact)
        loop.call_soon_threadsafe(arrive)
        wait_until(lambda: not writer._queue.empty())
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(writer, "_transact", failing)


def ran(worker: ShellWorker) -> list[str]:
    """The commands that ran, by their first run."""
    return list(dict.fromkeys(command_id for command_id, _ in worker.machine.runs))


def wait_until(true: Callable[[], bool]) -> None:
    """In a thread."""
    until_s = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.001)


@pytest.mark.parametrize("known", [False, True])
async def test_what_waits_behind_a_commit_that_fails_does_not_overtake_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        if known:
            monkeypatch.setattr(worker.journal.commands, "_is_stored", known_as)
        fail_behind(worker, monkeypatch, lambda: worker.send(stop(), "c2"))
        worker.send(stop(), "c1")
        await worker.bus.until_acked()
        await worker.bus.until(replies=2)

        assert ran(worker) == ["c1", "c2"]


@pytest.mark.parametrize("writable", [False, True])
async def test_what_arrives_while_a_failed_commit_waits_does_not_overtake_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, writable: bool
) -> None:
    """It arrives when the journal cannot be written, or when it just can again."""
    async with shell_worker(tmp_path / "j") as worker:
        store, sent = worker.journal.store, list[str]()

        def changed() -> None:
            if store.writable is writable and not sent:
                sent.append("c2")
                worker.send(stop(), "c2")

        store.watch(changed)
        fail_behind(worker, monkeypatch, lambda: worker.send(stop("a2"), "other"))
        worker.send(stop(), "c1")
        await worker.bus.until_acked()
        await worker.bus.until(replies=3)

        assert [each for each in ran(worker) if each != "other"] == ["c1", "c2"]


async def test_what_is_in_order_is_not_taken_while_nothing_can_be_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        writer, done = journal.store.writer, list[int]()
        await set_pages(journal, 1)
        await fill(journal)
        assert not writer.writable

        with pytest.raises(JournalFault, match="before this one failed"):
            await writer.submit(lambda tx: done.append(1), in_order=True)
        assert done == []


async def test_a_message_that_intake_gives_up_holds_up_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        take_in, failures = worker.journal.commands.take_in, iter([JournalFault("no"), KeyError()])

        async def failing(command: Command, **more: Any) -> Any:
            if command.id == "c1" and (failure := next(failures, None)) is not None:
                if isinstance(failure, JournalFault):
                    worker.send(stop(), "c2")
                raise failure
            return await take_in(command, **more)

        monkeypatch.setattr(worker.journal.commands, "take_in", failing)
        worker.send(stop(), "c1")
        assert (await worker.reply("c2")).code is Code.OK
        assert list(worker.bus.commands) == [1]  # c1 stays in the stream


async def test_a_callback_that_raises_holds_up_nobody_who_waits_for_the_commit(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:

        def fail(_: object) -> None:
            raise RuntimeError("the handler is closed")

        journal.store.on_commit(fail)
        with capture_logs() as logged:
            async with asyncio.timeout(30):
                await journal.records.event(EventKind.DRIFT)

    assert [line["event"] for line in logged] == ["journal.callback_failed"]


async def test_a_read_error_is_a_fault_of_the_journal(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:

        def read(tx: Transaction) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        with pytest.raises(JournalFault, match=r"cannot read the journal .*: disk I/O error"):
            await journal.store.writer.read(read)

        assert journal.store.writable
