"""Do in order, undo last first, also across a kill of the worker.

Rows. Each step that makes a resource is a row of the journal: command id, mechanism, key, and
whether the resource existed before. The row is committed before the effect. So undo needs no
closure: it is `mechanism.remove(key)`, rebuilt from the row by whichever worker runs it. Whether
the commit is also synced is the mechanism's `durability`.

Existed before. Undo must not remove what was there already, and must remove what an earlier run of
the same command made. Both follow from the row of the *first* run: `existed` is read from the
kernel before the effect, under the lane's lock, never guessed from EEXIST, and a later run keeps
the row it finds. A kill between the row and the effect is harmless: the row says "not there
before", and to remove an absent resource is success.

Undo order. Undo walks the rows in reverse. Where steps run concurrently, `announce` commits all
their rows at once, in the order whose reverse is the order of the undo, however the effects
interleave. A row whose step never began (in any run) is not undone: its resource may belong to
another command by then.

Points of no return. `reach` commits that the command cannot be undone any more, and `finalize`
says so of a command that never can. From there on it is only completed: by retries, or by the next
worker under the same id. `mark` is weaker: something may have happened that must not happen twice
(a boot), but the rest can still be undone.

Cancellation. Effects are not cancelled to end a command: `handlers/control.py` ends it between
two steps, or in a wait that may be abandoned. Undo runs to its end whatever is cancelled around
it, each removal within UNDO_TIMEOUT_S; what cannot be removed, or may still be made by a call that
was abandoned (`Abandoned`), is reported in `left_behind`, its row stays, and the reconciler tries
again (`worker/reconcile`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

from handlers.cancellation import finish
from handlers.control import Control
from handlers.errors import Abandoned, Failure, RecordFault
from handlers.mechanism import Durability, Keyed, Mechanism, Removable, StepIntent, StepLog, StepRow
from schemas.envelopes import StepTaken
from schemas.records import InstanceRecord, NetworkRecord, Tombstone

log = structlog.get_logger()
UNDO_TIMEOUT_S = 30.0

T = TypeVar("T")
SpecT = TypeVar("SpecT", bound=Keyed, contravariant=True)


class Failpoint(Protocol):
    def __call__(self, moment: str) -> Awaitable[None]:
        """Called at each point; a crash test stops there. `intent:<step>`: its row is about to be
        committed; `before:<step>`: it is, the effect follows; `after:<step>`: the effect is made.
        """
        ...


async def no_failpoint(moment: str) -> None:
    """The failpoint of a worker in production: none."""


class Steps:
    """The steps of one run of one command."""

    def __init__(
        self,
        command_id: str,
        step_log: StepLog,
        mechanisms: Mapping[str, Removable],
        *,
        control: Control | None = None,
        stored: Callable[[], Awaitable[None]] | None = None,
        failpoint: Failpoint = no_failpoint,
        observe: Callable[[str, float], None] = lambda step, seconds: None,
    ) -> None:
        self.command_id = command_id
        self.control = control or Control()
        self.taken: list[StepTaken] = []
        self.ended_s: list[float] = []  # when each of them did, by perf_counter()
        self.doing: list[tuple[str, float]] = []  # steps that run now, since which perf_counter()
        self._log = step_log
        self._stored = stored
        self._mechanisms = mechanisms
        self._failpoint = failpoint
        self._observe = observe
        self._existed: dict[tuple[str, str], bool] = {}
        self._looked: dict[tuple[str, str], bool] = {}
        self._untouched: set[tuple[str, str]] = set()
        self._pending: dict[tuple[str, str], Callable[[], bool]] = {}

    # -- doing ---------------------------------------------------------------------------------

    async def look(self, *planned: tuple[Removable, str]) -> None:
        """Find out which of these exist, beside what else the command reads; for `announce`.

        Under the locks that the resources are made under.
        """
        found = await asyncio.gather(*(mechanism.exists(key) for mechanism, key in planned))
        names = ((mechanism.name, key) for mechanism, key in planned)
        self._looked |= dict(zip(names, found, strict=True))

    async def announce(self, *planned: tuple[Removable, str]) -> None:
        """Record in one commit that this command is about to make these resources.

        Undo goes through them in reverse, in whatever order they were made; what was not begun is
        not undone. Only for resources that nothing else makes while the command's lane is busy.

        Raises:
            Superseded, Expired, Halted: see `Control.safe_point`.
        """
        self.control.safe_point()
        names = [(mechanism.name, key) for mechanism, key in planned]
        if not self._looked.keys() >= set(names):
            await self.look(*planned)
        self._existed |= {name: self._looked.pop(name) for name in names}
        recorded = {(row.mechanism, row.key) for row in self._log.rows(self.command_id)}
        intents = [
            _intent(mechanism, key, existed=self._existed[mechanism.name, key])
            for mechanism, key in planned
        ]
        self._untouched |= set(names) - recorded
        for mechanism, _ in planned:
            await self._failpoint(f"intent:{mechanism.name}")
        await self._log.begin(self.command_id, *intents)

    async def ensure(self, mechanism: Mechanism[SpecT, T], spec: SpecT) -> T:
        """Make one resource, after the commit of its row.

        Raises:
            Superseded, Expired, Halted: at the safe point before it; it was not begun.
        """
        self.control.safe_point()
        existed = self._existed.pop((mechanism.name, spec.key), None)
        if existed is None:
            existed = await mechanism.exists(spec.key)
            await self._failpoint(f"intent:{mechanism.name}")
        self._untouched.discard((mechanism.name, spec.key))
        intent = _intent(mechanism, spec.key, existed=existed)
        (row,) = await self._log.begin(self.command_id, intent)
        try:
            return await self._timed(
                mechanism.name,
                lambda: mechanism.ensure(spec),
                outcome="found" if existed and row.existed else "done",
                on_host=mechanism.durability is not Durability.IMPLIED,
            )
        except Abandoned as error:
            self._pending[mechanism.name, spec.key] = error.pending
            raise

    async def ensure_kept(self, mechanism: Mechanism[SpecT, T], spec: SpecT) -> T:
        """As `ensure`, for a resource that undo must keep: no row is written."""
        return await self.act(mechanism.name, lambda: mechanism.ensure(spec))

    async def remove(self, mechanism: Removable, key: str) -> None:
        """Remove one resource; never undone, so no row is needed."""
        await self._timed(f"remove_{mechanism.name}", lambda: mechanism.remove(key))

    async def act(self, name: str, do: Callable[[], Awaitable[T]]) -> T:
        """A step that makes no resource, e.g. `resume_vm`; timed and listed in the reply."""
        if not self.control.final:
            self.control.safe_point()
        return await self._timed(name, do)

    async def interruptible(self, name: str, do: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A long wait that a superseding command, the deadline or a shutdown ends at once.

        Raises:
            Superseded, Expired, Halted: the wait was interrupted; what it waited for is cancelled.
        """
        if self.control.final:
            return await self._timed(name, do)
        self.control.safe_point()
        return await self._timed(name, lambda: self.control.interruptible(name, do))

    async def reach(self, point: str, commit: Callable[[], Awaitable[None]]) -> None:
        """Pass a point of no return, which `commit` writes: from here on only completion."""
        await self._failpoint(f"before:{point}")
        await commit()
        self.control.finalize()
        await self._failpoint(f"after:{point}")

    async def mark(self, name: str) -> None:
        """Commit, durably, that something that must not happen twice may happen from here on."""
        await self._failpoint(f"before:{name}")
        await self._log.mark(self.command_id, name)
        await self._failpoint(f"after:{name}")

    def marked(self, name: str) -> bool:
        """Whether an earlier run, or this one, committed the mark."""
        return self._log.marked(self.command_id, name)

    def finalize(self) -> None:
        """For commands that are completed, never undone (Stop, Destroy, Teardown)."""
        self.control.finalize()

    def seconds_of(self, *names: str) -> float:
        """How long the steps of these names took in this run."""
        return sum(step.took_us for step in self.taken if step.name in names) / 1e6

    # -- undoing -------------------------------------------------------------------------------

    async def undo(self) -> tuple[str, ...]:
        """Remove everything that this command made in any of its runs, last first.

        Returns what could not be removed, as `<mechanism> <key>`; those rows stay for the
        reconciler. A second cancellation does not cut it short.

        Raises:
            RecordFault: the journal cannot commit now; to be called again once it can.
        """
        undoing = asyncio.ensure_future(self._undo())
        await finish(undoing)
        return undoing.result()

    async def _undo(self) -> tuple[str, ...]:
        left: list[str] = []
        for row in reversed(self._log.rows(self.command_id)):
            if not row.existed and (row.mechanism, row.key) not in self._untouched:
                started = time.perf_counter()
                try:
                    mechanism = self._mechanisms[row.mechanism]
                    async with asyncio.timeout(UNDO_TIMEOUT_S):
                        await mechanism.remove(row.key)
                except RecordFault:
                    raise
                except (Failure, OSError, TimeoutError, KeyError) as error:
                    log.warning("step.left_behind", step=row.mechanism, key=row.key, error=error)
                    left.append(f"{row.mechanism} {row.key}")
                    continue
                self._note(row.mechanism, started, "undone")
                if self._may_still_be_made(row):
                    left.append(f"{row.mechanism} {row.key}")
                    continue
            await self._log.forget(self.command_id, row.mechanism, row.key)
        return tuple(left)

    def _may_still_be_made(self, row: StepRow) -> bool:
        """Whether a call that was abandoned may make the resource after its removal."""
        pending = self._pending.get((row.mechanism, row.key))
        return pending is not None and pending()

    async def _timed(
        self,
        name: str,
        do: Callable[[], Awaitable[T]],
        *,
        outcome: str = "done",
        on_host: bool = True,
    ) -> T:
        if self._stored is not None and on_host:  # no effect before the command is on disk
            await self._stored()
            self._stored = None
        await self._failpoint(f"before:{name}")
        started = time.perf_counter()
        self.doing.append((name, started))
        try:
            value = await do()
        except BaseException:
            outcome = "failed"
            raise
        finally:
            self.doing.remove((name, started))
            self._observe(name, self._note(name, started, outcome))
        await self._failpoint(f"after:{name}")
        return value

    def _note(self, name: str, started_s: float, outcome: str) -> float:
        """Add a step that ended now; returns how long it took, in seconds."""
        now_s = time.perf_counter()
        seconds = now_s - started_s
        self.ended_s.append(now_s)
        self.taken.append(StepTaken(name=name, took_us=int(seconds * 1e6), outcome=outcome))
        return seconds


def _intent(mechanism: Removable, key: str, *, existed: bool) -> StepIntent:
    return StepIntent(mechanism.name, key, existed, mechanism.durability)


@dataclass(frozen=True, slots=True)
class SnapshotMeasure:
    """A snapshot that a command wrote, for the metrics: `seconds` from the pause on."""

    seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a handler; `changed` is false if the host already was in the requested state.

    `record`, or `network`, is journalled with the outcome in one transaction; with `tombstone` the
    record is deleted and the tombstone stays; a network that is absent is deleted. `detail` of each
    command: docs/contract.md, section 5.
    `afterwards` is background work, by name, that begins once the outcome is committed; a killed
    worker loses it.
    """

    changed: bool
    status: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])
    left_behind: tuple[str, ...] = ()
    record: InstanceRecord | None = None
    tombstone: Tombstone | None = None
    network: NetworkRecord | None = None
    snapshot: SnapshotMeasure | None = None
    afterwards: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = ()
