"""The versions of the journal's tables, and the one transaction that brings a file to the newest.

Version 1 is `schema.TABLES`; each later one is a migration from the one before, also in a new file,
so that a new journal and a migrated one are the same. A file says two things of itself: its version
(`schema_version` of the table `meta`), and in `user_version` the lowest version that a hostd must
know to read and write it. Both are 1 in a file without `schema_version`.
"""

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from worker.journal.migration import backup

VERSION_KEY: Final = "schema_version"
NUMBER: Final = re.compile(r"[0-9]{1,9}")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Migration:
    """From version `to - 1` to `to`.

    Attributes:
        min_reader: the lowest version whose hostd may go on with the file: `to` of the last change
            that is not additive. It ignores the tables and columns that it does not know, and a row
            that it writes is complete by their defaults.
        statements: one SQL statement each, run once.
    """

    to: int
    min_reader: int
    statements: Sequence[str]


MIGRATIONS: Final = (
    Migration(
        to=2,
        min_reader=1,
        statements=(
            # How much of its retry budget an unfinished command has spent, over all workers.
            """CREATE TABLE IF NOT EXISTS retry (
                command_id TEXT PRIMARY KEY,
                spent_ms INTEGER NOT NULL
            ) WITHOUT ROWID""",
            # What the worker did by itself. `result` is NULL from before the effect until after it.
            """CREATE TABLE IF NOT EXISTS audit (
                n INTEGER PRIMARY KEY,
                at_ms INTEGER NOT NULL,
                actor TEXT NOT NULL,
                kind TEXT NOT NULL,
                name TEXT NOT NULL,
                result TEXT,
                reason TEXT
            )""",
            # Whose it was; NULL: the host's, or a row of an older hostd.
            "ALTER TABLE audit ADD COLUMN tenant_id TEXT",
            "CREATE INDEX audit_begun ON audit (n) WHERE result IS NULL",
            "CREATE INDEX audit_spent ON audit (actor, at_ms)",
            """CREATE INDEX IF NOT EXISTS command_never_ran ON command (n)
                WHERE attempts = 0 AND finished_at_ms IS NOT NULL""",
            """CREATE INDEX IF NOT EXISTS command_finished_lane ON command (lane, finished_at_ms)
                WHERE finished_at_ms IS NOT NULL""",
        ),
    ),
)
VERSION: Final = MIGRATIONS[-1].to


def version_of(connection: sqlite3.Connection) -> int:
    """The version of an existing file's tables; 0: it is empty."""
    (min_reader,) = connection.execute("PRAGMA user_version").fetchone()
    if not min_reader:
        return 0
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (VERSION_KEY,)).fetchone()
    written = str(row[0]) if row is not None else ""
    if NUMBER.fullmatch(written):
        return max(int(written), int(min_reader))
    return _version_by_columns(connection, int(min_reader))


def _version_by_columns(connection: sqlite3.Connection, min_reader: int) -> int:
    """Of a file whose `meta` does not say it, or is damaged: a migration runs once."""
    columns = {name for _, name, *_ in connection.execute("PRAGMA table_info(audit)")}
    return max(min_reader, 2 if "tenant_id" in columns else 1)


def migrate(
    connection: sqlite3.Connection,
    path: str,
    migrations: Sequence[Migration] = MIGRATIONS,
    *,
    reached: Callable[[str], None] = lambda point: None,
) -> None:
    """Bring an existing file to the newest version, in one transaction after a backup.

    Whatever ends it, the file is as before or migrated as a whole. A file of a newer hostd that
    this one may read is left as it is.

    Args:
        reached: called at each point between two effects, with its name, for tests.

    Raises:
        sqlite3.Error, OSError: the backup or the migration failed, e.g. on a full disk.
    """
    before = version_of(connection)
    due = [each for each in migrations if each.to > before]
    if not due:
        return
    made = backup.make(connection, path, before, reached=reached)
    try:
        connection.execute("BEGIN IMMEDIATE")
        apply(connection, due, reached=reached)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        with contextlib.suppress(OSError):  # or each retry would leave one, and the older ones go
            os.unlink(made)
        raise
    reached("committed")
    log.info("journal.migrated", before=before, after=due[-1].to, backup=made)


def apply(
    connection: sqlite3.Connection,
    migrations: Sequence[Migration] = MIGRATIONS,
    *,
    reached: Callable[[str], None] = lambda point: None,
) -> None:
    """Run the migrations in the transaction that is open."""
    for migration in migrations:
        for number, statement in enumerate(migration.statements):
            connection.execute(statement)
            reached(f"statement {number} of version {migration.to}")
    last = migrations[-1]
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (VERSION_KEY, str(last.to)))
    connection.execute(f"PRAGMA user_version={last.min_reader}")
    reached("version written")
