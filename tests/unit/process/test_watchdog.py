"""The service manager gets signs of life while loop, journal and pull give them, and no longer."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.unit.journal.journals import opened
from worker.journal.journal import Journal
from worker.journal.transaction import Transaction
from worker.journal.writer import JournalFault
from worker.supervision.service_manager import ServiceManager
from worker.supervision.watchdog import JournalPart, Part, PullPart, Watchdog

EVERY_S = 0.001


class Manager(ServiceManager):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "60000000"})
        self.told: list[str] = []

    def _send(self, line: str) -> None:
        self.told.append(line)

    def take(self) -> list[str]:
        told, self.told = self.told, []
        return told


class Bus:
    """A bus whose pull loop turns when a test says so."""

    def __init__(self) -> None:
        self.turns: int | None = None
        self.connected = False


class Frozen:
    """Work for the journal's thread that does not return until `thaw`."""

    def __init__(self) -> None:
        self.begun, self._end = threading.Event(), threading.Event()

    def __call__(self, _: Any) -> None:
        self.begun.set()
        assert self._end.wait(60)

    def thaw(self) -> None:
        self._end.set()


@pytest_asyncio.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with opened(tmp_path) as journal:
        yield journal


@pytest.fixture
def frozen() -> Iterator[Frozen]:
    frozen = Frozen()
    yield frozen
    frozen.thaw()


def watchdog(manager: Manager, journal: Journal, bus: Any) -> Watchdog:
    parts: dict[str, Part] = {"journal": JournalPart(journal.store), "pull": PullPart(bus)}
    return Watchdog(manager, parts, lambda: "ready", every_s=EVERY_S, patience_s=3 * EVERY_S)


async def turns_until(dog: Watchdog, manager: Manager, line: str) -> list[str]:
    """What was told until the line, which comes within some turns."""
    async with asyncio.timeout(30):
        while line not in manager.told:
            await dog.turn()
    return manager.take()


async def test_while_all_move_the_manager_is_fed_and_told_a_new_status_once(
    journal: Journal,
) -> None:
    manager = Manager()
    dog = watchdog(manager, journal, Bus())

    await turns_until(dog, manager, "WATCHDOG=1")
    told = await turns_until(dog, manager, "WATCHDOG=1")

    assert "STATUS=ready" not in told


async def test_a_journal_thread_that_hangs_ends_the_feed_until_it_moves(
    journal: Journal, frozen: Frozen, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = Manager()
    dog = watchdog(manager, journal, Bus())
    await turns_until(dog, manager, "STATUS=ready")
    hanging = journal.store.writer.submit(frozen)
    await asyncio.to_thread(frozen.begun.wait)
    await dog.turn()  # may still have asked before
    manager.take()

    assert await turns_until(dog, manager, "STATUS=no sign of life: journal") == [
        "STATUS=no sign of life: journal"
    ]
    log = capsys.readouterr().out
    assert "watchdog.stuck" in log
    assert "test_watchdog.py" in log  # where it hangs

    frozen.thaw()
    await hanging
    assert "WATCHDOG=1" in await turns_until(dog, manager, "STATUS=ready")


async def test_a_pull_that_does_not_turn_ends_the_feed_and_one_that_has_not_begun_does_not(
    journal: Journal,
) -> None:
    manager, bus = Manager(), Bus()
    dog = watchdog(manager, journal, bus)
    await turns_until(dog, manager, "WATCHDOG=1")

    bus.turns = 7
    await dog.turn()
    manager.take()
    told = await turns_until(dog, manager, "STATUS=no sign of life: pull")
    assert told == ["STATUS=no sign of life: pull"]

    bus.turns = 8
    await turns_until(dog, manager, "STATUS=ready")


async def test_a_journal_that_cannot_commit_is_alive(journal: Journal) -> None:
    manager = Manager()
    dog = watchdog(manager, journal, Bus())

    def fault(_: Transaction) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(JournalFault):
        await journal.store.writer.submit(fault)
    assert not journal.store.writable

    await turns_until(dog, manager, "WATCHDOG=1")
