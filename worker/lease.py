"""The lease of a host id: the host's own value in the state bucket, renewed while the worker runs.

Readers trust `lease_until_ms`. A live lease of another machine stops the start; losing it later
stops no VM, only the writing of state (`state.py`), until it is ours again.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import structlog

from handlers.clock import now_ms
from schemas import unpack
from schemas.decode_error import DecodeError
from worker.bus.protocol import Bus, BusError, StateConflict

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class LeaseHeld(Exception):
    """Another machine uses this host id now: give one of the two another `[host] id`."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who this worker is."""

    machine_id: str
    boot_id: str
    journal_id: str


class Lease:
    """Holds the host key.

    Args:
        bus: where the bucket is.
        key: `Subjects.host_key`.
        holder: this worker.
        facts: what else the value shows, at least `host_state`, `capacity` and `seq`; called at
            each renewal, must not block.
        lease_s: how long a value counts; renewed three times as often.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        bus: Bus,
        key: str,
        holder: Holder,
        facts: Callable[[], Mapping[str, object]],
        *,
        lease_s: float = 30.0,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self.key = key
        self._bus, self._holder, self._facts = bus, holder, facts
        self._lease_s, self._clock = lease_s, clock
        self._revision: int | None = None
        self._news = asyncio.Event()
        self._held = asyncio.Event()
        self._renewal = asyncio.Event()
        self._said = ""
        self.generation = 0

    @property
    def held(self) -> bool:
        """Whether the last renewal found it ours."""
        return self._held.is_set()

    async def wait_held(self) -> None:
        await self._held.wait()

    async def wait_renewed(self, after: int) -> None:
        """Return once `generation`, the number of renewals, is above `after`."""
        while self.generation <= after:
            await self._renewal.wait()

    def touch(self) -> None:
        """The facts changed: renew now."""
        self._news.set()

    async def acquire(self) -> None:
        """Take the lease; waits until the bus can tell whose it is.

        Raises:
            LeaseHeld: another machine's lease is live.
        """
        while True:
            try:
                await self._renew()
            except BusError as error:
                self._say("lease.waiting", str(error))
                await asyncio.sleep(random.uniform(0.1, 1))  # noqa: S311
            else:
                return

    async def run(self) -> None:
        """Renew until cancelled, and take it back if it was lost and has run out."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / 3):
                    await self._news.wait()
            self._news.clear()
            try:
                await self._renew()
            except LeaseHeld as error:
                self._held.clear()
                self._say("lease.lost", str(error))
            except BusError as error:
                self._say("lease.not_renewed", str(error))
                await asyncio.sleep(random.uniform(0.1, 1))  # noqa: S311
                self._news.set()

    async def release(self) -> None:
        """Let it run out now; best effort, at an orderly end."""
        if self._revision is None or not self.held:
            return
        try:
            await self._bus.write_state(self.key, self._value(0), revision=self._revision)
        except BusError as error:
            log.info("lease.not_released", error=str(error))
        self._held.clear()

    # -- inside ------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        if self._revision is None:
            self._revision = await self._revision_to_take()
        value = self._value(int(self._lease_s * 1000))
        try:
            self._revision = await self._bus.write_state(self.key, value, revision=self._revision)
        except StateConflict:
            # Ours in truth if only the acknowledgement was lost; the next round writes on it.
            self._revision = await self._revision_to_take()
            self._revision = await self._bus.write_state(self.key, value, revision=self._revision)
        except BusError:
            self._revision = None
            raise
        self.generation += 1
        self._renewal.set()
        self._renewal = asyncio.Event()
        self._said = ""
        self._held.set()

    async def _revision_to_take(self) -> int:
        """The revision to write upon, if the key is free, run out, or this machine's."""
        found = await self._bus.read_state(self.key)
        if found is None:
            return 0
        data, revision = found
        try:
            value = unpack.unpack_map(data)
        except DecodeError:
            return revision
        machine_id, until_ms = value.get("machine_id"), value.get("lease_until_ms")
        live = isinstance(until_ms, int) and until_ms > self._clock()
        if live and machine_id != self._holder.machine_id:
            seconds = (cast("int", until_ms) - self._clock()) / 1000
            raise LeaseHeld(
                f"{self.key}: machine {machine_id!a} holds this host id, for another"
                f" {seconds:.0f} s; this machine is {self._holder.machine_id!r}. Give one of them"
                " another [host] id, or stop the other worker and wait"
            )
        return revision

    def _value(self, for_ms: int) -> bytes:
        at_ms = self._clock()
        facts = dict(self._facts())
        fixed = {
            "v": 1,
            "status": facts.get("host_state"),
            "machine_id": self._holder.machine_id,
            "boot_id": self._holder.boot_id,
            "journal_id": self._holder.journal_id,
            "at_ms": at_ms,
            "lease_until_ms": at_ms + for_ms,
        }
        return unpack.pack(facts | fixed)

    def _say(self, event: str, text: str) -> None:
        if text != self._said:
            self._said = text
            log.warning(event, reason=text)
