"""Background tasks that a handler starts and does not wait for, e.g. hashing guest memory."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from handlers.errors import Failure

log = structlog.get_logger()


class BackgroundTasks:
    """A failure is logged and stops nothing else; what is unfinished at shutdown is cancelled."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Implements `handlers.interfaces.Later`."""

        async def guarded() -> None:
            try:
                await work()
            except (Failure, OSError) as error:
                log.warning("background.task_failed", work=name, error=repr(error))

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all tasks and wait for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
