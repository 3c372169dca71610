"""What a worker does while its state directory cannot be written: wait, and say so."""

import asyncio
import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handlers.errors import HostFault
from schemas.settings import MetricsSettings, PathSettings, Settings
from tests.unit.journal.journals import opened
from worker.descriptors import DescriptorReserve
from worker.journal import loading, schema
from worker.journal.writer import JournalFault
from worker.metrics import Metrics
from worker.supervision.service_manager import ServiceManager
from worker.supervision.state_directory import RETRIED, RETRY_S, StateDirectory


def failing(*errors: Exception) -> Callable[[], Any]:
    """An attempt that raises these in turn, then returns `opened`."""
    left = list(errors)

    async def attempt() -> str:
        if left:
            raise left.pop(0)
        return "opened"

    return attempt


def directory(
    tmp_path: Path,
    waits: list[float],
    stop: asyncio.Event,
    manager: ServiceManager | None = None,
) -> StateDirectory:
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    paths = PathSettings(state=str(tmp_path), run=str(run))
    settings = Settings(paths=paths, metrics=MetricsSettings(listen=""))

    async def wait(event: asyncio.Event, seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 20:
            event.set()

    return StateDirectory(
        settings,
        manager or ServiceManager({}),
        Metrics("1"),
        DescriptorReserve(4),
        stop,
        wait=wait,
    )


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", sorted(RETRIED))
async def test_it_is_waited_for_with_growing_pauses(tmp_path: Path, number: int) -> None:
    waits: list[float] = []
    made = directory(tmp_path, waits, asyncio.Event())

    found = await made.until(failing(*[os_error(number)] * 4, JournalFault("a journal")))

    assert found == "opened"
    assert tuple(waits) == RETRY_S[:5]
    assert made.checks() == {"recovered": False, "can_commit": False}
    assert "a journal" in made.finding().what


@pytest.mark.parametrize("error", [HostFault("a newer hostd wrote it"), os_error(errno.EACCES)])
async def test_what_only_an_operator_can_end_is_not_waited_for(
    tmp_path: Path, error: Exception
) -> None:
    waits: list[float] = []
    made = directory(tmp_path, waits, asyncio.Event())

    with pytest.raises(type(error)):
        await made.until(failing(error))
    assert waits == []


async def test_a_stop_ends_the_wait(tmp_path: Path) -> None:
    made = directory(tmp_path, [], asyncio.Event())

    assert await made.until(failing(*[os_error(errno.EIO)] * 50)) is None


class CountingManager(ServiceManager):
    """With a watchdog of 0.3 s; tells that it is fed."""

    def __init__(self) -> None:
        super().__init__({})
        self.fed = asyncio.Event()
        self.watchdog_s = 0.3

    def alive(self) -> None:
        self.fed.set()


async def test_the_watchdog_is_fed_while_an_attempt_takes_long(tmp_path: Path) -> None:
    manager = CountingManager()
    made = directory(tmp_path, [], asyncio.Event(), manager)

    tries = 0

    async def attempt() -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            assert not manager.fed.is_set()  # it has not said that it is ready
            raise os_error(errno.EIO)
        manager.fed.clear()
        async with asyncio.timeout(20):
            await manager.fed.wait()
        return "opened"

    assert await made.until(attempt) == "opened"


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), os_error(errno.EIO)])
async def test_a_journal_that_cannot_be_read_now_can_be_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        raise error

    monkeypatch.setattr(loading, "load", fail)
    with pytest.raises(JournalFault):
        async with opened(tmp_path):
            pass


async def test_a_damaged_journal_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(loading, "load", fail)
    with pytest.raises(HostFault, match="damaged") as caught:
        async with opened(tmp_path):
            pass
    assert not isinstance(caught.value, JournalFault)


@pytest.mark.parametrize("text", ["disk I/O error", "attempt to write a readonly database"])
async def test_a_journal_that_cannot_be_opened_now_can_be_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def fail(path: str) -> sqlite3.Connection:
        raise sqlite3.OperationalError(text)

    monkeypatch.setattr(schema, "open_file", fail)

    with pytest.raises(JournalFault, match=text):
        async with opened(tmp_path):
            pass
