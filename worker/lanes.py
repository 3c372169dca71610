"""One FIFO per lane, lanes concurrent: which command may run now. It does not know how they run.

A lane's task lives as long as the lane has work. What a command does to the earlier ones of its
lane, by the table in `handlers/precedence.py`, it does on arrival: one that runs and is superseded
ends at its next safe point, one that waits and never ran is answered without running, both before
the superseding command waits for anything.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from handlers.precedence import Precedence, precedence
from handlers.steps import Steps
from schemas.subjects import Lane
from worker.journal.memory import CommandRow

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Work:
    """One command on its way through a lane. `steps` is set while it runs."""

    row: CommandRow
    superseded_by: str | None = None
    halted: bool = False
    hurried: bool = False
    steps: Steps | None = None

    def supersede(self, by: str) -> None:
        """End it at its next safe point; if it has not begun, before its first step."""
        self.superseded_by = by
        if self.steps is not None:
            self.steps.control.supersede(by)

    def hurry(self) -> None:
        """Give its guest no more time."""
        self.hurried = True
        if self.steps is not None:
            self.steps.control.hurry()

    def halt(self) -> None:
        self.halted = True
        if self.steps is not None:
            self.steps.control.halt()

    def began(self, steps: Steps) -> None:
        """Set the steps of a run; an earlier `supersede`, `hurry` or `halt` applies to it."""
        self.steps = steps
        if self.superseded_by is not None:
            steps.control.supersede(self.superseded_by)
        if self.hurried:
            steps.control.hurry()
        if self.halted:
            steps.control.halt()


@dataclass(frozen=True, slots=True)
class MaintenanceTask:
    """Work of the worker in a lane, e.g. after a VMM's exit: not journalled, not answered."""

    name: str
    run: Callable[[], Awaitable[None]]


class Runner(Protocol):
    """Runs one command to its outcome. Raises only CancelledError."""

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
    """All lanes of this host. Work can be queued at any time; it runs after `start`.

    Attributes:
        on_arrival: called with the lane before work is queued in it; must not block or raise.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lines: dict[Lane, _Line] = {}
        self.on_arrival: Callable[[Lane], None] = lambda lane: None
        self._answers: set[asyncio.Task[None]] = set()
        self._started = False
        self._stopping = False

    def start(self) -> None:
        """Run the lanes; before that (during recovery) they only queue."""
        self._started = True
        for lane, line in self._lines.items():
            self._wake(lane, line)

    def put(self, row: CommandRow) -> None:
        """Queue a command at the end of its lane, after superseding those that it wins over."""
        self.on_arrival(row.lane)
        line = self._lines.setdefault(row.lane, _Line())
        for earlier in (line.running, *line.waiting):
            if isinstance(earlier, Work):
                self._precede(line, earlier, row)
        line.waiting.append(Work(row))
        if self._started:
            self._wake(row.lane, line)

    def put_maintenance(self, lane: Lane, task: MaintenanceTask) -> None:
        """Queue the worker's own work behind all else of the lane."""
        self.on_arrival(lane)
        line = self._lines.setdefault(lane, _Line())
        line.waiting.append(task)
        if self._started:
            self._wake(lane, line)

    def is_idle(self, lane: Lane) -> bool:
        """Whether nothing runs or waits in the lane."""
        return lane not in self._lines

    def counts(self) -> dict[str, int]:
        """`busy`: lanes with a running command; `waiting`: lanes with queued commands."""
        return {
            "busy": sum(line.running is not None for line in self._lines.values()),
            "waiting": sum(bool(line.waiting) for line in self._lines.values()),
        }

    def work(
        self,
    ) -> Mapping[Lane, tuple[Work | MaintenanceTask | None, Sequence[Work | MaintenanceTask]]]:
        """What runs in each lane, and what waits there in order; for a look from outside."""
        return {lane: (line.running, tuple(line.waiting)) for lane, line in self._lines.items()}

    async def idle(self) -> None:
        """Return when no lane has work left."""
        while tasks := self._tasks():
            await asyncio.wait(tasks)

    async def stop(self, budget_s: float) -> None:
        """Start nothing new; halt what runs at its next safe point, cancel it after `budget_s`.

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

    def _precede(self, line: _Line, earlier: Work, later: CommandRow) -> None:
        match precedence(earlier.row.command.request, later.command.request):
            case Precedence.SUPERSEDES:
                earlier.supersede(later.id)
                # One that an earlier worker began has to be undone.
                if earlier is not line.running and not earlier.row.attempts:
                    line.waiting.remove(earlier)
                    task = asyncio.create_task(self._runner.answer_superseded(earlier))
                    self._answers.add(task)
                    task.add_done_callback(self._answers.discard)
            case Precedence.HURRIES:
                earlier.hurry()
            case Precedence.WAITS:
                pass

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
