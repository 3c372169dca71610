"""Concurrency limits by kind of heavy work, across all lanes, each fair between tenants.

A tenant holds at most its share of a kind's slots, so that what one tenant's files or guests make
slow holds up that tenant. Of those who wait, the tenant that holds the fewest slots is next.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Final

from handlers.steps import Steps
from schemas.settings import LimitSettings

WIPES: Final = 4  # concurrent wipes of data disks; as many as there are threads for them


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """Slots of a kind: all, those held, and how many commands wait for one."""

    count: int
    held: int
    waiting: int


class FairSlots:
    """`count` slots, of which one tenant holds at most `share`: half of them, rounded up."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.share = (count + 1) // 2
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @property
    def waiting(self) -> int:
        """How many commands wait for a slot."""
        return len(self._waiting)

    def holders(self) -> Mapping[str, int]:
        """The slots that each tenant holds."""
        return dict(self._held)

    def held(self, tenant_id: str) -> int:
        """How many slots the tenant holds."""
        return self._held[tenant_id]

    @property
    def counts(self) -> "SlotCounts":
        return SlotCounts(self.count, self._held.total(), self.waiting)

    def available(self, tenant_id: str) -> bool:
        """Whether `acquire` returns at once. Nobody who waits is passed over: they all are of
        tenants that hold their share, or no slot is free."""
        return self._held.total() < self.count and self._held[tenant_id] < self.share

    async def acquire(self, tenant_id: str) -> None:
        """Take a slot as soon as there is one for the tenant."""
        if self.available(tenant_id):
            self._held[tenant_id] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((tenant_id, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove((tenant_id, turn))
            else:  # its turn came at the same moment
                self.release(tenant_id)
            raise

    def release(self, tenant_id: str) -> None:
        """Give a slot back, to the next who waits for one."""
        self._held[tenant_id] -= 1
        if not self._held[tenant_id]:
            del self._held[tenant_id]
        while ready := [
            each for each in self._waiting if self.available(each[0]) and not each[1].done()
        ]:
            turn = min(ready, key=lambda each: self._held[each[0]])  # the first of equals
            self._waiting.remove(turn)
            self._held[turn[0]] += 1
            turn[1].set_result(None)


@dataclass(slots=True)
class Slots:
    """The slots of each kind; `limited` surrounds the heavy part only, never a drain."""

    imports: FairSlots
    boots: FairSlots
    restores: FairSlots
    snapshots: FairSlots
    networks: FairSlots
    wipes: FairSlots

    @classmethod
    def of(cls, limits: LimitSettings) -> "Slots":
        return cls(
            imports=FairSlots(limits.imports),
            boots=FairSlots(limits.boots),
            restores=FairSlots(limits.restores),
            snapshots=FairSlots(limits.snapshots),
            networks=FairSlots(limits.networks),
            wipes=FairSlots(WIPES),
        )

    def counts(self) -> dict[str, SlotCounts]:
        """By kind."""
        return {each.name: getattr(self, each.name).counts for each in fields(self)}


@asynccontextmanager
async def limited(
    slots: FairSlots, tenant_id: str, step: str, steps: Steps
) -> AsyncGenerator[None]:
    """Hold one of the slots; a command that has to wait for one does so in the step named `step`.

    Raises:
        Superseded, Expired, Halted: the wait was interrupted.
    """
    if slots.available(tenant_id):
        await slots.acquire(tenant_id)
    else:
        await steps.interruptible(step, lambda: slots.acquire(tenant_id))
    try:
        yield
    finally:
        slots.release(tenant_id)
