"""Backups of the journal, made before its tables change: `<journal>.v<version>-<time>.backup`.

The time is UTC. A backup is one file, mode 0600, synced before it gets its name; a file that ends
in `.part` is what a kill left, and goes with the next one. The newest `KEPT` are kept, each for
`KEEP_S`; they can be removed by hand at any time.

Source: sqlite.org/backup.html; sqlite.org/wal.html (the header says that a file is in WAL mode).
"""

import contextlib
import glob
import os
import re
import sqlite3
import time
from collections.abc import Callable, Generator
from typing import Final

import structlog

KEPT: Final = 3
KEEP_S: Final = 30 * 24 * 3600
NAME: Final = re.compile(r".*\.v([0-9]{1,9})-[0-9]{8}T[0-9]{6}Z(?:\.[0-9]+)?\.backup")

log = structlog.get_logger()


def backups(path: str) -> list[str]:
    """Those of this journal, newest first.

    Raises:
        PermissionError: its directory cannot be read.
    """
    directory, name = os.path.split(path)
    names = os.listdir(directory or ".") if os.path.lexists(directory or ".") else []
    found = [os.path.join(directory, each) for each in names if each.startswith(f"{name}.v")]
    found = [each for each in found if NAME.fullmatch(each)]
    times: dict[str, int] = {}
    for name in found:
        with contextlib.suppress(OSError):  # removed by hand meanwhile
            times[name] = os.stat(name).st_mtime_ns
    return sorted(times, key=lambda each: (times[each], each), reverse=True)


def version_in_name(backup: str) -> int:
    """The version of the tables of one that `backups` lists."""
    match = NAME.fullmatch(backup)
    return int(match[1]) if match else 0


def make(
    connection: sqlite3.Connection,
    path: str,
    version: int,
    *,
    reached: Callable[[str], None] = lambda point: None,
) -> str:
    """Copy what is committed; returns the backup's path.

    Raises:
        sqlite3.Error, OSError: there is no backup, and nothing of it is left.
    """
    prune(path)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target, number = f"{path}.v{version}-{stamp}.backup", 1
    while os.path.lexists(target):  # within one second
        target, number = f"{path}.v{version}-{stamp}.{number}.backup", number + 1
    reached("backup begins")
    with _removed_on_error(part := f"{target}.part"):
        copy(connection, part, reached=reached)
        os.rename(part, target)
        reached("backup renamed")
    sync_directory(path)
    prune(path)
    reached("backup made")
    log.info("journal.backed_up", path=target, version=version)
    return target


def copy(
    connection: sqlite3.Connection,
    target: str,
    *,
    reached: Callable[[str], None] = lambda point: None,
) -> None:
    """Copy what is committed into a new file that needs no others beside it, and sync it."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as twin:
        connection.backup(twin)
        reached("backup copied")
        twin.execute("PRAGMA journal_mode=DELETE")
        (found,) = twin.execute("PRAGMA quick_check(1)").fetchone()
        # One that is as damaged as its source is what there is to keep.
        if found != "ok" and connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
            raise sqlite3.DatabaseError(f"the copy {target} is damaged: {found}")
    file = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    reached("backup synced")


def prune(path: str, kept: int = KEPT) -> None:
    """Remove what is left of a backup that was cut off, and all but the newest, not older ones.

    What cannot be removed stays, and is logged.
    """
    oldest_s = time.time() - KEEP_S
    parts = glob.glob(f"{glob.escape(path)}.v*.backup.part*")
    for number, name in enumerate(backups(path)):
        with contextlib.suppress(OSError):
            if number >= kept or os.stat(name).st_mtime < oldest_s:
                parts.append(name)
    for name in parts:
        try:
            os.unlink(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("journal.backup_not_removed", path=name, error=str(error))


def sync_directory(path: str) -> None:
    """Make the names beside the journal durable."""
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _removed_on_error(file: str) -> Generator[None]:
    try:
        yield
    except Exception:
        for name in (file, f"{file}-journal", f"{file}-wal", f"{file}-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        raise
