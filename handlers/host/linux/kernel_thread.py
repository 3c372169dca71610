"""One thread per kernel interface that blocks: calls run there in order, the loop never waits.

Deleting an interface holds `sendmsg` for 15 to 30 ms (RCU), an nftables transaction for some ms;
neither may run in the event loop, and neither library is safe to share between threads.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def no_namespace() -> None:
    """Stay in the network namespace of the process."""


class KernelThread:
    """A dedicated thread, with its own view of the network namespace.

    Args:
        name: shown by ps and in stack dumps.
        enter: runs first in the thread, e.g. `setns`; what the thread opens later belongs there.
    """

    def __init__(self, name: str, enter: Callable[[], None] = no_namespace) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=enter)

    async def run(self, do: Callable[[], T]) -> T:
        """Run a blocking call in the thread, after the calls before it.

        A call that has begun is not interrupted by cancellation; later calls wait for it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, do)

    def stop(self, last: Callable[[], None]) -> None:
        """Run `last` in the thread and end it; blocks until both are done."""
        self._pool.submit(last)
        self._pool.shutdown(wait=True)
