"""The journal's file: how it is opened, what it refuses, what it skips."""

import sqlite3
from pathlib import Path

import pytest
import structlog

from handlers.errors import HostFault
from tests.fakes.shell_worker import command, start
from tests.unit.journal.journals import accept, opened, record


async def test_a_journal_of_a_newer_hostd_is_refused_by_name(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "journal") as file:
        file.execute("PRAGMA user_version=99")
    file.close()

    with pytest.raises(
        HostFault,
        match=r"schema version 99, .*99; this one reads up to 2; .* or move",
    ):
        async with opened(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"no database, but long enough to be looked at" * 50, None])
async def test_a_file_that_is_not_a_journal_is_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "journal"
    if content is None:
        with sqlite3.connect(path) as file:
            file.executescript("CREATE TABLE other (a); PRAGMA user_version=1;")
        file.close()
    else:
        path.write_bytes(content)

    with pytest.raises(HostFault, match="journal of hostd"):
        async with opened(tmp_path):
            pass


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostFault, match=r"cannot open the journal .*/missing/journal"):
        async with opened(tmp_path / "missing"):
            pass


async def test_the_journal_id_is_made_with_the_file_and_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        first = journal.store.journal_id
        await journal.store.put_meta("boot_id", "b0")
    async with opened(tmp_path) as journal:
        assert journal.store.journal_id == first
        assert journal.store.meta("boot_id") == "b0"


async def test_a_corrupt_row_is_skipped_and_logged(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record("a1"))
        await journal.records.put_instance(record("a2"))
        await accept(journal, command(start("a1"), "bad"))
        await accept(journal, command(start("a2"), "good"))
    with sqlite3.connect(tmp_path / "journal") as file:
        file.execute("UPDATE instance SET record = '{' WHERE instance_id = 'a1'")
        file.execute("UPDATE command SET request = x'c1' WHERE id = 'bad'")
    file.close()

    with structlog.testing.capture_logs() as logs:
        async with opened(tmp_path) as journal:
            assert [r.ref.instance_id for r in journal.records.instances()] == ["a2"]
            assert [row.id for row in journal.commands.unfinished()] == ["good"]
    assert [entry["table"] for entry in logs] == ["command", "instance"]
