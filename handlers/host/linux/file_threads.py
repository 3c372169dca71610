"""File work in threads: the event loop never blocks, and no thread outlives the step it is for.

Unless a call hangs, e.g. on a disk that does not answer: then it is abandoned (`call_threads`).
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Generator
from functools import partial
from typing import Final, ParamSpec, TypeVar

from handlers.cancellation import run_shielded
from handlers.errors import Unavailable
from handlers.host.linux.call_threads import CallThreads, Progress
from handlers.host.linux.kernel_thread import nothing
from schemas.settings import IMPORTS_MAX

P = ParamSpec("P")
T = TypeVar("T")

QUICK_THREADS = 16
SLOW_THREADS = 4
CALL_S: Final = 150.0
"""Without progress: more than `mkfs.ext4` is given for a data disk."""
NO_FD: Final = -1


def _threads(kind: str, count: int) -> CallThreads[None]:
    return CallThreads(kind, limit_s=CALL_S, open=nothing, close=lambda _: None, count=count)


# What takes long must not hold up the many short steps, and the files that agentd offers for an
# import must not hold up the wipes of a Destroy.
_quick = _threads("files", QUICK_THREADS)
_slow = _threads("slow-files", SLOW_THREADS)
_imports = _threads("imports", IMPORTS_MAX)


class CancelToken:
    """Given to slow work, which checks it between chunks: that is its progress, too."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raises Unavailable once the caller was cancelled; nobody waits for the result then."""
        self.progress.made()
        if self._stop.is_set():
            raise Unavailable("file work interrupted: nobody waits for it any more")


class HandedFd:
    """A descriptor on its way into a call in a thread, or out of one.

    A call takes it over and closes it: an abandoned one may still use it, and its number must not
    become another file's until then. What a call makes for nobody, since it was abandoned or its
    caller was cancelled, is closed.

    Who made this calls `close` in any case: the descriptor is the thread's, or is closed.
    """

    def __init__(self, fd: int = NO_FD) -> None:
        self._fd = fd
        self._closed = False
        self._one_at_a_time = threading.Lock()

    def put(self, fd: int) -> None:
        """In the thread: hand out what it made; it is closed if `close` was called before."""
        with self._one_at_a_time:
            if not self._closed:
                self._fd = fd
                return
        os.close(fd)

    @contextlib.contextmanager
    def taken(self) -> Generator[int]:
        """In the thread, around all that the call does; closed at the end of the block."""
        fd = self._take()
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """In the loop, once the call has ended, was abandoned or was never made."""
        if (fd := self._take(closed=True)) != NO_FD:
            os.close(fd)

    def _take(self, *, closed: bool = False) -> int:
        with self._one_at_a_time:
            self._closed = self._closed or closed
            fd, self._fd = self._fd, NO_FD
            return fd


async def run_in_thread(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. A cancelled caller still waits for its end, then is cancelled.

    A thread cannot be stopped; one left behind would create again what the undo just removed.
    """
    call = partial(work, *args, **kwargs)
    future = _quick.begin_uncut(lambda _: call())
    try:
        return await future
    except asyncio.CancelledError as cancelled:
        raise cancelled from future.exception()


async def run_in_slow_thread(work: Callable[[CancelToken], T]) -> T:
    """As `run_in_thread`, for work of seconds or minutes; cancelling stops it at a chunk."""
    return await _run_chunks(_slow, work)


async def run_in_import_thread(work: Callable[[CancelToken], T]) -> T:
    """As `run_in_slow_thread`, in a thread for imports."""
    return await _run_chunks(_imports, work)


def start_in_thread(work: Callable[[], None]) -> bool:
    """Have short `work`, which changes nothing and never raises, done in a thread; none waits.

    False: too many of these threads hang, and it is not done.
    """
    try:
        future: asyncio.Future[None] = _quick.begin(lambda _: work()).future
    except Unavailable:
        return False
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return True


async def _run_chunks(threads: CallThreads[None], work: Callable[[CancelToken], T]) -> T:
    token = CancelToken()
    call = threads.begin(lambda _: work(token), token.progress)

    def stop() -> None:
        token.stop()
        call.withdraw()  # if it has no thread yet, it never gets one

    return await run_shielded(call.future, on_cancel=stop)
