"""The open journal file: its writer, what memory holds of it, and whether it can commit.

The parts of the journal (`commands`, `steps`, `records`, `outbox`) share one store. They submit
changes to its `writer` and read its `mirror`; state that concerns one part is that part's own.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Final, Self

from handlers.clock import now_ms
from handlers.errors import HostFault
from schemas.envelopes import Command
from schemas.subjects import Subjects
from schemas.trace_context import TraceContext, parse
from worker.journal import loading, schema
from worker.journal.memory import Mirror
from worker.journal.migration import backup
from worker.journal.reader import JournalReader
from worker.journal.transaction import EventDraft, EventSource, Transaction
from worker.journal.writer import JournalFault, Relieve, Writer, keep_space

JOURNAL_ID: Final = "journal_id"


def trace_as_sent(command: Command) -> TraceContext | None:
    """Without spans of hostd's own: what follows is below the sender's."""
    return parse(command.traceparent, command.tracestate)


@contextlib.contextmanager
def _faults(path: str) -> Generator[None]:
    """What can be waited for is told from what an operator has to end.

    Source: sqlite3 raises OperationalError for what the system refuses (full, busy, I/O error), and
    DatabaseError itself for a file that is damaged.
    """
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise JournalFault(
            f"cannot open the journal {path}: {error}; check [paths] state"
        ) from error
    except sqlite3.Error as error:
        raise HostFault(
            f"cannot open the journal {path}: it is damaged ({error}); put a backup back with "
            "`hostd journal restore`, or move it away to start with an empty one"
        ) from error


class Store:
    """Open, close, watch, and small facts (`meta`). Made by `open`, on the event loop.

    Attributes:
        mirror: the file as of the last commit; replaced after a fault, so never kept by a part.
        reader: a second connection, for short reads on the loop.
        questions: a third one with its own thread, for reads that no command waits for.
        now_ms: Unix time in milliseconds.
        trace_of: the span of a command, for its replies and events; None: it has no trace.
    """

    def __init__(
        self,
        path: str,
        mirror: Mirror,
        source: EventSource,
        reader: sqlite3.Connection,
        *,
        observe_commit: Callable[[float], None],
        relieve: Relieve,
        clock_ms: Callable[[], int],
    ) -> None:
        self.path = path
        self.trace_of: Callable[[Command], TraceContext | None] = trace_as_sent
        self.source = replace(source, trace_of=self._trace_of)
        self.mirror = mirror
        self.reader = reader
        self.questions = JournalReader(path)
        self.now_ms = clock_ms
        self.writer = Writer(
            path,
            committed=self._committed,
            load=loading.load,
            reopened=self._reopened,
            changed=self._writable_changed,
            observe=observe_commit,
            relieve=relieve,
        )
        self._watchers: list[Callable[[], None]] = []
        self._commit_hooks: list[Callable[[Transaction], None]] = []
        self._reload_hooks: list[Callable[[Mirror], None]] = []
        self._writable = asyncio.Event()
        self._writable.set()
        self._applied = _seq_of(mirror)

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        subjects: Subjects,
        boot_id: str,
        observe_commit: Callable[[float], None] = lambda seconds: None,
        relieve: Relieve = keep_space,
        clock_ms: Callable[[], int] = now_ms,
    ) -> Self:
        """Open the file, or make it with a new `journal_id`. One process at a time.

        Raises:
            JournalFault: it cannot be opened or written now, e.g. on a read-only file system.
            HostFault: a newer hostd wrote it, it is damaged, or it is not a journal.
        """
        with _faults(path):
            connection = await asyncio.to_thread(schema.open_file, path)
            try:
                await asyncio.to_thread(backup.prune, path)
                mirror = await asyncio.to_thread(loading.load, connection)
                store = cls(
                    path,
                    mirror,
                    EventSource(subjects, boot_id, mirror.meta[JOURNAL_ID]),
                    schema.open_reader(path),
                    observe_commit=observe_commit,
                    relieve=relieve,
                    clock_ms=clock_ms,
                )
            except BaseException:
                connection.close()
                raise
        store.writer.start(connection)
        return store

    async def close(self) -> None:
        """Commit what was submitted and close the file."""
        await self.writer.close()
        await self.questions.close()
        self.reader.close()

    @property
    def journal_id(self) -> str:
        """Made with the file; part of every event's ID."""
        return self.source.journal_id

    @property
    def subjects(self) -> Subjects:
        return self.source.subjects

    @property
    def seq(self) -> int:
        """Of the last event that was committed."""
        return self.writer.seq

    @property
    def applied(self) -> int:
        """`seq` of the last event that what is in memory reflects."""
        return self._applied

    # -- whether it can commit -----------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """False from a failed commit until one succeeds again."""
        return self.writer.writable

    async def until_writable(self) -> None:
        await self._writable.wait()

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` on the loop when `writable` or the outbox's `backlogged` changed."""
        self._watchers.append(changed)

    def notify(self) -> None:
        """Call the watchers."""
        for changed in self._watchers:
            changed()

    def _writable_changed(self, writable: bool) -> None:
        if writable:
            self._writable.set()
        else:
            self._writable.clear()
        self.notify()

    # -- small facts ---------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """A fact kept by `put_meta`, e.g. the boot ID that the journal last saw."""
        return self.mirror.meta.get(key)

    async def put_meta(self, key: str, value: str, *, event: EventDraft | None = None) -> None:
        """Keep a fact, durably, and publish an event of it, in one commit."""
        at_ms = self.now_ms()

        def save(tx: Transaction) -> None:
            schema.write_meta(tx.connection, key, value)
            if event is not None:
                self.source.event(tx, event, at_ms)

        def apply(_: None) -> None:
            self.mirror.meta[key] = value

        await self.writer.submit(save, apply=apply, durable=True)

    def _trace_of(self, command_id: str) -> TraceContext | None:
        row = self.mirror.commands.get(command_id)
        return None if row is None else self.trace_of(row.command)

    # -- for the parts -------------------------------------------------------------------------

    def on_commit(self, hook: Callable[[Transaction], None]) -> None:
        """Call `hook` on the loop after each commit, before the callers of its parts continue."""
        self._commit_hooks.append(hook)

    def on_reload(self, hook: Callable[[Mirror], None]) -> None:
        """Call `hook` after a fault with the mirror that replaces the one in use.

        The file alone says what was committed; the hook adds what exists in memory only.
        """
        self._reload_hooks.append(hook)

    def _committed(self, transaction: Transaction) -> None:
        self._applied = transaction.seq  # the parts are applied in the same turn of the loop
        for hook in self._commit_hooks:
            hook(transaction)

    def _reopened(self, mirror: Mirror) -> None:
        for hook in self._reload_hooks:
            hook(mirror)
        self.mirror = mirror
        self._applied = _seq_of(mirror)


def _seq_of(mirror: Mirror) -> int:
    return schema.number(mirror.meta["seq"]) or 0
