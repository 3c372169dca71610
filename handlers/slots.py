"""How much heavy work at once, by kind, across all lanes; Stop and Destroy never wait here."""

import asyncio
from dataclasses import dataclass

from schemas.settings import LimitSettings


@dataclass(slots=True)
class Slots:
    """One semaphore per kind; held around the heavy part only, never around a drain."""

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
