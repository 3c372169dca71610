"""A worker whose state directory cannot be written when it starts: it waits for it, and says so.

The file system may have become read-only after an error, the disk may not answer yet, or be full.
Ending would not help: the next worker would find the same. Until then no command is taken, they
stay in the stream, and no VM is touched. `/readyz`, `hostd doctor` and the service manager have the
reason. Failures that only an operator can end, e.g. a journal of a newer hostd, end the worker.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Final, TypeVar

import structlog
from msgspec import to_builtins

from handlers.errors import Failure
from schemas.settings import Settings
from worker.control.routes import Answer, Body, Route, read_nothing
from worker.control.server import ControlServer
from worker.descriptors import DescriptorReserve
from worker.doctor.findings import Finding, Severity
from worker.health import HealthServer
from worker.journal.writer import JournalFault
from worker.metrics import Metrics
from worker.supervision.service_manager import ServiceManager
from worker.supervision.watchdog import FEEDS

RETRY_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
RETRIED: Final = frozenset({errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT})

T = TypeVar("T")
log = structlog.get_logger()


class StateDirectory:
    """What a worker does while it waits.

    Args:
        stop: set by SIGTERM.
        wait: waits for `stop`, at most so many seconds.
    """

    def __init__(
        self,
        settings: Settings,
        manager: ServiceManager,
        metrics: Metrics,
        reserve: DescriptorReserve,
        stop: asyncio.Event,
        *,
        wait: Callable[[asyncio.Event, float], Awaitable[None]] | None = None,
    ) -> None:
        self._settings = settings
        self._manager = manager
        self._metrics = metrics
        self._reserve = reserve
        self._stop = stop
        self._wait = wait or wait_at_most
        self._reason = ""

    async def until(self, attempt: Callable[[], Awaitable[T]]) -> T | None:
        """What `attempt` returns once the directory lets it; None: the worker is to stop.

        Raises:
            Failure, OSError: `attempt` raised what no waiting ends.
        """
        async with AsyncExitStack() as serving:
            tries = 0
            while not self._stop.is_set():
                try:
                    done = await (self._fed(attempt) if tries else attempt())
                except (JournalFault, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in RETRIED:
                        raise
                    if not tries:
                        await self._serve(serving)
                    self._note(error)
                else:
                    if tries:
                        log.info("state.writable", path=self._settings.paths.state)
                    return done
                await self._pause(RETRY_S[min(tries, len(RETRY_S) - 1)])
                tries += 1
        return None

    async def _fed(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """An attempt may take long: an error of a disk, or the copy before a migration.

        Before the first one has failed READY is not sent, and no watchdog runs.
        """
        task = asyncio.ensure_future(attempt())
        limit_s = self._manager.watchdog_s
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=None if limit_s is None else limit_s / FEEDS)
                self._manager.alive()
        finally:
            task.cancel()  # of one that is done: nothing
        return await task

    def checks(self) -> Mapping[str, bool]:
        """For `/readyz`."""
        return {"recovered": False, "can_commit": False}

    def finding(self) -> Finding:
        return Finding(
            Severity.ERROR,
            "state_directory",
            f"[paths] state {self._settings.paths.state} cannot be written: {self._reason}",
            "the worker waits for it: it takes no commands and watches no VM; VMs keep running",
            f"dmesg; findmnt -T {self._settings.paths.state}; df {self._settings.paths.state}",
        )

    async def doctor(self, body: Body) -> Answer:
        """`GET /v1/doctor`."""
        read_nothing(body)
        return {"version": version("hostd"), "findings": [to_builtins(self.finding())]}

    async def _serve(self, stack: AsyncExitStack) -> None:
        if self._settings.metrics.listen:
            await stack.enter_async_context(
                HealthServer(
                    self._settings.metrics.listen, self._metrics, self.checks, self._reserve
                )
            )
        routes = [Route("GET", "/v1/doctor", self.doctor)]
        await stack.enter_async_context(
            ControlServer(
                self._settings.paths.run, routes, writable=lambda: False, reserve=self._reserve
            )
        )
        # Started, as far as systemd is concerned: it must not end what waits.
        self._manager.ready()

    def _note(self, error: Exception) -> None:
        reason = error.message if isinstance(error, Failure) else str(error)
        if reason != self._reason:
            log.error("state.unwritable", path=self._settings.paths.state, reason=reason)
        self._reason = reason
        self._manager.status(f"waiting for the state directory: {reason}")

    async def _pause(self, seconds: float) -> None:
        """Wait, and feed the watchdog."""
        limit_s = self._manager.watchdog_s
        feed_s = seconds if limit_s is None else min(seconds, limit_s / FEEDS)
        while seconds > 0 and not self._stop.is_set():
            self._manager.alive()
            await self._wait(self._stop, min(feed_s, seconds))
            seconds -= feed_s


async def wait_at_most(stop: asyncio.Event, seconds: float) -> None:
    """Until it is set, or the time is over."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
