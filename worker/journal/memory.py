"""The part of the journal that is kept in memory, so that reads never wait for the disk."""

import asyncio
import sqlite3
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from handlers.mechanism import StepRow
from handlers.steps import Steps
from schemas.envelopes import Command, Reply
from schemas.subjects import Lane
from schemas.trace_context import TraceContext
from worker.journal.instances import Instances, Tombstones
from worker.journal.networks import Networks
from worker.journal.quarantined_rows import Quarantined
from worker.journal.transaction import OutRow, StateRow

OUT_KINDS: Final = ("reply", "direct", "dead", "event")
OUT_CACHE: Final = 2000

T = TypeVar("T")
# Of an outbox row; SQLite keeps any type in any column.
READABLE: Final = (
    "typeof(subject) = 'text' AND typeof(msg_id) = 'text' AND typeof(payload) = 'blob' "
    "AND typeof(headers) = 'blob' AND json_valid(CAST(headers AS TEXT))"
)


class Admission:
    """Whether a command that was taken in is on disk.

    Whoever waits has a future of its own: it continues in the turn after the commit, and its
    cancellation is nobody else's.
    """

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] | None = []
        self._error: BaseException | None = None

    @property
    def decided(self) -> bool:
        return self._waiting is None

    def decide(self, error: BaseException | None = None) -> None:
        """The commit succeeded, or failed with an error."""
        waiting, self._waiting, self._error = self._waiting or (), None, error
        for each in waiting:
            if not each.done():
                each.set_result(None)

    async def wait(self) -> None:
        """Raises the error of the commit."""
        if self._waiting is not None:
            mine = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            await mine
        if self._error is not None:
            raise self._error


class RunTrace(Protocol):
    """What is noted of one run of a command (`worker/tracing/tracing.py`)."""

    steps: Steps | None

    @property
    def context(self) -> TraceContext:
        """Of the command's span."""
        ...

    async def attempt(self, number: int, work: Awaitable[T]) -> T:
        """Await one attempt."""
        ...

    def end(self, reply: Reply) -> None:
        """The outcome is committed."""
        ...


@dataclass(slots=True)
class CommandRow:
    """An unfinished command. `attempts` counts over all workers; `n` is the order of intake.
    `request` is that of the command as it is compared: in the named form.
    `spent_s` of the retry budget were spent by earlier workers, by their monotonic clocks.

    `admission` is that of a command that this worker took in; `withdrawn`: its commit failed.
    `trace` notes its run, if that will be seen.
    """

    n: int
    command: Command
    request: bytes
    lane: Lane
    stream_seq: int
    received_at_ms: int
    attempts: int = 0
    spent_s: float = 0.0
    admission: Admission | None = None
    withdrawn: bool = False
    trace: RunTrace | None = None

    @property
    def id(self) -> str:
        return self.command.id

    async def stored(self) -> None:
        """Return when the command is on disk.

        Raises:
            JournalFault: its commit failed.
        """
        if self.admission is not None:
            await self.admission.wait()


@dataclass(slots=True)
class OutQueue:
    """Unsent rows of one kind in order; those beyond `OUT_CACHE` are in the file only.

    `held` are rows that the bus does not accept as they are; they are part of `count`.
    """

    rows: dict[int, OutRow] = field(default_factory=dict[int, OutRow])
    held: dict[int, OutRow] = field(default_factory=dict[int, OutRow])
    count: int = 0
    last: int = 0
    spilled: bool = False

    def add(self, row: OutRow) -> None:
        self.count += 1
        if self.spilled or len(self.rows) >= OUT_CACHE:
            self.spilled = True
        else:
            self.rows[row.n] = row
            self.last = row.n

    def refill(self, rows: list[OutRow]) -> None:
        for row in rows:
            self.rows[row.n] = row
            self.last = row.n
        self.spilled = len(rows) == OUT_CACHE


@dataclass(slots=True)
class Mirror:
    """The file as of the last commit."""

    commands: dict[str, CommandRow] = field(default_factory=dict[str, CommandRow])
    steps: dict[str, dict[tuple[str, str], StepRow]] = field(
        default_factory=dict[str, dict[tuple[str, str], StepRow]]
    )
    points: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    instances: Instances = field(default_factory=Instances)
    tombstones: Tombstones = field(default_factory=Tombstones)
    networks: Networks = field(default_factory=Networks)
    out: dict[str, OutQueue] = field(default_factory=dict[str, OutQueue])
    states: dict[str, StateRow] = field(default_factory=dict[str, StateRow])
    meta: dict[str, str] = field(default_factory=dict[str, str])
    lanes: dict[Lane, int] = field(default_factory=dict[Lane, int])
    tenants: dict[str | None, int] = field(default_factory=dict[str | None, int])
    quarantined: Quarantined = field(default_factory=Quarantined)

    def add_command(self, row: CommandRow) -> None:
        if row.id not in self.commands:
            self.lanes[row.lane] = self.lanes.get(row.lane, 0) + 1
            tenant_id = row.lane.tenant_id
            self.tenants[tenant_id] = self.tenants.get(tenant_id, 0) + 1
        self.commands[row.id] = row

    def drop_command(self, command_id: str) -> None:
        row = self.commands.pop(command_id, None)
        if row is None:
            return
        self.lanes[row.lane] -= 1
        if not self.lanes[row.lane]:
            del self.lanes[row.lane]
        tenant_id = row.lane.tenant_id
        self.tenants[tenant_id] -= 1
        if not self.tenants[tenant_id]:
            del self.tenants[tenant_id]

    @property
    def unsent(self) -> int:
        return sum([queue.count for queue in self.out.values()])


def read_out(connection: sqlite3.Connection, kind: str, *, after: int) -> list[OutRow]:
    """The next unsent rows of a kind, at most `OUT_CACHE`."""
    rows = connection.execute(
        "SELECT n, kind, subject, msg_id, headers, payload FROM outbox "  # noqa: S608 - constants
        f"WHERE kind = ? AND n > ? AND {READABLE} ORDER BY n LIMIT ?",
        (kind, after, OUT_CACHE),
    )
    return [OutRow(*row) for row in rows]
