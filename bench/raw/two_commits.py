"""The two durable commits of a command that changes something, without hostd.

Its admission and its outcome, with as many pages as SetupNetwork's: once by the thread that owns
the file, one after the other, and once as the journal makes them, each handed to that thread by an
event loop which waits for it. The second is the least that a command can take which is on disk
before its effect, and its outcome before its reply.
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue

PAGE_BYTES = 4000  # of a row's overflow page of 4096
ADMISSION_PAGES, OUTCOME_PAGES = 5, 13

Work = tuple[Callable[[], object], asyncio.Future[None]]


class TwoCommits:
    """A file with one table, and the thread that owns it; made by `two_commits`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self._work, name="two commits")
        self._connection: sqlite3.Connection
        self._took_ms = 0.0

    def close(self) -> None:
        """End the thread after the work before."""
        self._queue.put(None)
        self.thread.join()

    async def alone_ms(self) -> float:
        """Both, by the thread alone."""
        await self._hand_over(self._both)
        return self._took_ms

    async def handed_over_ms(self) -> float:
        """Both, each handed over and waited for."""
        began = time.perf_counter()
        await self._hand_over(partial(self._commit, ADMISSION_PAGES))
        await self._hand_over(partial(self._commit, OUTCOME_PAGES))
        return (time.perf_counter() - began) * 1e3

    async def _hand_over(self, do: Callable[[], object]) -> None:
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((do, done))
        await done

    def _work(self) -> None:
        self._connection = sqlite3.connect(self._path, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, data BLOB)")
            while (work := self._queue.get()) is not None:
                do, done = work
                do()
                self._loop.call_soon_threadsafe(done.set_result, None)
        finally:
            self._connection.close()

    def _both(self) -> None:
        began = time.perf_counter()
        self._commit(ADMISSION_PAGES)
        self._commit(OUTCOME_PAGES)
        self._took_ms = (time.perf_counter() - began) * 1e3

    def _commit(self, pages: int) -> None:
        self._connection.execute("REPLACE INTO t VALUES (1, ?)", (bytes(PAGE_BYTES * pages),))


@contextmanager
def two_commits(path: str) -> Generator[TwoCommits]:
    """Of a new file at `path`, e.g. on the file system of the measured host's journal."""
    commits = TwoCommits(path)
    commits.thread.start()
    try:
        yield commits
    finally:
        commits.close()
