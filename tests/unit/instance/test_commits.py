"""How often each kind of command commits, and how many of these commits are synced.

A sync is what a command on an idle host waits for. The order of effects asks for these: the
admission before the first effect; intents before what survives a reboot; a point of no return; the
outcome before the reply (ADR 0962); and, not synced, what a VMM used before its counters go (ADR
1088). Parts that are submitted while the thread is busy join the next
commit, so the numbers are the most that can be.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from schemas.codes import Code
from schemas.requests import Request, SetupNetwork, TeardownNetwork
from tests.constants import DESTROY, NET, SLEEP, START, STOP, WAKE
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from worker.journal.transaction import Transaction
from worker.journal.writer import Writer

UP, DOWN = SetupNetwork("acme", NET), TeardownNetwork("acme", NET)


@dataclass
class Commits:
    """`synced`, `all`: commits since `clear`."""

    synced: int = 0
    all: int = 0

    def clear(self) -> None:
        self.synced = self.all = 0


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    counted = Commits()
    transact = Writer._transact

    def counting(writer: Writer, connection: sqlite3.Connection, batch: list[Any]) -> Transaction:
        if any(part.future or part.failed for part in batch):  # else nobody waits
            counted.all += 1
            counted.synced += any(part.durable for part in batch)
        return transact(writer, connection, batch)

    monkeypatch.setattr(Writer, "_transact", counting)
    return counted


@pytest.mark.parametrize(
    ("before", "request_", "synced", "at_most"),
    [
        pytest.param((UP, START, STOP), STOP, 1, 1, id="changes nothing"),
        pytest.param((), UP, 2, 3, id="SetupNetwork"),
        pytest.param((UP,), DOWN, 2, 3, id="TeardownNetwork"),
        pytest.param((UP,), START, 6, 8, id="the first StartInstance"),
        pytest.param((UP, START, STOP), START, 4, 6, id="StartInstance"),
        pytest.param((UP, START), STOP, 2, 4, id="StopInstance"),
        pytest.param((UP, START), SLEEP, 3, 6, id="SleepInstance"),
        pytest.param((UP, START, SLEEP), WAKE, 4, 6, id="WakeInstance"),
        pytest.param((UP, START), DESTROY, 3, 5, id="DestroyInstance"),
    ],
)
async def test_a_command_commits_no_more_than_its_order_asks_for(
    tmp_path: Path,
    commits: Commits,
    before: Sequence[Request],
    request_: Request,
    synced: int,
    at_most: int,
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        for request in before:
            assert (await worker.run(request)).code is Code.OK
        commits.clear()

        reply = await worker.run(request_)

        assert reply.code is Code.OK
        assert commits.synced <= synced
        assert commits.all <= at_most
