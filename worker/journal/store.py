"""The open journal: its file, its memory, whether it can take more. The base of its parts."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from typing import Final, Self

from handlers.errors import HostFault
from schemas.subjects import Subjects
from worker.journal import memory, schema
from worker.journal.events import Source
from worker.journal.memory import Mirror
from worker.journal.transaction import Transaction
from worker.journal.writer import Writer

BACKLOG_ROWS: Final = 100_000
JOURNAL_ID: Final = "journal_id"


def now_ms() -> int:
    """Unix time in milliseconds."""
    return int(time.time() * 1000)


class JournalFile:
    """Open, close, watch, and the small facts (`meta`). Made by `open`, on the event loop."""

    def __init__(
        self,
        path: str,
        mirror: Mirror,
        source: Source,
        reader: sqlite3.Connection,
        *,
        lane_depth: int,
        host_depth: int,
        observe_commit: Callable[[float], None],
        clock_ms: Callable[[], int],
    ) -> None:
        self.path = path
        self.source = source
        self.lane_depth = lane_depth
        self.host_depth = host_depth
        self._mirror = mirror
        self._reader = reader
        self._undecided: set[str] = set()  # ids that are being looked up in the file
        self._now_ms = clock_ms
        self._watchers: list[Callable[[], None]] = []
        self._writable = asyncio.Event()
        self._writable.set()
        self._taking = True
        self._arrivals: dict[str, asyncio.Event] = {}
        self._gone: set[int] = set()  # sent, but perhaps still in the file
        self._forgetting = False
        self._writer = Writer(
            path,
            committed=self._committed,
            load=memory.load,
            reopened=self._reopened,
            changed=self._changed,
            observe=observe_commit,
        )

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        subjects: Subjects,
        boot_id: str,
        lane_depth: int = 100,
        host_depth: int = 5000,
        observe_commit: Callable[[float], None] = lambda seconds: None,
        clock_ms: Callable[[], int] = now_ms,
    ) -> Self:
        """Open the file, or make it with a new `journal_id`. One process at a time.

        Raises:
            HostFault: it is of a newer hostd, no journal, or cannot be opened.
        """
        try:
            connection = await asyncio.to_thread(schema.open_file, path)
        except sqlite3.Error as error:
            raise HostFault(f"the journal {path} cannot be opened: {error}") from error
        try:
            mirror = await asyncio.to_thread(memory.load, connection)
            source = Source(subjects, boot_id, mirror.meta[JOURNAL_ID])
            journal = cls(
                path,
                mirror,
                source,
                schema.open_reader(path),
                lane_depth=lane_depth,
                host_depth=host_depth,
                observe_commit=observe_commit,
                clock_ms=clock_ms,
            )
        except BaseException:
            connection.close()
            raise
        journal._writer.start(connection)
        return journal

    async def close(self) -> None:
        """Commit what was submitted and close the file."""
        await self._writer.close()
        self._reader.close()

    @property
    def journal_id(self) -> str:
        return self.source.journal_id

    @property
    def seq(self) -> int:
        """Of the last event that was committed."""
        return self._writer.seq

    # -- can it take more ----------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """False from a failed commit until one succeeds again."""
        return self._writer.writable

    @property
    def backlogged(self) -> bool:
        """Too much is unsent: take no more commands until the outbox has drained a tenth."""
        limit = BACKLOG_ROWS if self._taking else BACKLOG_ROWS * 9 // 10
        return self._mirror.unsent >= limit

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called on the loop whenever `writable` or `backlogged` may have."""
        self._watchers.append(changed)

    async def until_writable(self) -> None:
        await self._writable.wait()

    def _changed(self, writable: bool) -> None:
        if writable:
            self._writable.set()
        else:
            self._writable.clear()
        self._tell()

    def _tell(self) -> None:
        self._taking = self.writable and not self.backlogged
        for changed in self._watchers:
            changed()

    # -- small facts ---------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """A fact kept by `put_meta`, e.g. the boot id that the journal last saw."""
        return self._mirror.meta.get(key)

    async def put_meta(self, key: str, value: str) -> None:
        """Keep a fact, durably."""

        def apply(_: None) -> None:
            self._mirror.meta[key] = value

        await self._writer.submit(
            lambda tx: schema.write_meta(tx.connection, key, value),
            apply=apply,
            durable=True,
        )

    # -- after a commit ------------------------------------------------------------------------

    def _committed(self, transaction: Transaction) -> None:
        for row in transaction.out:
            self._mirror.out[row.kind].add(row)
            self._arrival(row.kind).set()
        for state in transaction.states:
            self._mirror.states[state.key] = state
            self._arrival("state").set()
        if transaction.out and self._taking and self.backlogged:
            self._tell()

    def _reopened(self, mirror: Mirror) -> None:
        """After a fault the file alone says what was committed."""
        for command_id, known in self._mirror.commands.items():
            if command_id in mirror.commands:
                mirror.commands[command_id] = known  # lanes hold it, and it counts attempts
            elif known.admission is not None and not known.admission.done():
                mirror.add_command(known)
        for queue in mirror.out.values():
            for n in self._gone & queue.rows.keys():
                del queue.rows[n]
                queue.count -= 1
        self._mirror = mirror
        self._forgetting = False  # what was to be forgotten failed with the rest
        for kind in (*memory.OUT_KINDS, "state"):
            self._arrival(kind).set()

    def _arrival(self, kind: str) -> asyncio.Event:
        return self._arrivals.setdefault(kind, asyncio.Event())
