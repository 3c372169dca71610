"""Threads for calls that block, of one kind: the loop never waits, and a call that hangs is left.

A system call that hangs (a disk or a lock of the kernel that does not answer) cannot be ended from
within the process. So a call that makes no progress for its time is *abandoned*: who waits for it
gets `Abandoned`, its thread is replaced, and what it refers to stays until it returns. Of each kind
at most `SPARE` threads are replaced; once none is left, each call fails at once.

Not a ThreadPoolExecutor: two futures and a chain between them cost more than what most calls do,
and the interpreter waits for its threads when it exits.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeVar
from weakref import WeakSet

import structlog

from handlers.cancellation import Uncut
from handlers.errors import Abandoned, Unavailable
from handlers.thread_stack import stack_of

SPARE: Final = 4
STOP_S: Final = 5.0

S = TypeVar("S")
T = TypeVar("T")
log = structlog.get_logger()
_all: "WeakSet[CallThreads[Any]]" = WeakSet()


class Progress:
    """When a call last made progress, in seconds of the monotonic clock; its thread sets it."""

    __slots__ = ("at_s",)

    def __init__(self) -> None:
        self.at_s = 0.0

    def made(self) -> None:
        self.at_s = time.monotonic()


class _Call(Generic[S, T]):
    """A call, and its result once it has run."""

    __slots__ = ("claim", "do", "error", "future", "progress", "value")

    def __init__(self, do: Callable[[S], T], future: asyncio.Future[T], progress: Progress) -> None:
        self.do = do
        self.future = future
        self.progress = progress
        self.claim = threading.Lock()  # taken, for good, by the thread that runs it
        self.value: T
        self.error: BaseException | None = None

    def run(self, state: S) -> None:
        try:
            self.value = self.do(state)
        except BaseException as error:  # noqa: BLE001 - raised where the call is awaited
            self.error = error

    def withdraw(self) -> None:
        """In the loop: cancel it unless it has begun. Its future is never one of `begin_uncut`."""
        if self.claim.acquire(blocking=False):
            self.future.cancel()

    def settle(self) -> None:
        """In the loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.value)


class _Thread(Generic[S]):
    """One thread of a kind, with a state of its own, e.g. a socket."""

    def __init__(self, owner: "CallThreads[S]", number: int) -> None:
        self._owner = owner
        self.call: _Call[S, Any] | None = None
        self.abandoned = self.returned = False
        self._ends = threading.Lock()
        self.thread = threading.Thread(
            target=self._work, name=f"{owner.kind}_{number}", daemon=True
        )
        self.thread.start()

    def _work(self) -> None:
        owner, opened, refused = self._owner, False, None
        state: Any = None
        try:
            owner.enter()
        except BaseException as error:  # noqa: BLE001 - raised where a call is awaited
            refused = error
        while not self.abandoned and (call := owner.calls.get()) is not None:
            if call.future.cancelled() or not call.claim.acquire(blocking=False):
                owner.report(call)
                continue
            call.progress.made()
            self.call = call
            call.error = refused
            if refused is None and not opened:
                try:
                    state, opened = owner.open(), True
                except BaseException as error:  # noqa: BLE001 - raised where the call is awaited
                    call.error = error
            if opened:
                call.run(state)
            with self._ends:
                self.call = None
            if self.abandoned:
                log.warning("call.returned", kind=owner.kind, after_s=_since(call.progress.at_s))
            owner.report(call)
            del call  # what it refers to is not kept until the next one
        if opened:
            owner.close(state)
        self.returned = True

    def abandon(self, call: _Call[S, Any]) -> bool:
        """In the loop: take no call after this one; false if it has just ended."""
        with self._ends:
            self.abandoned = self.call is call
            return self.abandoned


class CallThreads(Generic[S]):
    """At most `count` threads, each begun when a call needs it.

    Args:
        kind: the threads' name and the label of their metrics.
        limit_s: how long a call may make no progress.
        enter: runs first in each thread, e.g. `setns`; if it fails, each call raises the same.
        open: makes a thread's state before its first call; tried again until it succeeds.
        close: runs last in a thread that has a state.
    """

    def __init__(
        self,
        kind: str,
        *,
        limit_s: float,
        open: Callable[[], S],  # noqa: A002 - as in a with statement
        close: Callable[[S], None],
        enter: Callable[[], None] = lambda: None,
        count: int = 1,
    ) -> None:
        self.kind, self.enter, self.open, self.close = kind, enter, open, close
        self.calls: SimpleQueue[_Call[S, Any] | None] = SimpleQueue()
        self.abandoned = 0
        self._limit_s = limit_s
        self._count = count
        self._made = 0
        self._live: list[_Thread[S]] = []
        self._hung: list[_Thread[S]] = []
        self._done: deque[_Call[S, Any]] = deque()
        self._open = 0  # calls that have not been settled
        self._watched_by: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        _all.add(self)

    async def run(self, do: Callable[[S], T]) -> T:
        """Run a blocking call in one of the threads; with one thread, after the calls before it.

        A call that has begun is not interrupted by cancellation. One that was cancelled before it
        began is left out.

        Raises:
            Abandoned: it made no progress for `limit_s`; it may still take effect.
            Unavailable: too many of this kind hang; it was not begun.
        """
        return await self.begin(do).future

    def begin(self, do: Callable[[S], T], progress: Progress | None = None) -> _Call[S, T]:
        """As `run`, for who waits for its `future` himself, or may `withdraw` the call."""
        loop = asyncio.get_running_loop()
        return self._begin(loop, do, loop.create_future(), progress or Progress())

    def begin_uncut(self, do: Callable[[S], T]) -> Uncut[T]:
        """As `run`, for one task that waits for the end of the call also if it is cancelled.

        Only the future is returned: it cannot be cancelled, so the call cannot be withdrawn.
        """
        loop = asyncio.get_running_loop()
        future: Uncut[T] = Uncut(loop=loop)
        self._begin(loop, do, future, Progress())
        return future

    def stop(self) -> None:
        """End the threads after the calls before; blocks, but not for one that hangs."""
        if self._stopped:
            return
        self._stopped = True
        for _each in self._live:
            self.calls.put(None)
        for each in self._live:
            each.thread.join(STOP_S)

    @property
    def hung(self) -> int:
        """How many abandoned calls have not returned."""
        return sum(not each.returned for each in self._hung)

    @property
    def counts(self) -> tuple[int, int]:
        """Threads in a call, abandoned ones included, and how many there may be at most."""
        return sum(each.call is not None for each in self._live) + self.hung, self._count + SPARE

    @property
    def has_room(self) -> bool:
        """Whether a call that is made now gets a thread, now or after others."""
        return bool(self._live) or self.hung < self._count + SPARE

    # -- inside --------------------------------------------------------------------------------

    def _begin(
        self,
        loop: asyncio.AbstractEventLoop,
        do: Callable[[S], T],
        future: asyncio.Future[T],
        progress: Progress,
    ) -> _Call[S, T]:
        if self._stopped:
            raise RuntimeError(f"{self.kind} threads have been stopped")
        if len(self._live) < min(self._count, self._open + 1):
            self._replace()
        call = _Call(do, future, progress)
        self._open += 1
        self.calls.put(call)
        if self._watched_by is not loop:
            self._watched_by = loop
            loop.call_later(self._limit_s, self._watch, loop)
        return call

    def _replace(self) -> None:
        """Begin one more thread, if so many may be."""
        if not self.has_room:
            raise self._refusal()
        if len(self._live) + self.hung < self._count + SPARE:
            self._live.append(_Thread(self, self._made))
            self._made += 1

    def _refusal(self) -> Unavailable:
        return Unavailable(
            f"{self.hung} calls of kind {self.kind} hang in the kernel: no further one is begun "
            "until one returns; see call.abandoned in the host's log"
        )

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Abandon what makes no progress; look again when the next one could have hung."""
        now = time.monotonic()
        left_s = self._limit_s
        busy = not self.calls.empty()
        for each in tuple(self._live):
            if (call := each.call) is not None:
                busy = True
                rest_s = call.progress.at_s + self._limit_s - now
                if rest_s <= 0:
                    self._abandon(each, call)
                else:
                    left_s = min(left_s, rest_s)
        if busy and self._watched_by is loop:
            loop.call_later(max(left_s, 0.01), self._watch, loop)
        elif self._watched_by is loop:
            self._watched_by = None

    def _abandon(self, hung: _Thread[S], call: _Call[S, Any]) -> None:
        if not hung.abandon(call):
            return
        self.abandoned += 1
        self._live.remove(hung)
        self._hung = [*(each for each in self._hung if not each.returned), hung]
        log.error(
            "call.abandoned",
            kind=self.kind,
            after_s=_since(call.progress.at_s),
            at=stack_of(hung.thread),
            hung=self.hung,
        )
        if not call.future.done():
            call.future.set_exception(
                Abandoned(
                    f"a call of kind {self.kind} did not return within {self._limit_s:g} s and was "
                    "abandoned: it may still take effect; see call.abandoned in the host's log",
                    lambda: not hung.returned,
                )
            )
        if not self.has_room:
            self._refuse_waiting()
        elif not self.calls.empty():
            self._replace()

    def _refuse_waiting(self) -> None:
        """No thread is left that would take them."""
        while True:
            try:
                call = self.calls.get_nowait()
            except Empty:
                return
            if call is not None:
                call.error = self._refusal()
                self.report(call)

    def report(self, call: "_Call[S, Any]") -> None:
        """Wake the loop, once for all that is done by then."""
        self._done.append(call)
        try:
            call.future.get_loop().call_soon_threadsafe(self._settle)
        except RuntimeError:  # the loop is closed: nobody waits
            self._done.clear()

    def _settle(self) -> None:
        while self._done:
            self._open -= 1
            self._done.popleft().settle()


def _since(moment_s: float) -> float:
    return round(time.monotonic() - moment_s, 1)


def hung_calls() -> Mapping[str, int]:
    """By kind, of this process: how many abandoned calls have not returned."""
    counts: dict[str, int] = {}
    for each in tuple(_all):
        counts[each.kind] = counts.get(each.kind, 0) + each.hung
    return counts


def abandoned_calls() -> Mapping[str, int]:
    """By kind, of this process: how many calls were abandoned, ever."""
    counts: dict[str, int] = {}
    for each in tuple(_all):
        counts[each.kind] = counts.get(each.kind, 0) + each.abandoned
    return counts


def thread_counts() -> Mapping[str, tuple[int, int]]:
    """By kind, of this process: threads in a call, and how many there may be at most."""
    counts: dict[str, tuple[int, int]] = {}
    for each in tuple(_all):
        used, limit = counts.get(each.kind, (0, 0))
        counts[each.kind] = used + each.counts[0], limit + each.counts[1]
    return counts


def exhausted_kinds() -> tuple[str, ...]:
    """Kinds of which no further call can be made until one returns."""
    return tuple(sorted(each.kind for each in tuple(_all) if not each.has_room))
