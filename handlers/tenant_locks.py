"""A fair readers-writer lock per tenant: shared by instances, exclusive for network commands.

Fair: a later request, also a shared one, waits behind an exclusive one, so that a stream of Starts
does not starve a Teardown. Held around network steps only, never across drain, boot or snapshot.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from handlers.control import Control

WAIT: Final = "wait_network_lock"


class FairLock:
    """Readers-writer lock, first come, first served; a cancelled waiter changes nothing."""

    def __init__(self) -> None:
        self._held = 0
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()
        self.users = 0  # who holds it, waits for it, or is about to

    @property
    def state(self) -> tuple[int, int]:
        """How often it is held, -1 for exclusively, and how many wait."""
        return self._held, len(self._waiting)

    def available(self, *, exclusive: bool) -> bool:
        """Whether `acquire` returns at once."""
        return not self._waiting and self._admits(exclusive)

    async def acquire(self, *, exclusive: bool) -> None:
        if self.available(exclusive=exclusive):
            self._take(exclusive)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((exclusive, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(exclusive=exclusive)  # acquired just before the cancellation
            else:
                if (exclusive, turn) in self._waiting:
                    self._waiting.remove((exclusive, turn))
                self._wake()
            raise

    def release(self, *, exclusive: bool) -> None:
        self._held -= -1 if exclusive else 1
        self._wake()

    def _admits(self, exclusive: bool) -> bool:
        return self._held == 0 if exclusive else self._held >= 0

    def _take(self, exclusive: bool) -> None:
        self._held += -1 if exclusive else 1

    def _wake(self) -> None:
        while self._waiting and self._admits(self._waiting[0][0]):
            exclusive, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._take(exclusive)
                turn.set_result(None)


class TenantLocks:
    """The network locks of all tenants; an idle lock is removed.

    With the `control` of a command that is not final, its deadline, a later command or a shutdown
    ends the wait: Expired, Superseded or Halted is raised, and the lock is not held.
    """

    def __init__(self) -> None:
        self._locks: dict[str, FairLock] = {}

    def states(self) -> Mapping[str, tuple[int, int]]:
        """`FairLock.state` of each tenant's lock that is in use; "" is the one for subnets."""
        return {key: lock.state for key, lock in self._locks.items()}

    @asynccontextmanager
    async def shared(self, tenant_id: str, control: Control | None = None) -> AsyncGenerator[None]:
        """Shared: an instance's network steps."""
        async with self._lock(tenant_id, control, exclusive=False):
            yield

    @asynccontextmanager
    async def exclusive(
        self, tenant_id: str, control: Control | None = None
    ) -> AsyncGenerator[None]:
        """Exclusive: SetupNetwork, TeardownNetwork, repair."""
        async with self._lock(tenant_id, control, exclusive=True):
            yield

    @asynccontextmanager
    async def subnets(self, control: Control | None = None) -> AsyncGenerator[None]:
        """Exclusive: allocation of net ids and subnets. Taken after a tenant's own lock."""
        async with self._lock("", control, exclusive=True):
            yield

    @asynccontextmanager
    async def _lock(
        self, key: str, control: Control | None, *, exclusive: bool
    ) -> AsyncGenerator[None]:
        lock = self._locks.setdefault(key, FairLock())
        lock.users += 1
        try:
            if control is None or control.final or lock.available(exclusive=exclusive):
                await lock.acquire(exclusive=exclusive)
            else:
                await control.interruptible(WAIT, lambda: lock.acquire(exclusive=exclusive))
            try:
                yield
            finally:
                lock.release(exclusive=exclusive)
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[key]
