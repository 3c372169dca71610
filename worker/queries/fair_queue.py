"""Work of many askers: a bounded part at once, in turn between them.

One who asks as fast as it can gets its own share, and what exceeds that is dropped; another's
question waits for at most the ones that are being answered. Knows neither NATS nor queries.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Final

Work = Callable[[], Awaitable[None]]

RUNNING_MAX: Final = 16
RUNNING_EACH: Final = 8
WAITING_MAX: Final = 256
WAITING_EACH: Final = 64


class FairQueue:
    """Runs work until closed. An asker is any string; `work` must not raise."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Work]] = {}  # in the order in which they have their turn
        self._running: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        self.dropped = 0

    @property
    def busy(self) -> bool:
        """Whether something runs or waits."""
        return bool(self._tasks or self._count)

    @property
    def running(self) -> int:
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        return self._count

    def put(self, asker: str, work: Work) -> None:
        """Run it when it is its asker's turn, or drop it, or the last one of who has the most."""
        mine = self._waiting.setdefault(asker, deque())
        if len(mine) >= WAITING_EACH:
            self.dropped += 1
            return
        mine.append(work)
        self._count += 1
        if self._count > WAITING_MAX:
            max(self._waiting.values(), key=len).pop()
            self._count -= 1
            self.dropped += 1
        self._start()

    async def close(self) -> None:
        """Finish what runs and what waits."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _start(self) -> None:
        for asker in list(self._waiting):
            if len(self._tasks) >= RUNNING_MAX:
                return
            waiting = self._waiting.pop(asker)
            if waiting and self._running[asker] < RUNNING_EACH:
                self._run(asker, waiting.popleft())
            if waiting:
                self._waiting[asker] = waiting  # at the end: the others have their turn first

    def _run(self, asker: str, work: Work) -> None:
        self._count -= 1
        self._running[asker] += 1
        task: asyncio.Task[None] = asyncio.ensure_future(_done(work))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._running[asker] -= 1
            if not self._running[asker]:
                del self._running[asker]
            self._start()

        task.add_done_callback(ended)


async def _done(work: Work) -> None:
    await work()
