"""One FIFO per lane, lanes concurrent: who may run now. Knows nothing of what running means.

A lane's task lives as long as the lane has work. Stop and Destroy win over a Start, Wake or Sleep
of the same instance: what runs is told to end at its next safe point, what waits and never ran is
answered without running, both before the winner waits for anything.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from handlers.steps import Steps
from schemas.requests import (
    DestroyInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from schemas.subjects import Lane
from worker.journal.memory import CommandRow

SUPERSEDING: Final = (StopInstance, DestroyInstance)
SUPERSEDABLE: Final = (StartInstance, WakeInstance, SleepInstance)

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Work:
    """One command on its way through a lane. `steps` is set while it runs."""

    row: CommandRow
    superseded_by: str | None = None
    halted: bool = False
    steps: Steps | None = None

    def supersede(self, by: str) -> None:
        """Have it end at its next safe point; one that has not begun ends before its first."""
        self.superseded_by = by
        if self.steps is not None:
            self.steps.supersede(by)

    def halt(self) -> None:
        self.halted = True
        if self.steps is not None:
            self.steps.halt()

    def began(self, steps: Steps) -> None:
        """A run begins: what was asked before reaches it too."""
        self.steps = steps
        if self.superseded_by is not None:
            steps.supersede(self.superseded_by)
        if self.halted:
            steps.halt()


@dataclass(frozen=True, slots=True)
class MaintenanceTask:
    """The worker's own work in a lane, e.g. after a VMM's exit: not journalled, never answered."""

    name: str
    run: Callable[[], Awaitable[None]]


class Runner(Protocol):
    """Runs one command to its outcome. Raises nothing but CancelledError."""

    async def run(self, work: Work) -> None: ...

    async def answer_superseded(self, work: Work) -> None:
        """Give the final answer of a command that never ran."""
        ...


@dataclass(slots=True)
class _Line:
    waiting: deque[Work | MaintenanceTask] = field(default_factory=deque[Work | MaintenanceTask])
    running: Work | MaintenanceTask | None = None
    task: asyncio.Task[None] | None = None


class Lanes:
    """All lanes of this host. Work may be put at any time; it runs once `start` was called."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lines: dict[Lane, _Line] = {}
        self._answers: set[asyncio.Task[None]] = set()
        self._started = False
        self._stopping = False

    def start(self) -> None:
        """Let the lanes run; until then (recovery) they only queue."""
        self._started = True
        for lane, line in self._lines.items():
            self._wake(lane, line)

    def put(self, row: CommandRow) -> None:
        """Queue a command behind all others of its lane, having superseded those it wins over."""
        line = self._lines.setdefault(row.lane, _Line())
        if isinstance(row.command.request, SUPERSEDING):
            self._supersede(line, row.id)
        line.waiting.append(Work(row))
        if self._started:
            self._wake(row.lane, line)

    def put_maintenance(self, lane: Lane, task: MaintenanceTask) -> None:
        """Queue the worker's own work behind all else of the lane."""
        line = self._lines.setdefault(lane, _Line())
        line.waiting.append(task)
        if self._started:
            self._wake(lane, line)

    def counts(self) -> dict[str, int]:
        """`busy`: lanes with a command running; `waiting`: lanes with commands that wait."""
        return {
            "busy": sum(line.running is not None for line in self._lines.values()),
            "waiting": sum(bool(line.waiting) for line in self._lines.values()),
        }

    async def idle(self) -> None:
        """Return when no lane has work left."""
        while tasks := self._tasks():
            await asyncio.wait(tasks)

    async def stop(self, budget_s: float) -> None:
        """Begin nothing more; have what runs stop at its next safe point, at last by cancelling.

        Nothing is undone or answered: the journal keeps the commands for the next worker.
        """
        self._stopping = True
        for line in self._lines.values():
            if isinstance(line.running, Work):
                line.running.halt()
        if tasks := self._tasks():
            _, late = await asyncio.wait(tasks, timeout=budget_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    # -- inside --------------------------------------------------------------------------------

    def _tasks(self) -> set[asyncio.Task[None]]:
        tasks = {line.task for line in self._lines.values() if line.task is not None}
        return tasks | self._answers

    def _supersede(self, line: _Line, by: str) -> None:
        running = line.running
        if isinstance(running, Work) and isinstance(running.row.command.request, SUPERSEDABLE):
            running.supersede(by)
        for work in tuple(line.waiting):
            if isinstance(work, MaintenanceTask) or not isinstance(
                work.row.command.request, SUPERSEDABLE
            ):
                continue
            work.supersede(by)
            if not work.row.attempts:  # else an earlier worker began it: it must be undone
                line.waiting.remove(work)
                task = asyncio.create_task(self._runner.answer_superseded(work))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)

    def _wake(self, lane: Lane, line: _Line) -> None:
        if line.task is None and not self._stopping:
            line.task = asyncio.create_task(self._run(lane, line), name=f"lane {lane}")

    async def _run(self, lane: Lane, line: _Line) -> None:
        try:
            while line.waiting and not self._stopping:
                line.running = line.waiting.popleft()
                try:
                    if isinstance(line.running, MaintenanceTask):
                        await line.running.run()
                    else:
                        await self._runner.run(line.running)
                except Exception:
                    log.exception("lane.work_crashed", lane=str(lane), work=_name(line.running))
        finally:
            line.running = line.task = None
            if not line.waiting:
                del self._lines[lane]


def _name(work: Work | MaintenanceTask | None) -> str:
    if isinstance(work, Work):
        return work.row.id
    return work.name if work is not None else ""
