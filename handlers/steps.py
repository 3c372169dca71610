"""Do in order, undo last first. A step's undo is data: a row that names a mechanism and a key.

The intent of a step is committed before its effect, together with whether the resource was there
already; so "created by this command" is known over all its runs, also after kill -9 between the
effect and the next row. "Was it there" is read first, under the lane's lock, never guessed from
EEXIST. Past a point of no return there is no undo, only completion.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

from handlers.errors import Expired, Failure, Superseded
from handlers.mechanism import Keyed, Mechanism, Removable, StepLog, StepRow
from schemas.envelopes import StepTaken
from schemas.records import InstanceRecord, Tombstone

log = structlog.get_logger()
UNDO_TIMEOUT_S = 30.0

T = TypeVar("T")
U = TypeVar("U")
SpecT = TypeVar("SpecT", bound=Keyed, contravariant=True)


class Halted(Exception):
    """The worker shuts down: stop here, undo nothing, answer nothing; the next worker goes on.

    No `Failure`: handlers must let it pass.
    """


class Failpoint(Protocol):
    def __call__(self, moment: str) -> Awaitable[None]:
        """Called at each point, `before:<step>` and `after:<step>`; a crash test stops there."""
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
        deadline_ms: int | None = None,
        admission: asyncio.Future[None] | None = None,
        failpoint: Failpoint = no_failpoint,
        observe: Callable[[str, float], None] = lambda step, seconds: None,
    ) -> None:
        self.command_id = command_id
        self.deadline_ms = deadline_ms
        self.taken: list[StepTaken] = []
        self._log = step_log
        self._admission = admission
        self._mechanisms = mechanisms
        self._cut = asyncio.Event()
        self._superseded_by = ""
        self._halted = False
        self._failpoint = failpoint
        self._observe = observe
        self._final = False
        self._existed: dict[tuple[str, str], bool] = {}
        self._untouched: set[tuple[str, str]] = set()

    # -- doing ---------------------------------------------------------------------------------

    async def announce(self, *coming: tuple[Removable, str]) -> None:
        """Record in one commit that this command is about to make these resources.

        Undo goes through them in the opposite order, however they were made; what was not begun
        is not undone. Only for resources that nobody else makes while the command's lane is busy.

        Raises:
            Superseded, Expired, Halted: see `safe_point`.
        """
        self.safe_point()
        found = await asyncio.gather(*(mechanism.exists(key) for mechanism, key in coming))
        names = [(mechanism.name, key) for mechanism, key in coming]
        known = {(row.mechanism, row.key) for row in self._log.rows(self.command_id)}
        rows = [StepRow(*name, existed) for name, existed in zip(names, found, strict=True)]
        self._existed |= dict(zip(names, found, strict=True))
        self._untouched |= set(names) - known
        await self._log.begin_all(self.command_id, rows)

    async def ensure(self, mechanism: Mechanism[SpecT, T], spec: SpecT) -> T:
        """Make one resource, having recorded that this command is about to.

        Raises:
            Superseded, Expired, Halted: at the safe point before it; nothing of it was done.
        """
        self.safe_point()
        existed = self._existed.pop((mechanism.name, spec.key), None)
        if existed is None:
            existed = await mechanism.exists(spec.key)
        self._untouched.discard((mechanism.name, spec.key))
        row = await self._log.begin(self.command_id, mechanism.name, spec.key, existed=existed)
        return await self._timed(
            mechanism.name,
            lambda: mechanism.ensure(spec),
            outcome="found" if existed and row.existed else "done",
        )

    async def remove(self, mechanism: Removable, key: str) -> None:
        """Make one resource absent; never undone, so no row is needed."""
        await self._timed(f"remove_{mechanism.name}", lambda: mechanism.remove(key))

    async def act(self, name: str, do: Callable[[], Awaitable[T]]) -> T:
        """A step that makes no resource, e.g. to pause; timed and shown in the reply."""
        if not self._final:
            self.safe_point()
        return await self._timed(name, do)

    async def interruptible(self, name: str, do: Callable[[], Awaitable[T]]) -> T:
        """A long wait that a superseding command or the deadline ends at once.

        Raises:
            Superseded, Expired, Halted: the wait was cut; what it waited for is cancelled.
        """
        if self._final:
            return await self._timed(name, do)
        self.safe_point()

        async def until_cut() -> T:
            work = asyncio.ensure_future(do())
            cut = asyncio.ensure_future(self._cut.wait())
            try:
                await asyncio.wait(
                    {work, cut}, timeout=self.left_s(), return_when=asyncio.FIRST_COMPLETED
                )
                if work.done():
                    return work.result()
                self.safe_point()
                raise Expired("the deadline passed while waiting", detail={"step": name})
            finally:
                for task in (work, cut):
                    task.cancel()
                await asyncio.gather(work, cut, return_exceptions=True)

        return await self._timed(name, until_cut)

    async def reach(self, point: str, commit: Callable[[], Awaitable[None]]) -> None:
        """Pass a point of no return that `commit` writes: from here on only completion."""
        await self._failpoint(f"before:{point}")
        await commit()
        self._final = True
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
        self._final = True

    @property
    def final(self) -> bool:
        """No undo any more."""
        return self._final

    # -- stopping ------------------------------------------------------------------------------

    def supersede(self, by: str) -> None:
        """Ask the command to end at its next safe point; past its last point it goes on."""
        self._superseded_by = by
        self._cut.set()

    def halt(self) -> None:
        """Ask the command to stop at its next safe point, to be continued by the next worker."""
        self._halted = True
        self._cut.set()

    def safe_point(self) -> None:
        """Raise if a later command won or the deadline passed, unless there is no way back."""
        if self._halted:
            raise Halted
        if self._final:
            return
        if self._superseded_by:
            raise Superseded(
                f"superseded by {self._superseded_by}", detail={"by": self._superseded_by}
            )
        left = self.left_s()
        if left is not None and left <= 0:
            raise Expired("the deadline passed before the command was done")

    async def pause(self, seconds: float) -> None:
        """Wait between two attempts; what ends the command ends the wait.

        Raises:
            Superseded, Expired, Halted: see `safe_point`.
        """
        if self._final and not self._halted:
            await asyncio.sleep(seconds)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._cut.wait()
        self.safe_point()

    def left_s(self) -> float | None:
        """Seconds until the deadline, or None."""
        if self.deadline_ms is None:
            return None
        return self.deadline_ms / 1000 - time.time()

    # -- undoing -------------------------------------------------------------------------------

    async def undo(self) -> tuple[str, ...]:
        """Remove all that this command made in any of its runs, last first.

        Returns what could not be removed, as `<mechanism> <key>`; those rows stay in the log and
        the sweep removes them later. A second cancellation does not cut it short.
        """
        work = asyncio.ensure_future(self._undo())
        while True:
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                if work.cancelled():
                    raise

    async def _undo(self) -> tuple[str, ...]:
        left: list[str] = []
        for row in reversed(self._log.rows(self.command_id)):
            if not row.existed and (row.mechanism, row.key) not in self._untouched:
                mechanism = self._mechanisms[row.mechanism]
                started = time.perf_counter()
                try:
                    async with asyncio.timeout(UNDO_TIMEOUT_S):
                        await mechanism.remove(row.key)
                except (Failure, OSError, TimeoutError) as error:
                    log.warning("step.left_behind", step=row.mechanism, key=row.key, error=error)
                    left.append(f"{row.mechanism} {row.key}")
                    continue
                took_us = int((time.perf_counter() - started) * 1e6)
                self.taken.append(StepTaken(name=row.mechanism, took_us=took_us, outcome="undone"))
            await self._log.forget(self.command_id, row.mechanism, row.key)
        return tuple(left)

    async def _timed(
        self, name: str, do: Callable[[], Awaitable[T]], *, outcome: str = "done"
    ) -> T:
        if self._admission is not None:  # no effect before the command is on disk
            await asyncio.shield(self._admission)
            self._admission = None
        await self._failpoint(f"before:{name}")
        started = time.perf_counter()
        try:
            value = await do()
        except BaseException:
            outcome = "failed"
            raise
        finally:
            seconds = time.perf_counter() - started
            self._observe(name, seconds)
            self.taken.append(StepTaken(name=name, took_us=int(seconds * 1e6), outcome=outcome))
        await self._failpoint(f"after:{name}")
        return value


async def together(one: Coroutine[Any, Any, T], other: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Two parts of a command that need nothing of each other, at once; both are over on return.

    Raises the first one's failure, else the other's; an effect that has begun is let through, so
    that undo finds no moving target.
    """
    tasks = asyncio.ensure_future(one), asyncio.ensure_future(other)
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tasks[0].result(), tasks[1].result()


@dataclass(frozen=True, slots=True)
class Done:
    """What a handler gives back on success; `changed` false means the host already was as asked.

    `record` is journalled with the outcome in one transaction; with `tombstone` it is dropped and
    the tombstone stays.
    """

    changed: bool
    status: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])
    left_behind: tuple[str, ...] = ()
    record: InstanceRecord | None = None
    tombstone: Tombstone | None = None
