"""One fair lock per tenant: instances share it around their network steps, network commands own it.

Fair: who comes later, also to share, waits behind who wants it alone, so a Teardown is not starved
by a stream of Starts. Held around network steps only, never across drain, boot or snapshot.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class FairLock:
    """Readers-writer lock, first come first served; a cancelled waiter leaves no trace."""

    def __init__(self) -> None:
        self._held = 0
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()

    @property
    def idle(self) -> bool:
        return self._held == 0 and not self._waiting

    async def acquire(self, *, alone: bool) -> None:
        if not self._waiting and self._admits(alone):
            self._take(alone)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((alone, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(alone=alone)  # it was given just before the cancellation
            else:
                if (alone, turn) in self._waiting:
                    self._waiting.remove((alone, turn))
                self._wake()
            raise

    def release(self, *, alone: bool) -> None:
        self._held -= -1 if alone else 1
        self._wake()

    def _admits(self, alone: bool) -> bool:
        return self._held == 0 if alone else self._held >= 0

    def _take(self, alone: bool) -> None:
        self._held += -1 if alone else 1

    def _wake(self) -> None:
        while self._waiting and self._admits(self._waiting[0][0]):
            alone, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._take(alone)
                turn.set_result(None)


class TenantLocks:
    """The network locks of all tenants; a lock that nobody holds or wants costs nothing."""

    def __init__(self) -> None:
        self._locks: dict[str, FairLock] = {}

    @asynccontextmanager
    async def shared(self, tenant_id: str) -> AsyncGenerator[None]:
        """Hold it together with others who share: an instance's network steps."""
        async with self._holding(tenant_id, alone=False):
            yield

    @asynccontextmanager
    async def exclusive(self, tenant_id: str) -> AsyncGenerator[None]:
        """Hold it alone: SetupNetwork, TeardownNetwork, repair."""
        async with self._holding(tenant_id, alone=True):
            yield

    @asynccontextmanager
    async def subnets(self) -> AsyncGenerator[None]:
        """Hold what gives net ids and subnets to tenants; taken after a tenant's own lock."""
        async with self._holding("", alone=True):
            yield

    @asynccontextmanager
    async def _holding(self, key: str, *, alone: bool) -> AsyncGenerator[None]:
        lock = self._locks.setdefault(key, FairLock())
        try:
            await lock.acquire(alone=alone)
            try:
                yield
            finally:
                lock.release(alone=alone)
        finally:
            if lock.idle:
                self._locks.pop(key, None)
