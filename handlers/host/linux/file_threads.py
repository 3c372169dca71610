"""File work in threads: the event loop never blocks, and no thread outlives the step it is for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from handlers.cancellation import run_shielded
from handlers.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

QUICK_THREADS = 16
SLOW_THREADS = 4

# Two pools: what takes long, such as wiping a large disk, must not hold up the many short steps.
_quick = ThreadPoolExecutor(QUICK_THREADS, "files")
_slow = ThreadPoolExecutor(SLOW_THREADS, "slow-files")


class CancelToken:
    """Given to slow work, which checks it between chunks."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raises Unavailable once the caller was cancelled; nobody waits for the result then."""
        if self._stop.is_set():
            raise Unavailable("file work interrupted: the worker is shutting down")


async def run_in_thread(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. A cancelled caller still waits for its end, then is cancelled.

    A thread cannot be stopped; one left behind would create again what the undo just removed.
    """
    return await _run_in_pool(_quick, partial(work, *args, **kwargs), None)


async def run_in_slow_thread(work: Callable[[CancelToken], T]) -> T:
    """As `run_in_thread`, for work of seconds or minutes; cancelling stops it at a chunk."""
    token = CancelToken()
    return await _run_in_pool(_slow, partial(work, token), token)


async def _run_in_pool(
    pool: ThreadPoolExecutor, work: Callable[[], T], token: CancelToken | None
) -> T:
    running = asyncio.get_running_loop().run_in_executor(pool, work)
    return await run_shielded(running, on_cancel=None if token is None else token.stop)
