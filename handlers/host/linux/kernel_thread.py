"""One thread per kernel interface that blocks: calls run there in order, the loop never waits.

Deleting an interface holds `sendmsg` for 15 to 30 ms (RCU), an nftables transaction for some ms;
neither may run in the event loop, and neither library is safe to share between threads.

Not a ThreadPoolExecutor: two futures and a chain between them cost more than what most calls do.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def no_namespace() -> None:
    """Stay in the network namespace of the process."""


class _Call(Generic[T]):
    """A call, and its result once it has run."""

    __slots__ = ("do", "error", "future", "value")

    def __init__(self, do: Callable[[], T], future: asyncio.Future[T]) -> None:
        self.do = do
        self.future = future
        self.value: T
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.do()
        except BaseException as error:  # noqa: BLE001 - raised where the call is awaited
            self.error = error

    def settle(self) -> None:
        """In the loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.value)


class KernelThread:
    """A dedicated thread, with its own view of the network namespace, from the first call on.

    Args:
        name: shown in stack dumps.
        enter: runs first in the thread, e.g. `setns`; what the thread opens later belongs there. If
            it fails, each call raises what it raised.
    """

    def __init__(self, name: str, enter: Callable[[], None] = no_namespace) -> None:
        self._enter = enter
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._done: deque[_Call[Any]] = deque()
        self._thread = threading.Thread(target=self._work, name=f"{name}_0", daemon=True)
        self._last: Callable[[], None] = no_namespace
        self._stopped = False

    async def run(self, do: Callable[[], T]) -> T:
        """Run a blocking call in the thread, after the calls before it.

        A call that has begun is not interrupted by cancellation; later calls wait for it. One that
        was cancelled before it began is left out.
        """
        if self._stopped:
            raise RuntimeError(f"{self._thread.name} has been stopped")
        if not self._thread.is_alive():
            self._thread.start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put(_Call(do, future))
        return await future

    def stop(self, last: Callable[[], None]) -> None:
        """Run `last` in the thread and end it; blocks until both are done."""
        if self._stopped:
            return
        self._stopped = True
        self._last = last
        if not self._thread.is_alive():
            self._thread.start()
        self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        refused: BaseException | None = None
        try:
            self._enter()
        except BaseException as error:  # noqa: BLE001 - raised where a call is awaited
            refused = error
        while (call := self._calls.get()) is not None:
            if call.future.cancelled():
                continue
            if refused is None:
                call.run()
            else:
                call.error = refused
            self._report(call)
            del call  # what it refers to is not kept until the next one
        if refused is None:
            self._last()

    def _report(self, call: _Call[Any]) -> None:
        """Wake the loop, once for all that is done by then."""
        self._done.append(call)
        try:
            call.future.get_loop().call_soon_threadsafe(self._settle)
        except RuntimeError:  # the loop is closed: nobody waits
            self._done.clear()

    def _settle(self) -> None:
        while self._done:
            self._done.popleft().settle()
