"""From one version of the journal's tables to the next: in one transaction, after a backup."""

import errno
import hashlib
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from handlers.errors import HostFault
from tests.fakes.shell_worker import command, start
from tests.unit.journal.journals import accept, opened, record
from worker.journal import schema
from worker.journal.migration import backup, migrations
from worker.journal.migration.migrations import MIGRATIONS, VERSION, Migration

# What a hostd of version 1 made beside its tables; the first ones did not.
BESIDE = """
CREATE TABLE retry (command_id TEXT PRIMARY KEY, spent_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE audit (n INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, actor TEXT NOT NULL,
    kind TEXT NOT NULL, name TEXT NOT NULL, result TEXT, reason TEXT);
CREATE INDEX command_never_ran ON command (n) WHERE attempts = 0 AND finished_at_ms IS NOT NULL;
CREATE INDEX command_finished_lane ON command (lane, finished_at_ms)
    WHERE finished_at_ms IS NOT NULL;
INSERT INTO audit (at_ms, actor, kind, name) VALUES (1, 'sweep', 'temp', 'x');
"""
FILL = """
INSERT INTO meta VALUES ('journal_id', '00000000-0000-4000-8000-000000000001'), ('seq', '7');
INSERT INTO instance (tenant_id, pool_id, instance_id, uid_slot, record)
    VALUES ('acme', 'web', 'a1', 3, '{}');
"""
NEXT = Migration(
    VERSION + 1,
    min_reader=VERSION + 1,
    statements=(
        "ALTER TABLE announced RENAME COLUMN status TO last_status",
        "CREATE TABLE more (a)",
        "INSERT INTO more SELECT uid_slot FROM instance",
    ),
)


def version_1(path: Path, *, beside: bool = True) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.executescript(f"PRAGMA journal_mode=WAL; {schema.TABLES} {FILL}")
        file.executescript(BESIDE if beside else "")
        file.executescript(f"PRAGMA application_id={schema.APPLICATION_ID}; PRAGMA user_version=1")


def tables(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """The columns of each table, and the names of the indexes; not how they were spelt."""
    with closing(sqlite3.connect(path)) as file:
        names = [name for (name,) in file.execute("SELECT name FROM sqlite_schema")]
        return {name: file.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in names}


def content(path: Path) -> str:
    with closing(sqlite3.connect(path)) as file:
        return "\n".join([*file.iterdump(), str(file.execute("PRAGMA user_version").fetchone())])


def test_the_tables_of_a_version_stay_as_they_are() -> None:
    """Who changes the tables adds a migration."""
    digests = {
        1: "99d7c1967923f04585f6afdd68d89939443d17aeb16440b23a84006b1346a9ec",
        2: "724f0ae8f93d50914a233fe848ee251a0e3936d549869bdc17eb9307dff0092a",
    }
    texts = {1: schema.TABLES} | {each.to: "\n".join(each.statements) for each in MIGRATIONS}

    assert {to: hashlib.sha256(text.encode()).hexdigest() for to, text in texts.items()} == digests
    assert list(texts) == list(range(1, VERSION + 1))
    readers = [1, *(each.min_reader for each in MIGRATIONS)]
    assert readers == sorted(readers)
    assert all(each.min_reader <= each.to for each in MIGRATIONS)


@pytest.mark.parametrize("beside", [False, True])
def test_a_migrated_journal_is_as_a_new_one_and_its_rows_are_kept(
    tmp_path: Path, beside: bool
) -> None:
    version_1(tmp_path / "old", beside=beside)

    schema.open_file(str(tmp_path / "old")).close()
    schema.open_file(str(tmp_path / "new")).close()

    assert tables(tmp_path / "old") == tables(tmp_path / "new")
    with closing(schema.open_file(str(tmp_path / "old"))) as file:
        assert schema.read_meta(file, "seq") == "7"
        assert file.execute("SELECT uid_slot FROM instance").fetchall() == [(3,)]
        assert migrations.version_of(file) == VERSION
    assert len(backup.backups(str(tmp_path / "old"))) == 1
    assert backup.backups(str(tmp_path / "new")) == []


def test_a_backup_is_the_journal_of_before_in_one_file_of_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    version_1(path)
    before = content(path)

    schema.open_file(str(path)).close()

    (name,) = backup.backups(str(path))
    assert backup.version_in_name(name) == 1
    assert os.stat(name).st_mode & 0o777 == 0o600
    assert content(Path(name)) == before
    assert not list(tmp_path.glob("*.backup?*"))


async def test_a_change_that_only_adds_leaves_the_older_version_its_journal(
    tmp_path: Path,
) -> None:
    """It reads `user_version` as the version of the tables and refuses a higher one."""
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record("a1"))

    with closing(sqlite3.connect(tmp_path / "journal")) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (1,)
        # as a hostd of version 1 writes
        file.execute(
            "INSERT INTO audit (at_ms, actor, kind, name) VALUES (1, 'sweep', 'temp', 'x')"
        )
        file.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
        file.commit()
    async with opened(tmp_path) as journal:  # written by version 99, which it may read
        assert journal.records.instances()
        await accept(journal, command(start("a1")))
    with closing(sqlite3.connect(tmp_path / "journal")) as file:
        assert migrations.version_of(file) == 99


@pytest.mark.parametrize("written", [None, "x", "-1", "9" * 40])
def test_a_journal_whose_version_cannot_be_read_is_not_migrated_twice(
    tmp_path: Path, written: str | None
) -> None:
    path = tmp_path / "journal"
    schema.open_file(str(path)).close()
    with closing(sqlite3.connect(path)) as file:
        file.execute("DELETE FROM meta WHERE key = 'schema_version'")
        if written is not None:
            file.execute("INSERT INTO meta VALUES ('schema_version', ?)", [written])
        file.commit()

    with closing(schema.open_file(str(path))) as file:
        assert migrations.version_of(file) == VERSION
    assert backup.backups(str(path)) == []


def points(path: Path) -> list[str]:
    reached: list[str] = []
    with closing(schema.open_file(str(path))) as file:
        migrations.migrate(file, str(path), (*MIGRATIONS, NEXT), reached=reached.append)
    return reached


def test_what_a_kill_leaves_at_any_point_is_started_from_by_one_of_the_two(
    tmp_path: Path,
) -> None:
    """The directory is copied at each point: what a kill there would leave."""
    live = tmp_path / "live"
    live.mkdir()
    path = live / "journal"
    schema.open_file(str(path)).close()
    before, left = content(path), dict[str, Path]()

    def note(point: str) -> None:
        left[point] = Path(shutil.copytree(live, tmp_path / f"left{len(left)}"))

    with closing(schema.open_file(str(path))) as file:
        migrations.migrate(file, str(path), (*MIGRATIONS, NEXT), reached=note)
    after = content(path)

    assert len(left) > len(NEXT.statements) + 4
    for point, directory in left.items():
        found = directory / "journal"
        # an index of the WAL that no process has open is made again
        assert content(found) == (after if point == "committed" else before), point
        with closing(schema.open_reader(str(found))) as file:
            assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for name in backup.backups(str(found)):
            assert content(Path(name)) == before
        if point != "committed":
            schema.open_file(str(found)).close()  # the older one goes on
            with closing(schema.open_file(str(found))) as file:
                migrations.migrate(file, str(found), (*MIGRATIONS, NEXT))  # the newer one too
        assert content(found) == after
        assert not list(directory.glob("*.part*"))
        assert backup.backups(str(found))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), sqlite3.OperationalError("disk I/O error")]
)
def test_an_error_at_any_point_leaves_the_journal_of_before(
    tmp_path: Path, error: Exception
) -> None:
    path = tmp_path / "journal"
    schema.open_file(str(path)).close()
    before = content(path)
    shutil.copy(path, tmp_path / "trial")
    names = points(tmp_path / "trial")

    for point in names[: names.index("committed")]:

        def fail(reached: str, point: str = point) -> None:
            if reached == point:
                raise error

        with closing(schema.open_file(str(path))) as file, pytest.raises(type(error)):
            migrations.migrate(file, str(path), (*MIGRATIONS, NEXT), reached=fail)
        assert content(path) == before, point
        assert not list(tmp_path.glob("journal*.part*"))


def test_a_disk_that_is_full_during_the_migration_leaves_the_journal_of_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal"
    schema.open_file(str(path)).close()
    before = content(path)
    with closing(schema.open_file(str(path))) as file:
        (pages,) = file.execute("PRAGMA page_count").fetchone()
        file.execute(f"PRAGMA max_page_count={pages}")

        with pytest.raises(sqlite3.OperationalError, match="full"):
            migrations.migrate(file, str(path), (*MIGRATIONS, NEXT))

    assert content(path) == before


def test_few_backups_are_kept_and_none_for_longer_than_a_month(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    schema.open_file(str(path)).close()
    with closing(schema.open_file(str(path))) as file:
        made = [backup.make(file, str(path), version) for version in range(1, 6)]
    assert backup.backups(str(path)) == made[:-4:-1]

    os.utime(made[-2], (1, 1))
    backup.prune(str(path))

    assert backup.backups(str(path)) == [made[-1], made[-3]]


def test_a_directory_that_cannot_be_read_has_not_no_backups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refused)

    with pytest.raises(PermissionError, match=str(tmp_path)):
        backup.backups(str(tmp_path / "journal"))
    assert backup.backups(str(tmp_path / "none" / "journal")) == []


async def test_a_journal_that_only_a_newer_hostd_reads_names_both_ways_on(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    path = str(tmp_path / "journal")
    with closing(schema.open_file(path)) as file:
        migrations.migrate(file, path, (*MIGRATIONS, NEXT))
    (name,) = backup.backups(path)

    with pytest.raises(HostFault) as refused:
        async with opened(tmp_path):
            pass

    assert f"schema version {VERSION + 1}" in refused.value.message
    assert f"run the newer hostd again, or `hostd journal restore {name}`" in refused.value.message


def test_a_migration_that_fails_leaves_no_backup_and_no_older_one_goes(tmp_path: Path) -> None:
    """It is tried again and again while the worker waits for its state directory."""
    path = tmp_path / "journal"
    version_1(path)
    schema.open_file(str(path)).close()
    older = backup.backups(str(path))
    wrong = Migration(VERSION + 1, VERSION + 1, ("CREATE TABLE more (a)", "no statement"))

    with closing(schema.open_file(str(path))) as file:
        for _ in range(4):
            with pytest.raises(sqlite3.Error):
                migrations.migrate(file, str(path), (*MIGRATIONS, wrong))

    assert older
    assert backup.backups(str(path)) == older


def test_a_backup_that_cannot_be_removed_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    version_1(path)
    (tmp_path / "journal.v1-20200101T000000Z.backup.part").mkdir()

    schema.open_file(str(path)).close()

    assert len(backup.backups(str(path))) == 1


async def test_a_database_of_another_program_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE meta (x)")

    with pytest.raises(HostFault, match="of another program") as caught:
        async with opened(tmp_path):
            pass

    assert type(caught.value) is HostFault  # not one that is waited for
