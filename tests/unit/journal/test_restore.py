"""Back to a hostd of the version before, by the backup that the migration made."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from handlers.errors import Conflict, HostFault, Invalid
from handlers.host.lock import HostLock
from tests.fakes.shell_worker import command, start
from tests.unit.journal.journals import accept, finish, ok, opened, record
from tests.unit.journal.test_migration import NEXT
from worker.cli.main import main
from worker.journal import schema
from worker.journal.migration import backup, migrations
from worker.journal.migration.migrations import MIGRATIONS, VERSION, Migration
from worker.journal.migration.restore import restore

MOVED = Migration(
    VERSION + 1,
    min_reader=VERSION + 1,
    statements=("CREATE TABLE more (a)", "INSERT INTO more SELECT uid_slot FROM instance"),
)


def upgraded(path: Path, migration: Migration = MOVED) -> str:
    """As a newer hostd leaves it, which this one then cannot open; returns the backup."""
    with closing(schema.open_file(str(path))) as file:
        migrations.migrate(file, str(path), (*MIGRATIONS, migration))
    (name,) = backup.backups(str(path))
    return name


def write(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as file:
        for statement in statements:
            file.execute(statement)
        file.commit()


def seen_by_newer(monkeypatch: pytest.MonkeyPatch, newer: Sequence[Migration]) -> None:
    monkeypatch.setattr(migrations, "VERSION", newer[-1].to)


async def test_the_older_version_goes_on_where_the_newer_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record("a1"))
        await accept(journal, command(start("a1"), "c1"))
        journal_id = journal.store.journal_id
    name = upgraded(path)
    write(  # the newer one finishes the command, starts another instance and sends events
        path,
        "UPDATE command SET code = 'ok', reply = x'00', finished_at_ms = 5",
        "INSERT INTO instance SELECT tenant_id, pool_id, 'a2', 9, 9, record FROM instance",
        "UPDATE meta SET value = '40' WHERE key = 'seq'",
    )
    seen_by_newer(monkeypatch, (MOVED,))

    done = restore(str(path), name)

    monkeypatch.undo()
    assert (done.stale, done.version, done.journal_id) == (False, VERSION, journal_id)
    async with opened(tmp_path) as journal:
        assert journal.store.journal_id == journal_id
        assert journal.store.seq == 40
        assert journal.commands.unfinished() == []
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT count(*) FROM instance").fetchone() == (2,)
        assert migrations.version_of(file) == VERSION
    with closing(sqlite3.connect(done.kept)) as file:  # and forward again
        assert migrations.version_of(file) == VERSION + 1


async def test_a_stale_backup_is_put_back_on_demand_and_is_another_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next events would have the numbers of those that were sent already."""
    path = tmp_path / "journal"
    async with opened(tmp_path) as journal:
        await accept(journal, command(start("a1"), "c1"))
        await finish(journal, ok("c1"))
        journal_id = journal.store.journal_id
    name = upgraded(path, NEXT)  # a column has another name
    seen_by_newer(monkeypatch, (NEXT,))
    before = path.read_bytes()

    with pytest.raises(Conflict, match=r"status.*--stale"):
        restore(str(path), name)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.part*"))
    done = restore(str(path), name, stale=True)

    monkeypatch.undo()
    assert done.stale
    assert done.journal_id != journal_id
    async with opened(tmp_path) as journal:
        assert journal.store.journal_id == done.journal_id
        assert journal.store.seq == 0
        assert await journal.commands.result("c1") is not None


@pytest.mark.parametrize("text", ["database or disk is full", "database is locked"])
def test_a_journal_that_cannot_be_kept_now_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "journal"
    name = upgraded(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> str:
        raise sqlite3.OperationalError(text)

    monkeypatch.setattr(backup, "make", fail)
    with pytest.raises(HostFault, match=text):
        restore(str(path), name, stale=True)

    assert path.read_bytes() == before
    assert not [*tmp_path.glob("*.damaged-*"), *tmp_path.glob("*.part*")]


def test_a_damaged_journal_is_moved_away_with_its_wal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    name = upgraded(path)
    content = b"no database, but long enough to be looked at" * 50
    path.write_bytes(content)
    (tmp_path / "journal-wal").write_bytes(b"left" * 100)

    done = restore(str(path), name, stale=True)

    assert ".damaged-" in done.kept
    assert Path(done.kept).read_bytes() == content
    assert not (tmp_path / "journal-wal").exists()
    schema.open_file(str(path)).close()


@pytest.mark.parametrize("content", [b"", b"no database" * 500])
def test_a_file_that_is_no_backup_is_refused(tmp_path: Path, content: bytes) -> None:
    path, other = tmp_path / "journal", tmp_path / "other"
    schema.open_file(str(path)).close()
    before = path.read_bytes()
    other.write_bytes(content)

    with pytest.raises(Invalid):
        restore(str(path), str(other))
    assert path.read_bytes() == before


def test_a_backup_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    upgraded(path)
    shutil.copy(path, tmp_path / "other")

    with pytest.raises(Invalid, match=f"version {VERSION + 1}; this one reads up to {VERSION}"):
        restore(str(path), str(tmp_path / "other"))


def test_what_a_kill_leaves_at_any_point_is_a_journal_of_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, left = tmp_path / "live", dict[str, Path]()
    live.mkdir()
    path = live / "journal"
    schema.open_file(str(path)).close()
    write(path, "INSERT INTO meta VALUES ('mark', 'x')")
    name = upgraded(path)
    seen_by_newer(monkeypatch, (MOVED,))

    def note(point: str) -> None:
        left[point] = Path(shutil.copytree(live, tmp_path / f"left{len(left)}"))

    restore(str(path), name, reached=note)

    assert len(left) == 6
    for point, directory in left.items():
        with closing(sqlite3.connect(directory / "journal")) as file:
            wanted = VERSION if point == "renamed" else VERSION + 1
            assert migrations.version_of(file) == wanted, point
            assert schema.read_meta(file, "mark") == "x"
            assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if point != "renamed":
            again = directory / os.path.basename(name)
            assert not restore(str(directory / "journal"), str(again)).stale
        assert not list(directory.glob("*.part*"))


def cli(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    environment = {
        f"HOSTD_PATHS_{key.upper()}": str(tmp_path / key) for key in ("state", "run", "data")
    }
    result = CliRunner().invoke(main, ["journal", *arguments], env=environment)
    return result.exit_code, result.output


def test_the_command_lists_and_restores_while_no_worker_runs(tmp_path: Path) -> None:
    for directory in ("state", "run", "state/jails"):
        (tmp_path / directory).mkdir()
    path = tmp_path / "state/journal.db"
    with closing(schema.open_file(str(path))) as file:
        name = backup.make(file, str(path), VERSION)

    assert name in cli(tmp_path, "ls")[1]
    with HostLock(str(tmp_path / "run"), str(tmp_path / "state")):
        code, said = cli(tmp_path, "restore", name)
        assert (code, "another worker uses it" in said) == (12, True)
    code, said = cli(tmp_path, "restore", name)
    assert (code, "up to date" in said) == (0, True)


def test_a_directory_that_cannot_be_read_is_no_empty_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir()
    assert cli(tmp_path, "ls") == (0, "no backups\n")

    def refuse(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as unreadable:
        unreadable.setattr(backup, "backups", refuse)
        code, said = cli(tmp_path, "ls")

    assert code == 20
    assert "run as root" in said
