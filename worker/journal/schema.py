"""The journal's file: its tables, how it is opened, and which schema versions this hostd reads."""

import re
import sqlite3
import uuid
from typing import Final
from urllib.parse import quote

import structlog

from handlers.errors import HostFault
from worker.journal.migration import backup, migrations
from worker.journal.migration.migrations import VERSION

APPLICATION_ID: Final = 0x686F7374  # "host"

JOURNAL_ID: Final = re.compile(r"[0-9a-f-]{36}")
NUMBER: Final = re.compile(r"[0-9]{1,18}")

log = structlog.get_logger()

# Version 1; what later versions changed is in migration/migrations.py.
TABLES: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One row per command id. `request` is the canonical (named) form and, with the id, the command's
-- identity; a message that did not decode has `digest`, the sha256 of its bytes, instead.
-- Unfinished while `finished_at_ms` is NULL. `reply` is what went out, byte for byte.
CREATE TABLE command (
    n INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    lane TEXT NOT NULL,
    subject TEXT NOT NULL,
    stream_seq INTEGER NOT NULL,
    kind TEXT NOT NULL,
    request BLOB,
    digest BLOB,
    form TEXT NOT NULL,
    issued_at_ms INTEGER,
    deadline_ms INTEGER,
    reply_to TEXT,
    issuer TEXT,
    traceparent TEXT,
    received_at_ms INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    code TEXT,
    reply BLOB,
    finished_at_ms INTEGER
);
CREATE INDEX command_unfinished ON command (lane) WHERE finished_at_ms IS NULL;
CREATE INDEX command_finished ON command (finished_at_ms) WHERE finished_at_ms IS NOT NULL;

-- Further copies of an unfinished command; the outcome goes to the inbox of each.
CREATE TABLE joiner (
    command_id TEXT NOT NULL,
    stream_seq INTEGER NOT NULL,
    reply_to TEXT NOT NULL,
    PRIMARY KEY (command_id, stream_seq)
) WITHOUT ROWID;

CREATE TABLE step (
    n INTEGER PRIMARY KEY,
    command_id TEXT NOT NULL,
    mechanism TEXT NOT NULL,
    key TEXT NOT NULL,
    existed INTEGER NOT NULL,
    UNIQUE (command_id, mechanism, key)
);
CREATE TABLE point (
    command_id TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (command_id, name)
) WITHOUT ROWID;

-- `record` is JSON. `address_offset` is set only while it excludes others: live or asleep.
CREATE TABLE instance (
    tenant_id TEXT NOT NULL,
    pool_id TEXT NOT NULL,
    instance_id TEXT NOT NULL,
    uid_slot INTEGER UNIQUE,
    address_offset INTEGER,
    record BLOB NOT NULL,
    PRIMARY KEY (tenant_id, pool_id, instance_id),
    UNIQUE (tenant_id, address_offset)
) WITHOUT ROWID;
CREATE TABLE tombstone (
    tenant_id TEXT NOT NULL,
    pool_id TEXT NOT NULL,
    instance_id TEXT NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (tenant_id, pool_id, instance_id)
) WITHOUT ROWID;
CREATE TABLE network (
    tenant_id TEXT PRIMARY KEY,
    tenant_net_id INTEGER NOT NULL UNIQUE,
    record BLOB NOT NULL
) WITHOUT ROWID;

-- The last `to` that was published per lane: the next event's `from`, also after a Destroy.
CREATE TABLE announced (lane TEXT PRIMARY KEY, status TEXT NOT NULL) WITHOUT ROWID;

-- `n` is counted by the writer and never used twice while the file is open.
CREATE TABLE outbox (
    n INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    msg_id TEXT NOT NULL,
    headers BLOB NOT NULL,
    payload BLOB NOT NULL
);

-- The newest value per key; NULL: delete the key from the bucket.
CREATE TABLE state (
    key TEXT PRIMARY KEY,
    value BLOB,
    seq INTEGER NOT NULL,
    dirty INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX state_dirty ON state (key) WHERE dirty;
"""


# Of commands that an older hostd, which does not know the table, has finished.
FORGOTTEN: Final = (
    "DELETE FROM retry WHERE command_id NOT IN "
    "(SELECT id FROM command WHERE finished_at_ms IS NULL)"
)


def open_file(path: str) -> sqlite3.Connection:
    """Open the journal; create it if it does not exist.

    Raises:
        HostFault: the file is not a journal, or a newer hostd wrote it; says what to do.
        sqlite3.Error, OSError: it cannot be opened now, or not be backed up before a migration.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    connection.text_factory = text_of
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: str) -> sqlite3.Connection:
    """A second, read-only connection to an open journal; it reads what is committed."""
    connection = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, isolation_level=None)
    connection.text_factory = text_of
    return connection


def text_of(data: bytes) -> str:
    """A text as it is stored: one that is no UTF-8 must not fail the query that meets it."""
    return data.decode(errors="surrogateescape")


def number(text: str | None) -> int | None:
    """The number that a fact of `meta` is; None if it is none."""
    return int(text) if text is not None and NUMBER.fullmatch(text) else None


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    try:
        (min_reader,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise HostFault(
            f"cannot open {path}: not a journal of hostd, or damaged ({error}); move it away to "
            "start with an empty one"
        ) from error
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if min_reader and application != APPLICATION_ID:
        raise HostFault(
            f"cannot open {path}: an SQLite database, but not a journal of hostd (application_id "
            f"{application}, want {APPLICATION_ID}); move it away"
        )
    if not min_reader and connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
        raise HostFault(f"cannot open {path}: an SQLite database of another program; move it away")
    if min_reader > VERSION:
        raise HostFault(_too_new(connection, path, min_reader))
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=OFF")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.execute("PRAGMA cache_size=-4096")
    if min_reader:
        migrations.migrate(connection, path)
        connection.execute(FORGOTTEN)
        _mend_meta(connection)
        _mend_numbers(connection)
    else:
        connection.executescript(f"BEGIN IMMEDIATE; {TABLES}")
        migrations.apply(connection)
        write_meta(connection, "journal_id", str(uuid.uuid4()))
        write_meta(connection, "seq", "0")
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute("COMMIT")


def _too_new(connection: sqlite3.Connection, path: str, min_reader: int) -> str:
    """Why it cannot be opened, and the two ways on."""
    usable = [each for each in backup.backups(path) if backup.version_in_name(each) <= VERSION]
    way = f"`hostd journal restore {usable[0]}` of that one" if usable else "move the journal away"
    version = migrations.version_of(connection)
    return (
        f"cannot open the journal {path}: schema version {version}, which needs a hostd that reads "
        f"version {min_reader}; this one reads up to {VERSION}; run the newer hostd again, or {way}"
    )


def _mend_meta(connection: sqlite3.Connection) -> None:
    """Without its ID or the number of its last event, a journal counts from 1 again, as another.

    Readers of events know each by journal and number. What the rows held is kept beside them.
    """
    journal_id, seq = read_meta(connection, "journal_id"), read_meta(connection, "seq")
    if JOURNAL_ID.fullmatch(journal_id or "") and number(seq) is not None:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT OR REPLACE INTO meta SELECT 'unreadable:' || key, value FROM meta "
            "WHERE key IN ('journal_id', 'seq')"
        )
        write_meta(connection, "journal_id", str(uuid.uuid4()))
        write_meta(connection, "seq", "0")
    log.error("journal.renumbered", journal_id=ascii(journal_id)[:100], seq=ascii(seq)[:100])


def _mend_numbers(connection: sqlite3.Connection) -> None:
    """Move rows away from the end of the numbers: SQLite would number what follows at random."""
    for table in ("command", "step", "outbox", "audit"):
        connection.execute(f"UPDATE OR IGNORE {table} SET n = -(n / 1024) WHERE n >= {1 << 53}")  # noqa: S608


def read_meta(connection: sqlite3.Connection, key: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def write_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
