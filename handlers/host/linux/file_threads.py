"""File work in threads: the event loop never blocks, and no thread outlives the step it is for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from handlers.cancellation import run_shielded
from handlers.errors import Unavailable
from schemas.settings import IMPORTS_MAX

P = ParamSpec("P")
T = TypeVar("T")

QUICK_THREADS = 16
SLOW_THREADS = 4

# What takes long must not hold up the many short steps, and the files that agentd offers for an
# import must not hold up the wipes of a Destroy.
_quick = ThreadPoolExecutor(QUICK_THREADS, "files")
_slow = ThreadPoolExecutor(SLOW_THREADS, "slow-files")
_imports = ThreadPoolExecutor(IMPORTS_MAX, "imports")


class CancelToken:
    """Given to slow work, which checks it between chunks."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raises Unavailable once the caller was cancelled; nobody waits for the result then."""
        if self._stop.is_set():
            raise Unavailable("file work interrupted: nobody waits for it any more")


async def run_in_thread(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. A cancelled caller still waits for its end, then is cancelled.

    A thread cannot be stopped; one left behind would create again what the undo just removed.
    """
    return await _run_in_pool(_quick, partial(work, *args, **kwargs), None)


async def run_in_slow_thread(work: Callable[[CancelToken], T]) -> T:
    """As `run_in_thread`, for work of seconds or minutes; cancelling stops it at a chunk."""
    token = CancelToken()
    return await _run_in_pool(_slow, partial(work, token), token)


async def run_in_import_thread(work: Callable[[CancelToken], T]) -> T:
    """As `run_in_slow_thread`, in a thread for imports."""
    token = CancelToken()
    return await _run_in_pool(_imports, partial(work, token), token)


def start_in_thread(work: Callable[[], None]) -> None:
    """Have short `work`, which changes nothing and never raises, done in a thread; none waits."""
    _quick.submit(work)


async def _run_in_pool(
    pool: ThreadPoolExecutor, work: Callable[[], T], token: CancelToken | None
) -> T:
    submitted = pool.submit(work)
    if token is None:
        return await run_shielded(asyncio.wrap_future(submitted))

    def stop() -> None:
        token.stop()
        submitted.cancel()  # if it has no thread yet, it never gets one

    return await run_shielded(asyncio.wrap_future(submitted), on_cancel=stop)
