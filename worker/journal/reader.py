"""Reads for questions: a thread and a read-only connection of their own, beside the writer.

A question that waited in the writer's queue would delay the commits behind it. In WAL mode a reader
sees what is committed, and neither waits for a writer nor holds one up (sqlite.org/wal.html).
"""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from worker.journal import schema
from worker.journal.writer import JournalFault

T = TypeVar("T")


class JournalReader:
    """One read at a time, in order. All methods are for the event loop's thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal-reader")

    async def first(self, query: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The first row of a query, or None.

        Raises:
            JournalFault: the file cannot be read now; ask again.
        """

        def read(connection: sqlite3.Connection) -> tuple[Any, ...] | None:
            row: tuple[Any, ...] | None = connection.execute(query, arguments).fetchone()
            return row

        return await self.run(read)

    async def run(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """What `read` returns, in the thread. Raises as `first`."""
        if self._closed:
            raise JournalFault(f"the journal {self._path} is closed")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._run, read)
        except sqlite3.Error as error:
            raise JournalFault(f"cannot read the journal {self._path}: {error}") from error

    async def close(self) -> None:
        """After the last read. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._drop)
        self._thread.shutdown()

    # -- in the thread -------------------------------------------------------------------------

    def _run(self, read: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            self._connection = schema.open_reader(self._path)
        try:
            return read(self._connection)
        except sqlite3.Error:
            self._drop()
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
