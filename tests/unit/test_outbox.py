"""From the journal to the bus: every message, events in order, also while the broker is down."""

import asyncio
import itertools
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas import codec
from schemas.envelopes import EventKind
from tests.fakes.bus import FakeBus
from tests.fakes.shell_worker import ShellWorker, shell_worker, start
from worker import outbox
from worker.bus.protocol import Unsendable
from worker.journal.transaction import Transaction
from worker.journal.writer import JournalFault
from worker.outbox import Outbox


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "BACKOFF_MAX_S", 0.02)


async def test_what_cannot_be_read_is_asked_for_with_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal can be written, and not read: no error of it ends or occupies the worker."""
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        pending, refused = worker.journal.outbox.pending, list[str]()

        async def unreadable(kind: str, limit: int) -> Any:
            refused.append(kind)
            raise JournalFault("cannot read the journal")

        monkeypatch.setattr(worker.journal.outbox, "pending", unreadable)
        await worker.journal.records.event(EventKind.DRIFT)
        turns = 0
        while len(refused) < 3:
            turns += 1
            await asyncio.sleep(0)
        assert turns > 20  # of the loop, for others

        monkeypatch.setattr(worker.journal.outbox, "pending", pending)
        await worker.bus.until(events=1)


async def attempts(worker: ShellWorker, count: int) -> None:
    """Wait until the outbox has tried `count` times to publish."""
    async with asyncio.timeout(20):
        while len(worker.bus.attempts) < count:
            worker.bus.changed.clear()
            await worker.bus.changed.wait()


async def test_events_are_sent_one_at_a_time_in_order_and_resent_with_the_same_id(
    tmp_path: Path,
) -> None:
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        worker.bus.lose_next_ack = True
        for _ in range(5):
            await worker.journal.records.event(EventKind.DRIFT)
        await worker.bus.until(events=5)
        await worker.outbox.drained()

        first = f"h1:{worker.journal.store.journal_id}:1"
        assert [e.seq for e in worker.events()] == [1, 2, 3, 4, 5]
        assert worker.bus.attempts[:2] == [first, first]
        assert len(worker.bus.attempts) == 6


async def test_an_absent_broker_delays_messages_but_loses_none(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start(), reply_to="_INBOX.1")
        await worker.bus.until_acked()
        worker.bus.up = False
        for _ in range(3):
            await worker.journal.records.event(EventKind.DRIFT)
        await attempts(worker, 6)
        worker.bus.up = True
        await worker.bus.until(replies=1, sent=1, events=4)
        await worker.outbox.drained()

        assert [e.seq for e in worker.events()] == [1, 2, 3, 4]
        assert worker.journal.outbox.depth == 0


def longest(_low: float, high: float) -> float:
    return high


async def test_a_reconnect_ends_the_backoff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BACKOFF_S", 1000.0)
    monkeypatch.setattr(outbox, "BACKOFF_MAX_S", 1000.0)
    monkeypatch.setattr(random, "uniform", longest)
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        worker.bus.up = False
        await worker.journal.records.event(EventKind.DRIFT)
        await attempts(worker, 1)
        worker.bus.up = True
        worker.outbox.wake()

        await worker.bus.until(events=1)


async def test_replies_do_not_wait_for_events(tmp_path: Path) -> None:
    class Slow(FakeBus):
        async def publish(self, subject: str, payload: bytes, **more: object) -> None:
            if ".evt." in subject:
                await asyncio.Event().wait()
            await super().publish(subject, payload, **more)  # type: ignore[arg-type]

    async with shell_worker(tmp_path / "j", Slow()) as worker:
        await worker.journal.records.event(EventKind.DRIFT)
        worker.send(start())
        await worker.reply()

        assert worker.events() == []


async def test_unconfirmed_messages_are_sent_by_the_next_worker(tmp_path: Path) -> None:
    bus = FakeBus()
    async with shell_worker(tmp_path / "j", bus, send=False) as worker:
        worker.send(start(), reply_to="_INBOX.1")
        await worker.bus.until_acked()
        await worker.lanes.idle()
        machine = worker.machine
    assert bus.published == []

    async with shell_worker(tmp_path / "j", bus, machine) as worker:
        await bus.until(replies=1, sent=1, events=1)

        assert codec.decode_reply(bus.sent[0][1]).id == "c1"
    async with shell_worker(tmp_path / "j", bus, machine) as worker:
        assert worker.journal.outbox.depth == 0


@pytest.mark.parametrize("kind", ["reply", "direct", "dead", "event"])
async def test_a_row_that_the_bus_never_accepts_holds_up_no_other(
    tmp_path: Path, kind: str
) -> None:
    async with shell_worker(tmp_path / "j", send=False, consume=False) as worker:
        bad = {"reply": "r.reply.bad", "direct": "bad", "dead": "r.dead.bad", "event": "r.evt.bad"}

        class Picky(FakeBus):
            async def publish(self, subject: str, payload: bytes, **more: Any) -> None:
                if subject.endswith("bad"):
                    raise Unsendable("never") if self.up else RuntimeError("a bug")
                await super().publish(subject, payload, **more)

            async def send(self, subject: str, payload: bytes) -> None:
                if subject == "bad":
                    raise Unsendable("never")
                await super().send(subject, payload)

        bus = Picky()

        def queue_three(tx: Transaction) -> None:
            for n, name in enumerate(("bad", "bad", "ok")):
                subject = bad[kind].replace("bad", name)
                worker.journal.store.source.queue(tx, kind, subject, b"x", msg_id=str(n))

        await worker.journal.store.writer.submit(queue_three)
        sending = asyncio.create_task(Outbox(bus, worker.journal).run())
        try:
            async with asyncio.timeout(20):
                while not (bus.published or bus.sent):
                    bus.changed.clear()
                    await bus.changed.wait()
                while worker.journal.outbox.depth != 2:
                    await worker.journal.outbox.wait_sent()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

        assert worker.journal.outbox.held == 2
        worker.journal.outbox.release()
        assert [row.subject for row in await worker.journal.outbox.pending(kind, 9)] == [
            bad[kind]
        ] * 2


async def test_a_held_row_is_sent_once_the_bus_accepts_it(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.max_payload = 10
        worker.send(start())
        await worker.bus.until_acked()
        async with asyncio.timeout(20):
            while worker.journal.outbox.held != 2:  # the reply and the event
                await worker.journal.outbox.wait_sent()
        await worker.outbox.drained()  # a shutdown does not wait for them
        worker.bus.max_payload = 1_000_000
        worker.outbox.wake()

        await worker.bus.until(replies=1, events=1)
        assert worker.journal.outbox.held == 0


@pytest.mark.parametrize("size", [1_048_577, 2_000_000])
async def test_a_dead_letter_larger_than_the_bus_accepts_is_cut_and_marked(
    tmp_path: Path, size: int
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command("hostd.v1.test.h1.cmd.host", b"\xc1" * size)
        await worker.bus.until_acked()
        await worker.bus.until(replies=1)
        await worker.outbox.drained()

        (dead,) = worker.bus.dead()
        assert worker.bus.max_payload - 2048 < len(dead.payload) < worker.bus.max_payload
        assert dead.headers["Hostd-Truncated"] == str(size)


async def test_an_outage_is_logged_once_and_none_before_the_first_connection(
    tmp_path: Path,
) -> None:
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        with capture_logs() as logs:
            worker.bus.up = False
            await worker.journal.records.event(EventKind.DRIFT)
            await attempts(worker, 3)
            before = list(logs)

            for _ in range(2):  # two outages
                worker.bus.up = True
                worker.outbox.wake()
                await worker.outbox.drained()
                worker.bus.up = False
                tried = len(worker.bus.attempts)
                await worker.journal.records.event(EventKind.DRIFT)
                await attempts(worker, tried + 3)

    assert before == []
    assert [line["event"] for line in logs] == ["outbox.send_failed"] * 2


async def test_a_direct_reply_is_on_its_way_before_anything_else_sees_the_commit(
    tmp_path: Path,
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        seen: list[tuple[int, bool]] = []
        journal = worker.journal
        journal.store.on_commit(
            lambda tx: seen.append((len(worker.bus.sent), journal.commands.is_unfinished("c1")))
        )

        worker.send(start(), reply_to="_INBOX.1")
        await worker.bus.until(replies=1, sent=1, events=1)
        await worker.outbox.drained()

        assert (1, True) in seen
        assert len(worker.bus.sent) == 1
        assert journal.outbox.depth == 0


async def test_direct_replies_keep_their_order_behind_those_that_wait(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j", FakeBus(max_payload=200)) as worker:
        outbox_of, source = worker.journal.outbox, worker.journal.store.source

        def queue(*subjects: str) -> Any:
            def do(tx: Transaction) -> None:
                for subject in subjects:
                    payload = b"x" * (300 if subject == "too.large" else 1)
                    source.queue(tx, "direct", subject, payload)

            return worker.journal.store.writer.submit(do)

        await queue("one", "too.large", "two")
        await worker.bus.until(sent=2)
        await queue("three")
        await worker.bus.until(sent=3)

        assert [subject for subject, _ in worker.bus.sent] == ["one", "two", "three"]
        assert outbox_of.held == 1


@pytest.mark.parametrize("n", [-7, (1 << 63) - 1])
async def test_a_row_with_a_damaged_number_is_sent_and_holds_up_nothing(
    tmp_path: Path, n: int
) -> None:
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        worker.bus.up = False
        await worker.journal.records.event(EventKind.DRIFT)
    with sqlite3.connect(tmp_path / "j") as connection:
        connection.execute("UPDATE outbox SET n = ?", (n,))
    connection.close()

    async with shell_worker(tmp_path / "j", consume=False) as worker:
        await worker.journal.records.event(EventKind.DRIFT)
        await worker.bus.until(events=2)
        await worker.outbox.drained()


async def test_rows_that_are_counted_and_not_found_hold_up_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, turns_at_look = 0, list[int]()

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with shell_worker(tmp_path / "j", consume=False) as worker:
        pending = worker.journal.outbox.pending

        async def look(kind: str, limit: int) -> Any:
            turns_at_look.append(turns)
            return [] if len(turns_at_look) <= 20 else await pending(kind, limit)

        monkeypatch.setattr(worker.journal.outbox, "pending", look)
        other = asyncio.create_task(others())
        await worker.journal.records.event(EventKind.DRIFT)
        await worker.bus.until(events=1)
        other.cancel()

    assert all(earlier < later for earlier, later in itertools.pairwise(turns_at_look[:21]))
