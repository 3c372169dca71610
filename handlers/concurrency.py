"""Concurrency limits by kind of heavy work, across all lanes; Stop and Destroy have none."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from handlers.steps import Steps
from schemas.settings import LimitSettings


@dataclass(slots=True)
class Slots:
    """One semaphore per kind; `limited` surrounds the heavy part only, never a drain."""

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
async def limited(slots: asyncio.Semaphore, step: str, steps: Steps) -> AsyncGenerator[None]:
    """Hold one of the slots; a command that has to wait for one does so in the step named `step`.

    Raises:
        Superseded, Expired, Halted: the wait was interrupted.
    """
    if slots.locked():
        await steps.interruptible(step, slots.acquire)
    else:
        await slots.acquire()
    try:
        yield
    finally:
        slots.release()
