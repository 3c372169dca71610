"""Each action without a command has a row: who did what, to what, why, and whose it was."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import structlog

from handlers.claims.orphan import Orphan
from schemas.envelopes import EventKind
from schemas.records import Status
from tests.constants import REF
from tests.unit.journal.journals import events, opened, record
from worker.journal import transaction
from worker.journal.transaction import AUDITED, OPERATOR, REASON_MAX, TRIM_EVERY

HOUR_MS = 3_600_000

# Of these, what was done has a row of another kind, or a command did it.
NO_ACTION = {
    EventKind.STATUS: "what led to it has its own row, or is a command",
    EventKind.COMMAND: "a command",
    EventKind.NETWORK: "of a command; what repairs a network says so with `drift`",
    EventKind.SNAPSHOT: "of a command",
    EventKind.VMM_VERSIONS: "an observation",
    EventKind.USAGE: "of what ended, which has its own",
    EventKind.ORPHANS: "an observation; a removal is `removed`",
}


def test_each_kind_of_event_is_an_action_with_a_row_or_says_why_not() -> None:
    assert AUDITED.keys() | NO_ACTION.keys() == set(EventKind)
    assert not AUDITED.keys() & NO_ACTION.keys()


@pytest.mark.parametrize("kind", AUDITED)
async def test_an_action_has_a_row_in_the_commit_of_its_event(
    tmp_path: Path, kind: EventKind
) -> None:
    async with opened(tmp_path) as journal:
        detail = {"reason": "signal 9", "log_tail": "a guest wrote this"}
        await journal.records.event(kind, ref=REF, reason="why", detail=detail)

        (row,) = await journal.audit.newest()
        (event,) = await events(journal)

    assert (row.actor, row.kind, row.result) == (AUDITED[kind], str(kind), "done")
    assert (row.at_ms, row.tenant_id) == (event.at_ms, "acme")
    assert all(name in row.name for name in (REF.tenant_id, REF.pool_id, REF.instance_id))
    assert row.reason == 'why {"reason":"signal 9"}'


@pytest.mark.parametrize("kind", NO_ACTION)
async def test_what_is_no_action_has_none(tmp_path: Path, kind: EventKind) -> None:
    async with opened(tmp_path) as journal:
        await journal.records.event(kind, ref=REF)

        assert await journal.audit.newest() == []


async def test_a_removal_of_the_sweep_has_one_row(tmp_path: Path) -> None:
    orphan = Orphan("temp", "/x")
    async with opened(tmp_path) as journal:
        number = await journal.audit.begin(orphan, "sweep")
        (begun,) = await journal.audit.newest()
        await journal.audit.end(number, orphan, "sweep", "removed", "why")

        (row,) = await journal.audit.newest()

    assert begun.result is None
    assert (row.actor, row.kind, row.result) == ("sweep", "temp", "removed")


async def test_an_adoption_is_the_operators(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.records.put_with_event(
            record("a1", Status.RUNNING), EventKind.RECOVERED, reason="adopted", detail={}
        )

        (row,) = await journal.audit.newest()

    assert row.actor == OPERATOR


async def test_rows_are_bounded_by_number_age_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "AUDIT_ROWS_MAX", 10)
    async with opened(tmp_path) as journal:
        for _ in range(3 * TRIM_EVERY):
            await journal.records.event(EventKind.DISK, reason="x" * 5000)
        rows = await journal.audit.newest()

    assert len(rows) == 9  # and room for the next one
    assert {len(row.reason or "") for row in rows} == {REASON_MAX}

    monkeypatch.setattr(transaction, "AUDIT_ROWS_MAX", 1000)
    late_ms = rows[0].at_ms + transaction.AUDIT_KEEP_MS + 1
    async with opened(tmp_path, clock_ms=lambda: late_ms) as journal:
        for _ in range(TRIM_EVERY):
            await journal.records.event(EventKind.DISK)

        assert {row.at_ms for row in await journal.audit.newest()} == {late_ms}


@pytest.mark.parametrize("clock_ms", [None, 1000])
async def test_events_push_out_nothing_that_the_sweep_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock_ms: int | None
) -> None:
    """Its budget of the hour, and a removal whose result is not known; nor does a wrong clock."""
    monkeypatch.setattr(transaction, "AUDIT_ROWS_MAX", 10)
    orphan = Orphan("temp", "x")
    async with opened(tmp_path) as journal:
        number = await journal.audit.begin(orphan, "sweep")
        await journal.audit.end(number, orphan, "sweep", "removed", "")
        await journal.audit.begin(Orphan("temp", "y"), "sweep")
        spent = await journal.audit.spent_within(HOUR_MS)
        assert spent == 2
    more = {} if clock_ms is None else {"clock_ms": lambda: clock_ms}
    async with opened(tmp_path, **more) as journal:
        for _ in range(3 * TRIM_EVERY):
            await journal.records.event(EventKind.DISK)
    async with opened(tmp_path) as journal:
        assert await journal.audit.spent_within(HOUR_MS) == spent
        assert await journal.audit.close_cut_off() == 1


async def test_a_damaged_row_is_left_out_and_logged(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        for _ in range(4):
            await journal.records.event(EventKind.DISK)
    with closing(sqlite3.connect(tmp_path / "journal")) as file:
        file.execute("UPDATE audit SET at_ms = 'x' WHERE n = 1")
        file.execute("UPDATE audit SET name = x'ff' WHERE n = 2")
        file.execute("UPDATE audit SET reason = CAST(x'ff' AS TEXT) WHERE n = 3")
        file.commit()

    async with opened(tmp_path) as journal:
        with structlog.testing.capture_logs() as logs:
            rows = await journal.audit.newest()

    assert [row.n for row in rows] == [4]
    assert [entry["row"] for entry in logs if entry["event"] == "audit.unreadable"] == [3, 2, 1]
