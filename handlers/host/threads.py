"""File work in threads, so that the loop never blocks, and never half-watched."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from handlers.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

QUICK_THREADS = 16
SLOW_THREADS = 4

# Two pools: what takes long, such as wiping a large disk, must not hold up the many short steps.
_quick = ThreadPoolExecutor(QUICK_THREADS, "files")
_slow = ThreadPoolExecutor(SLOW_THREADS, "slow-files")


class Pace:
    """Handed to slow work, which looks at it between chunks."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raises Unavailable once the caller was cancelled; nobody waits for the result then."""
        if self._stop.is_set():
            raise Unavailable("stopped in the middle: the worker shuts down")


async def to_end(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. A cancelled caller still waits for its end, then is cancelled.

    A thread cannot be stopped; one left behind would go on making what the undo just removed.
    """
    return await _to_end(_quick, partial(work, *args, **kwargs), None)


async def to_end_slowly(work: Callable[[Pace], T]) -> T:
    """As `to_end`, for work of seconds or minutes; cancellation ends it at its next chunk."""
    pace = Pace()
    return await _to_end(_slow, partial(work, pace), pace)


async def _to_end(pool: ThreadPoolExecutor, work: Callable[[], T], pace: Pace | None) -> T:
    running = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if pace is not None:
            pace.stop()
        while not running.done():
            try:
                await asyncio.wait({running})
            except asyncio.CancelledError:
                continue
        if not running.cancelled():
            running.exception()
        raise
