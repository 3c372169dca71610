"""The lease of a host ID: the host's key in the state bucket, renewed while the worker runs.

Readers rely on `lease_until_ms`. A valid lease of another host stops the start; losing the lease
later stops no VM, only the writing of state (`state_writer.py`), until it is held again.

A cloned disk has the same machine ID, host ID and journal. So the lease carries also what a clone
does not share: boot ID, product UUID and MAC addresses, and an ID of this worker's own: once it had
the lease, a valid value with another one was written by another worker.
"""

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import cast

import structlog

from handlers.clock import now_ms
from schemas import unpack
from schemas.decode_error import DecodeError
from worker.bus.protocol import Bus, BusError, StateConflict

# Of a value, what tells an operator which host wrote it.
SHOWN = ("hostname", "macs", "product_uuid", "machine_id", "boot_id", "journal_id")

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class LeaseHeld(Exception):
    """Another host uses this host ID now: change the `[host] id` of one of them."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Identity of this worker and its host; empty is what the host does not have."""

    machine_id: str
    boot_id: str
    journal_id: str
    product_uuid: str = ""
    macs: tuple[str, ...] = ()
    hostname: str = ""
    worker_id: str = field(default_factory=lambda: secrets.token_hex(8))

    def wrote(self, value: Mapping[str, object]) -> bool:
        """Whether a value is this very worker's."""
        return value.get("worker_id") == self.worker_id

    def differs_in(self, value: Mapping[str, object]) -> str:
        """What shows that a value is of another host than this worker's; empty if nothing does.

        A value of an older version has fewer facts. In the same boot, no other host wrote it; after
        a reboot, the journal and the hardware are still this host's.
        """
        if value.get("machine_id") != self.machine_id:
            return "machine_id"
        if value.get("boot_id") == self.boot_id:
            return ""
        if value.get("journal_id") != self.journal_id:
            return "journal_id"
        there = value.get("product_uuid")
        if there and self.product_uuid and there != self.product_uuid:
            return "product_uuid"
        macs = value.get("macs")
        if isinstance(macs, list) and macs and self.macs:
            shared = set(self.macs).intersection(str(mac) for mac in cast("list[object]", macs))
            return "" if shared else "macs"
        return ""


class Lease:
    """Holds the key of the host.

    Args:
        bus: where the bucket is.
        key: `Subjects.host_key`.
        holder: this worker.
        facts: what else the value contains, at least `host_state`, `capacity` and `seq`; called
            at each renewal, must not block.
        lease_s: validity of a value; it is renewed three times in that time.
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
        self._changed = asyncio.Event()
        self._held = asyncio.Event()
        self._renewal = asyncio.Event()
        self._logged = ""
        self._had = False
        self.generation = 0

    @property
    def held(self) -> bool:
        """Whether this worker had the lease at the last renewal."""
        return self._held.is_set()

    async def wait_held(self) -> None:
        await self._held.wait()

    async def wait_renewed(self, after: int) -> None:
        """Return once `generation`, the number of renewals, is above `after`."""
        while self.generation <= after:
            await self._renewal.wait()

    def touch(self) -> None:
        """The facts changed: renew the lease now."""
        self._changed.set()

    async def acquire(self) -> None:
        """Take the lease; waits until the bus answers.

        Raises:
            LeaseHeld: another host has a valid lease.
        """
        while True:
            try:
                await self._renew()
            except BusError as error:
                if self._is_new(str(error)):
                    log.warning("lease.acquire_failed", error=str(error))
                await asyncio.sleep(random.uniform(0.1, 1))  # noqa: S311
            else:
                return

    async def run(self) -> None:
        """Renew until cancelled; after a loss, take the lease again once it has expired."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / 3):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self._renew()
            except LeaseHeld as error:
                self._held.clear()
                if self._is_new(str(error)):
                    log.warning("lease.lost", error=str(error))
            except BusError as error:
                if self._is_new(str(error)):
                    log.warning("lease.renew_failed", error=str(error))
                await asyncio.sleep(random.uniform(0.1, 1))  # noqa: S311
                self._changed.set()

    async def release(self) -> None:
        """Let the lease expire now; best effort, at an orderly stop."""
        if self._revision is None or not self.held:
            return
        try:
            await self._bus.write_state(self.key, self._value(0), revision=self._revision)
        except BusError as error:
            log.info("lease.release_failed", error=str(error))
        self._held.clear()

    # -- inside ------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        if self._revision is None:
            self._revision = await self._revision_to_take()
        value = self._value(int(self._lease_s * 1000))
        try:
            self._revision = await self._bus.write_state(self.key, value, revision=self._revision)
        except StateConflict:
            # Our write may have succeeded with a lost acknowledgement; then this continues from it.
            self._revision = await self._revision_to_take()
            self._revision = await self._bus.write_state(self.key, value, revision=self._revision)
        except BusError:
            self._revision = None
            raise
        self.generation += 1
        self._renewal.set()
        self._renewal = asyncio.Event()
        self._logged = ""
        self._held.set()
        self._had = True

    async def _revision_to_take(self) -> int:
        """The revision to write upon, if the key is absent, expired, or this machine's."""
        found = await self._bus.read_state(self.key)
        if found is None:
            return 0
        data, revision = found
        try:
            value = unpack.unpack_map(data)
        except DecodeError:
            return revision
        until_ms = value.get("lease_until_ms")
        if not isinstance(until_ms, int) or until_ms <= self._clock():
            return revision
        if self._had:
            other = "" if self._holder.wrote(value) else "worker_id"
        else:
            other = self._holder.differs_in(value)
        if other:
            raise LeaseHeld(self._held_by(value, other, (until_ms - self._clock()) / 1000))
        return revision

    def _held_by(self, value: Mapping[str, object], differs: str, left_s: float) -> str:
        mine = asdict(self._holder)
        here = ", ".join(f"{name} {_shown(mine.get(name))}" for name in SHOWN)
        there = ", ".join(f"{name} {_shown(value.get(name))}" for name in SHOWN)
        clone = value.get("machine_id") == self._holder.machine_id
        return (
            f"{self.key}: another host has the lease of this host ID for another {left_s:.0f} s"
            f" (it differs in {differs}): {there}; this host: {here}."
            + (" One is a clone of the other: it needs its own /etc/machine-id." if clone else "")
            + " Change the [host] id of one of them, or stop the other worker and wait"
        )

    def _value(self, for_ms: int) -> bytes:
        at_ms = self._clock()
        facts = dict(self._facts())
        fixed = {
            "v": 1,
            "status": facts.get("host_state"),
            "machine_id": self._holder.machine_id,
            "boot_id": self._holder.boot_id,
            "journal_id": self._holder.journal_id,
            "product_uuid": self._holder.product_uuid,
            "macs": list(self._holder.macs),
            "hostname": self._holder.hostname,
            "worker_id": self._holder.worker_id,
            "at_ms": at_ms,
            "lease_until_ms": at_ms + for_ms,
        }
        return unpack.pack(facts | fixed)

    def _is_new(self, text: str) -> bool:
        """Whether this text differs from the last one logged: each is logged once."""
        new, self._logged = text != self._logged, text
        return new


def _shown(value: object) -> str:
    """A value of another host's, bounded and printable."""
    return f"{value!a}"[:200]
