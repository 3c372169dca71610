"""How much heavy work at once, by kind, across all lanes; Stop and Destroy never wait here."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from handlers.steps import Steps
from schemas.settings import LimitSettings


@dataclass(slots=True)
class Slots:
    """One semaphore per kind; `held` around the heavy part only, never around a drain."""

    boots: asyncio.Semaphore
    restores: asyncio.Semaphore
    snapshots: asyncio.Semaphore
    networks: asyncio.Semaphore

    @classmethod
    def of(cls, limits: LimitSettings) -> "Slots":
        return cls(
            boots=asyncio.Semaphore(limits.boots),
            restores=asyncio.Semaphore(limits.restores),
            snapshots=asyncio.Semaphore(limits.snapshots),
            networks=asyncio.Semaphore(limits.networks),
        )


@asynccontextmanager
async def held(slot: asyncio.Semaphore, name: str, steps: Steps) -> AsyncGenerator[None]:
    """Hold one of a kind's slots; a command that has to wait for it does so as the step `name`.

    Raises:
        Superseded, Expired, Halted: the wait was cut.
    """
    if slot.locked():
        await steps.interruptible(name, slot.acquire)
    else:
        await slot.acquire()
    try:
        yield
    finally:
        slot.release()
