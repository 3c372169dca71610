"""From the journal to the bus: every message, events in order, also while the broker is down."""

import asyncio
import random
from pathlib import Path

import pytest

from schemas import codec
from schemas.envelopes import EventKind
from tests.fakes.bus import FakeBus
from tests.fakes.shell_worker import ShellWorker, shell_worker, start
from worker import outbox


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "BACKOFF_MAX_S", 0.02)


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
