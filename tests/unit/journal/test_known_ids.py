"""IDs that the journal may have: none that it has is ever denied."""

import asyncio
from pathlib import Path

import pytest

from schemas import codec
from tests.fakes.shell_worker import command, start
from tests.unit.journal.journals import accept, ok, opened
from worker.journal import commands
from worker.journal.admission import Verdict
from worker.journal.journal import Journal
from worker.journal.known_ids import KnownIds

REPLY = codec.encode_reply(ok())


def denied(journal: Journal) -> bool:
    """Whether an ID that nobody used is known to be new without a look at the file."""
    known = journal.commands._known
    return known is not None and not known.may_have("never used")


def test_what_was_added_is_never_denied_and_little_else_is_not() -> None:
    known, other = KnownIds(), KnownIds()
    for number in range(5000):
        (known if number % 2 else other).add(f"c{number}")
    known.merge(other)

    assert all(known.may_have(f"c{number}") for number in range(5000))
    assert sum(known.may_have(f"d{number}") for number in range(5000)) < 50
    assert known.count == 5000


async def test_an_id_of_an_earlier_worker_is_found_before_and_after_the_file_was_read(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        for name in ("c1", "c2"):
            await accept(journal, command(start(), name))
            await journal.commands.finish(ok(name), REPLY)
    async with opened(tmp_path) as journal:
        before = await accept(journal, command(start(), "c1"))
        assert not denied(journal)

        await journal.commands.read_ids()

        assert denied(journal)
        after = await accept(journal, command(start(), "c2"))
        assert [before.verdict, after.verdict] == [Verdict.REPLAY, Verdict.REPLAY]


async def test_ids_that_are_taken_in_while_the_file_is_read_stay_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as journal:
        await journal.commands.read_ids()
        monkeypatch.setattr(commands, "RENEW_AT", 1)
        names = [f"c{number}" for number in range(30)]
        for number, name in enumerate(names):
            reading = asyncio.create_task(journal.commands.read_ids())
            for _ in range(number % 4):
                await asyncio.sleep(0)
            await accept(journal, command(start(), name))
            await journal.commands.finish(ok(name), REPLY)
            if number % 3:
                await reading
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        await journal.commands.read_ids()

        assert denied(journal)
        for name in names:
            assert (await accept(journal, command(start(), name))).verdict is Verdict.REPLAY


async def test_a_damaged_id_hides_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        for name in ("c1", "c2"):
            await accept(journal, command(start(), name))
            await journal.commands.finish(ok(name), REPLY)
        await journal.store.writer.submit(
            lambda tx: tx.execute("UPDATE command SET id = CAST(x'ff' AS TEXT) WHERE id = 'c1'")
        )

        await journal.commands.read_ids()

        assert denied(journal)
        assert (await accept(journal, command(start(), "c2"))).verdict is Verdict.REPLAY


async def test_pruned_ids_are_forgotten_once_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as journal:
        await journal.commands.read_ids()
        for number in range(4):
            await accept(journal, command(start(), f"c{number}"))
            await journal.commands.finish(ok(f"c{number}"), REPLY)
        await journal.commands.prune()
        await journal.commands.read_ids()
        assert journal.commands._known is not None
        assert journal.commands._known.count == 4

        monkeypatch.setattr(commands, "RENEW_AT", 4)
        await journal.commands.read_ids()

        assert journal.commands._known.count == 0
        assert not journal.commands._known.may_have("c1")
