"""The one thread that writes the journal.

Why a thread. A commit with fsync(2) takes from 100 us to many ms, and SQLite has no asynchronous
interface. So one thread owns the connection, and the event loop only exchanges objects with it: a
queue towards the thread, `call_soon_threadsafe` back. Nothing else touches the connection, so
there is no lock, and no two writers. Memory (`memory.Mirror`) is changed on the loop only.

Group commit. Everything that waits when the thread is free becomes one transaction, up to `BATCH`
parts. While it syncs, the next parts queue up: under load a sync serves many commands, alone each
has its own. An error of one part (a constraint, a bug) is raised to its caller only and undoes
nothing else: all parts are done again, each in a savepoint. So a part may be done twice, and its
`do` changes nothing but the transaction. Parts are committed in the order of submission, so
what was submitted later is never on disk without what was submitted before. Callers rely on that:
a step that needs no sync is on disk with the outcome that follows it.

Durability. A part asks for one of three levels:

- `submit(durable=True)`: the transaction is synced (`synchronous=FULL`) before the caller
  continues. Admissions, outcomes, points of no return, and steps whose effect survives a reboot.
- `submit()`: in the write-ahead log of the process (`synchronous=NORMAL`) before the caller
  continues. It survives kill -9 but not a power loss, which also removes the effect it is about.
- `later()`: with the next commit, or within a time of its own. Nobody waits. It survives nothing
  until then: what is sent to the bus but not yet deleted here is sent again, and deduplicated by a
  stream for a while, not at an inbox.

If one part of a batch is durable, the whole batch is. `submit_soon` is `submit(durable=True)` that
leaves two turns of the loop for further parts to join, so that a command that changes nothing is
admitted and finished in one commit.

Commands are admitted in the order in which they came, also around a fault: a part that is
`in_order` fails as well if one before it failed and whoever waits for that could not know yet, so
that both are submitted again, in order.

After a commit. `committed` brings memory up to date, then each part's `apply`, then each caller's
future: on the loop, in one callback, in the order of the file. So no task sees memory ahead of
the file, or half of a commit.

On a fault (disk full, I/O error) `relieve` is called, which may free space, and the transaction is
rolled back and all its parts fail with `JournalFault`; `writable` becomes false and intake stops.
The connection is closed and the file is opened again: after a failed fsync the pages that SQLite
has in memory prove nothing (the kernel may drop dirty pages that it could not write). A probe, a
row in `meta`, is written with FULL every `PROBE_S` until a commit succeeds. Then the whole file is
read again, since the failed commit may be in it or not, and `reopened` replaces memory with it
before `writable` becomes true. Reads work throughout, as far as the file can be opened.
"""

import asyncio
import contextlib
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import structlog

from handlers.errors import HostFault, RecordFault
from worker.journal import schema
from worker.journal.transaction import Transaction

BATCH: Final = 256
LAZY_S: Final = 0.02
PROBE_S: Final = 0.5

T = TypeVar("T")
log = structlog.get_logger()


class JournalFault(RecordFault):
    """The journal cannot commit now. It retries until the disk works.

    What was to be committed is not in memory. Seldom it is in the file all the same: once that
    was read again, memory has it.
    """


class Relieve(Protocol):
    def __call__(self, *, full: bool) -> None: ...


def keep_space(*, full: bool) -> None:
    """The `relieve` of a journal beside which nothing can be freed."""


@dataclass(slots=True)
class _Part(Generic[T]):
    do: Callable[[Transaction], T]
    apply: Callable[[T], None] | None = None
    future: asyncio.Future[T] | None = None
    durable: bool = False
    read: bool = False
    failed: Callable[[BaseException], None] | None = None
    faults: int | None = None  # if it is in order: those that the loop knew of at its submission
    result: T | None = None
    error: BaseException | None = None

    def resolve(self) -> None:
        """On the loop: bring memory up to the commit, then resolve the caller's future."""
        if self.error is None and self.apply is not None:
            self.apply(self.result)  # type: ignore[arg-type]
        elif self.error is not None and self.failed is not None:
            self.failed(self.error)
        elif self.error is not None and self.future is None:
            _log_lost(self.error)
        if self.future is None or self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)  # type: ignore[arg-type]
        else:
            self.future.set_exception(self.error)


def _log_lost(error: BaseException) -> None:
    """Nobody waits for the part; after a fault of the disk, the file is read again anyway."""
    if not isinstance(error, JournalFault):
        log.error("journal.part_failed", error=repr(error))


class Writer:
    """Owns the connection and the thread. All methods are for the event loop's thread.

    Args:
        committed: called on the loop after each commit, before its callers continue.
        load: called in the thread after a fault, once it can commit again; what it read of the
            whole file goes to `reopened` on the loop.
        changed: called on the loop when `writable` changed.
        observe: seconds of each commit.
        relieve: called in the thread after a failed commit, with `full` true if there was no space.
    """

    def __init__(
        self,
        path: str,
        *,
        committed: Callable[[Transaction], None],
        load: Callable[[sqlite3.Connection], T],
        reopened: Callable[[T], None],
        changed: Callable[[bool], None],
        observe: Callable[[float], None],
        relieve: Relieve = keep_space,
    ) -> None:
        self.writable = True
        self._path = path
        self._committed = committed
        self._load: Callable[[sqlite3.Connection], Any] = load
        self._reopened: Callable[[Any], None] = reopened
        self._changed = changed
        self._observe = observe
        self._relieve = relieve
        self._queue: queue.SimpleQueue[list[_Part[Any]] | None] = queue.SimpleQueue()
        self._later: list[_Part[Any]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = math.inf  # when it fires, by the loop's clock
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._connection: sqlite3.Connection | None = None
        self._seq = self._n = self._at_ms = 0
        self._syncs: bool | None = None  # what the connection's `synchronous` was set to
        self._faulty = False
        self._faults = self._known_faults = 0  # commits that failed; those that the loop knows of
        self._closing = False

    def start(self, connection: sqlite3.Connection) -> None:
        """Take over an open connection."""
        self._adopt(connection)
        self._thread.start()

    def submit(
        self,
        do: Callable[[Transaction], T],
        *,
        apply: Callable[[T], None] | None = None,
        durable: bool = False,
        in_order: bool = False,
    ) -> asyncio.Future[T]:
        """Run `do` in the next commit; the future is done after it, synced if `durable`.

        Raises:
            JournalFault: from the future; the commit failed, or if it is `in_order`, one before it.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        faults = self._known_faults if in_order else None
        if in_order and not self.writable:
            future.set_exception(self._overtakes())
        else:
            self._put(_Part(do, apply, future, durable, faults=faults))
        return future

    def submit_soon(
        self,
        do: Callable[[Transaction], T],
        *,
        apply: Callable[[T], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Like `submit`, durably and in order; parts of the next two turns of the loop join its
        commit. For a time at which the journal is writable.

        `failed` is called, with the error, where `apply` would have been.
        """
        if self._closing:
            raise JournalFault(f"the journal {self._path} is closed")
        faults = self._known_faults
        self._later.append(_Part(do, apply, durable=True, failed=failed, faults=faults))
        self._loop.call_soon(self._loop.call_soon, self._flush)

    @property
    def seq(self) -> int:
        """Of the last event that was committed."""
        return self._seq

    def later(
        self,
        do: Callable[[Transaction], T],
        *,
        apply: Callable[[T], None] | None = None,
        within_s: float = LAZY_S,
    ) -> None:
        """Run `do` with the next commit, or within a time; nobody waits for it."""
        self._later.append(_Part(do, apply))
        at_s = self._loop.time() + within_s
        if at_s < self._due_s:
            if self._timer is not None:
                self._timer.cancel()
            self._due_s, self._timer = at_s, self._loop.call_at(at_s, self._flush)

    def read(
        self, do: Callable[[Transaction], T], *, apply: Callable[[T], None] | None = None
    ) -> asyncio.Future[T]:
        """Read what is committed, also while nothing can be written."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._put(_Part(do, apply, future, read=True))
        return future

    @property
    def thread(self) -> threading.Thread:
        """For the log of one that hangs."""
        return self._thread

    async def close(self) -> None:
        """Commit what was submitted, then close the file."""
        self._flush()
        self._closing = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        # the last parts' callbacks were scheduled by the thread before it ended
        await asyncio.sleep(0)

    def _put(self, part: _Part[Any]) -> None:
        if self._closing:
            raise JournalFault(f"the journal {self._path} is closed")
        self._later.append(part)
        self._flush()

    def _flush(self) -> None:
        """Hand over everything in the order of submission."""
        if self._timer is not None:
            self._timer.cancel()
            self._due_s, self._timer = math.inf, None
        parts, self._later = self._later, []
        if parts:
            self._queue.put(parts)

    # -- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        more = True
        while more:
            batch, more = self._gather()
            writes = self._in_order([part for part in batch if not part.read])
            if writes or self._faulty:
                self._write(writes)
            for part in batch:
                if part.read:
                    self._read(part)
            reads = [part for part in batch if part.read]
            if reads:
                self._loop.call_soon_threadsafe(_resolve, reads)
        if self._connection is not None:
            self._connection.close()

    def _gather(self) -> tuple[list[_Part[Any]], bool]:
        """Wait for work and take all that there is; false when the journal closes."""
        batch: list[_Part[Any]] = []
        timeout = PROBE_S if self._faulty else None
        with contextlib.suppress(queue.Empty):
            while len(batch) < BATCH:
                parts = self._queue.get(timeout=timeout)
                if parts is None:
                    return batch, False
                batch += parts
                timeout = 0.0
        return batch, True

    def _in_order(self, parts: list[_Part[Any]]) -> list[_Part[Any]]:
        """Those that may be committed; the others fail, since one before them has failed."""
        late = [part for part in parts if part.faults not in (None, self._faults)]
        if not late:
            return parts
        for part in late:
            part.error = self._overtakes()
        self._loop.call_soon_threadsafe(_resolve, late)
        return [part for part in parts if part.error is None]

    def _overtakes(self) -> JournalFault:
        return JournalFault(f"a commit to the journal {self._path} before this one failed")

    def _adopt(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        self._connection, self._syncs = connection, None
        self._seq = schema.number(schema.read_meta(connection, "seq")) or 0
        (last,) = connection.execute("SELECT max(n) FROM outbox").fetchone()
        self._n = max(self._n, last or 0)
        return connection

    def _write(self, batch: list[_Part[Any]]) -> None:
        started = time.perf_counter()
        loaded: Any = None
        try:
            connection = self._connection or self._adopt(schema.open_file(self._path))
            transaction = self._transact(connection, batch)
            if self._faulty:
                loaded = self._load(connection)
        except (sqlite3.Error, OSError, HostFault) as error:
            self._fail(batch, error)
            return
        self._seq, self._n = transaction.seq, transaction.n
        self._at_ms = transaction.at_ms
        recovered, self._faulty = self._faulty, False
        seconds = time.perf_counter() - started
        self._loop.call_soon_threadsafe(
            self._finish, batch, transaction, seconds, recovered, loaded
        )

    def _transact(self, connection: sqlite3.Connection, batch: list[_Part[Any]]) -> Transaction:
        durable = self._faulty or any(part.durable for part in batch)
        if durable != self._syncs:
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._syncs = durable
        transaction = self._begin(connection)
        try:
            for part in batch:
                part.result = part.do(transaction)
        except Exception as error:
            if _is_of_the_file(error):
                raise
            connection.execute("ROLLBACK")
            transaction = self._begin(connection)
            for part in batch:
                _do_apart(transaction, part)
        if self._faulty:
            schema.write_meta(connection, "probe", str(time.time()))
        if transaction.seq != self._seq:
            schema.write_meta(connection, "seq", str(transaction.seq))
        connection.execute("COMMIT")
        return transaction

    def _begin(self, connection: sqlite3.Connection) -> Transaction:
        connection.execute("BEGIN IMMEDIATE")
        return Transaction(connection, self._seq, self._n, self._at_ms)

    def _read(self, part: _Part[Any]) -> None:
        if self._connection is None:
            part.error = JournalFault(
                f"cannot read the journal {self._path}: opening it after a failed commit failed"
            )
            return
        try:
            part.result = part.do(Transaction(self._connection, self._seq, self._n))
        except sqlite3.Error as error:
            part.error = JournalFault(f"cannot read the journal {self._path}: {error}")
        except Exception as error:  # noqa: BLE001 - raised to its caller
            part.error = error

    def _fail(self, batch: list[_Part[Any]], error: Exception) -> None:
        first, self._faulty = not self._faulty, True
        self._faults += 1
        if self._connection is not None:
            self._connection.close()  # rolls back
        self._connection = None
        self._relieve(full=getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL)
        with contextlib.suppress(sqlite3.Error, OSError, HostFault):
            self._adopt(schema.open_file(self._path))
        for part in batch:
            part.result = None
            part.error = JournalFault(
                f"cannot commit to the journal {self._path}: {error}; check its file system"
            )
            part.error.__cause__ = error
        self._loop.call_soon_threadsafe(self._broke, batch, error, first, self._faults)

    # -- back on the loop ----------------------------------------------------------------------

    def _finish(
        self,
        batch: list[_Part[Any]],
        transaction: Transaction,
        seconds: float,
        recovered: bool,
        loaded: Any,
    ) -> None:
        self._observe(seconds)
        try:
            if recovered:
                self._reopened(loaded)
            else:
                self._committed(transaction)
        except Exception:
            # It is committed: whoever waits for it must go on.
            log.exception("journal.callback_failed")
        _resolve(batch)
        if recovered:
            log.info("journal.recovered")
            self.writable = True
            self._changed(True)

    def _broke(self, batch: list[_Part[Any]], error: Exception, first: bool, faults: int) -> None:
        self.writable = False
        self._known_faults = faults
        _resolve(batch)
        if first:
            log.error("journal.commit_failed", error=str(error), path=self._path)
            self._changed(False)


def _do_apart(transaction: Transaction, part: _Part[Any]) -> None:
    """Do one part so that its error undoes no other's work."""
    before = (transaction.seq, len(transaction.out), len(transaction.states))
    transaction.execute("SAVEPOINT part")
    try:
        part.result = part.do(transaction)
    except Exception as error:
        if _is_of_the_file(error):
            raise
        part.result, part.error = None, error  # raised to its caller
        transaction.execute("ROLLBACK TO part")
        transaction.seq = before[0]
        del transaction.out[before[1] :]
        del transaction.states[before[2] :]
    transaction.execute("RELEASE part")


def _is_of_the_file(error: Exception) -> bool:
    """A fault of the disk or the file, e.g. a malformed image; not of one part."""
    return isinstance(error, sqlite3.OperationalError | sqlite3.InternalError) or (
        type(error) is sqlite3.DatabaseError
    )


def _resolve(batch: list[_Part[Any]]) -> None:
    for part in batch:
        part.resolve()
