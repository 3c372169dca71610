"""Put a backup of the journal in the place of the journal, for a hostd that reads only that.

What happened since the backup is in the journal that it replaces. Where that has all tables and
columns of the backup, its rows come along: the older hostd goes on where the newer one stopped and
repeats nothing, under the same `journal_id`. Where it has not, or cannot be read, the backup is put
back as it was, only on demand. The numbers of its next events were used already, so it gets a new
`journal_id`: consumers know an event by journal and number.
"""

import contextlib
import os
import sqlite3
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from handlers.errors import Conflict, HostFault, Invalid
from worker.journal import schema
from worker.journal.migration import backup, migrations


@dataclass(frozen=True, slots=True)
class Restored:
    """`version`: of the tables now in use. `kept`: where the journal that was replaced is; "":
    there was none. `stale`: what happened since the backup is not in it."""

    version: int
    kept: str
    journal_id: str
    stale: bool


def restore(
    path: str,
    source: str,
    *,
    stale: bool = False,
    reached: Callable[[str], None] = lambda point: None,
) -> Restored:
    """Replace the journal; no worker may run. What ends it leaves the journal or the backup.

    Args:
        stale: put it back as it was if the rows of the journal do not fit.

    Raises:
        Invalid: the file is no backup of a journal that this hostd reads, or is damaged.
        Conflict: the rows do not fit, and `stale` is false; nothing was changed.
        HostFault, OSError: it could not be done; the journal is as it was.
    """
    version = _check(source)
    part = f"{path}.restored.part"
    _discard(part)
    try:
        is_stale = _prepare(path, source, part, stale, reached)
        reached("prepared")
        kept = _set_aside(path, reached)
        os.rename(part, path)
    except BaseException as error:
        _discard(part)
        if isinstance(error, sqlite3.Error):
            raise HostFault(
                f"cannot restore the journal {path} from {source}: {error}; check its file system"
            ) from error
        raise
    reached("renamed")
    backup.sync_directory(path)
    with contextlib.closing(_open(path)) as connection:
        journal_id = schema.read_meta(connection, "journal_id") or ""
    return Restored(version, kept, journal_id, is_stale)


def _discard(part: str) -> None:
    for name in (part, f"{part}-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _prepare(
    path: str, source: str, part: str, stale: bool, reached: Callable[[str], None]
) -> bool:
    """Make the file that is to be the journal, synced; returns whether it is stale."""
    with contextlib.closing(_open(source)) as connection:
        backup.copy(connection, part)
    reached("copied")
    problem = _carry(path, part)
    reached("carried")
    if problem and not stale:
        raise Conflict(
            f"cannot bring what happened since the backup {source} along: {problem}; run the "
            "newer hostd again, or use --stale to put the backup back as it was (then do as "
            "after the loss of a journal for what was started, put to sleep or destroyed since)"
        )
    if problem:
        _renumber(part)
    _sync(part)
    return bool(problem)


def _check(source: str) -> int:
    """The version of the backup's tables."""
    try:
        with contextlib.closing(_open(source)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (min_reader,) = connection.execute("PRAGMA user_version").fetchone()
            if application != schema.APPLICATION_ID or not min_reader:
                raise Invalid(
                    f"{source} is no backup of a journal of hostd; see `hostd journal ls`"
                )
            if min_reader > migrations.VERSION:
                raise Invalid(
                    f"{source} needs a hostd that reads schema version {min_reader}; "
                    f"this one reads up to {migrations.VERSION}"
                )
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise Invalid(f"the backup {source} is damaged: {found}; use another one")
            return migrations.version_of(connection)
    except sqlite3.Error as error:
        raise Invalid(f"cannot read the backup {source}: {error}; use another one") from error


def _open(path: str) -> sqlite3.Connection:
    """An existing file; it is not created."""
    connection = sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, isolation_level=None)
    connection.text_factory = schema.text_of
    return connection


def _carry(path: str, part: str) -> str:
    """Fill the tables of the copy with the rows of the journal; returns why it could not."""
    if not os.path.exists(path):
        return f"there is no journal {path}"
    with contextlib.closing(_open(part)) as connection:
        try:
            connection.execute("ATTACH ? AS now", (path,))
            (application,) = connection.execute("PRAGMA now.application_id").fetchone()
            (min_reader,) = connection.execute("PRAGMA now.user_version").fetchone()
            if application != schema.APPLICATION_ID or min_reader > migrations.VERSION:
                return f"{path} is not a journal that this hostd reads"
            own = schema.read_meta(connection, migrations.VERSION_KEY)
            connection.execute("BEGIN IMMEDIATE")
            for table in _tables(connection, "main"):
                _fill(connection, table)
            connection.execute("DELETE FROM meta WHERE key = ?", (migrations.VERSION_KEY,))
            if own is not None:
                schema.write_meta(connection, migrations.VERSION_KEY, own)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return str(error)
    return ""


def _tables(connection: sqlite3.Connection, database: str) -> list[str]:
    rows = connection.execute(
        f"SELECT name FROM {database}.sqlite_schema "  # noqa: S608 - names of this module
        "WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    )
    return [name for (name,) in rows]


def _fill(connection: sqlite3.Connection, table: str) -> None:
    """All rows, in the columns of the backup.

    Raises:
        sqlite3.Error: the journal lacks one of these.
    """
    names = {
        name: [
            column for _, column, *_ in connection.execute(f'PRAGMA {name}.table_info("{table}")')
        ]
        for name in ("main", "now")
    }
    if missing := [each for each in names["main"] if each not in names["now"]]:
        raise sqlite3.DatabaseError(
            f"table {table} of the journal has no column {', '.join(missing)}"
        )
    both = ", ".join(f'"{each}"' for each in names["main"])
    connection.execute(f'DELETE FROM main."{table}"')  # noqa: S608 - names of the files
    connection.execute(
        f'INSERT INTO main."{table}" ({both}) SELECT {both} FROM now."{table}"'  # noqa: S608
    )


def _renumber(part: str) -> None:
    with contextlib.closing(_open(part)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        schema.write_meta(connection, "journal_id", str(uuid.uuid4()))
        schema.write_meta(connection, "seq", "0")
        connection.execute("COMMIT")


def _sync(file: str) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: str, reached: Callable[[str], None]) -> str:
    """Keep the journal as a backup, or under another name if it is damaged, without its `-wal`."""
    if not os.path.exists(path):
        return ""
    try:
        with contextlib.closing(_open(path)) as connection:
            kept = backup.make(connection, path, migrations.version_of(connection))
            reached("set aside")
            # The whole file without a `-wal`, which would be taken for one of the restored file.
            connection.execute("PRAGMA journal_mode=DELETE")
            reached("one file")
    except sqlite3.OperationalError:  # full, busy, or an I/O error: not damaged
        raise
    except sqlite3.Error:
        kept = f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        os.link(path, kept)  # there is a journal at any time: the restored one replaces this name
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path + suffix, kept + suffix)
    return kept
