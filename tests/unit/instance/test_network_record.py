"""A network's record is on disk if the reply says so, and gone from memory if not."""

import sqlite3
from pathlib import Path

import pytest

from schemas.codes import Code
from schemas.settings import LimitSettings
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.unit.instance.test_commands import DOWN, UP
from worker.journal.writer import JournalFault


def warned() -> FakeHost:
    machine = seeded()
    machine.network_warnings = ("a chain of docker drops",)
    return machine


def fail_events(worker: MemoryWorker, monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """The first events cannot be committed."""
    left = [times]
    event = worker.journal.records.event

    async def failing(*args: object, **options: object) -> None:
        if left[0]:
            left[0] -= 1
            raise JournalFault("the disk is full")
        await event(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.journal.records, "event", failing)
    return left


async def test_a_fault_before_the_outcome_loses_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = warned()
    limits = LimitSettings(retry_budget_s=5.0)
    async with memory_worker(tmp_path / "j", machine, limits=limits) as worker:
        left = fail_events(worker, monkeypatch, 1)
        assert (await worker.run(UP)).code is Code.OK
        assert left == [0]

    async with memory_worker(tmp_path / "j", machine) as worker:
        assert worker.journal.records.network("acme") is not None


async def test_a_setup_that_failed_leaves_no_record_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = warned()
    async with memory_worker(tmp_path / "j", machine) as worker:
        fail_events(worker, monkeypatch, 1)

        assert (await worker.run(UP)).code is not Code.OK

        assert worker.journal.records.network("acme") is None
        assert machine.resources == {}
        assert (await worker.run(UP)).code is Code.OK
        assert (await worker.run(DOWN)).code is Code.OK


async def test_an_outcome_that_the_journal_refuses_is_undone_and_answered(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine):
        pass
    with sqlite3.connect(tmp_path / "j") as journal:  # a row that this version cannot read
        journal.execute("INSERT INTO network VALUES ('other', ?, x'00')", (UP.net.tenant_net_id,))
    journal.close()

    async with memory_worker(tmp_path / "j", machine) as worker:
        reply = await worker.run(UP)

        assert reply.code is Code.CONFLICT
        assert worker.journal.records.network("acme") is None
        assert machine.resources == {}
