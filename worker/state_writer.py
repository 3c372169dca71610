"""Writes state: the newest value of each key that changed, to the bucket, by compare-and-set.

The bucket has the journal's current state, coalesced, without history. After a failed
compare-and-set the key is read back: with this worker's value the write is done; with another
writer's, this worker is fenced and writes nothing until the lease is renewed.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Protocol

import structlog

from schemas import unpack
from schemas.decode_error import DecodeError
from worker.bus.protocol import Bus, BusError, StateConflict, Unsendable

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

CONCURRENT_MAX = 32


class StateRow(Protocol):
    """The newest value of one key; None: delete the key. `seq` grows with each value."""

    @property
    def key(self) -> str: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def seq(self) -> int: ...


class StateSource(Protocol):
    """The journal, as far as state is concerned."""

    def dirty(self) -> Sequence[StateRow]:
        """The newest value of each key that is not yet in the bucket."""
        ...

    async def wait_dirty(self) -> None:
        """Return once there is a key to write."""
        ...

    def written(self, key: str, seq: int) -> None:
        """The bucket has the value of `seq`; a newer one is still dirty."""
        ...


class HeldLease(Protocol):
    """The lease without which nothing is written; `worker/lease.py`."""

    key: str
    generation: int

    def touch(self) -> None: ...
    async def wait_held(self) -> None: ...
    async def wait_renewed(self, after: int) -> None: ...


class Fenced(Exception):
    """The key has another writer's value."""


class StateWriter:
    """Writes the dirty keys until cancelled.

    Args:
        bus: has the bucket.
        source: has the dirty keys.
        journal_id: part of each value; identifies this worker's values.
        lease: nothing is written without it.
    """

    def __init__(self, bus: Bus, source: StateSource, journal_id: str, lease: HeldLease) -> None:
        self._bus, self._source, self._lease = bus, source, lease
        self._journal_id = journal_id
        self._revisions: dict[str, int] = {}
        self._unsendable: dict[str, int] = {}
        self._failed: dict[str, int] = {}  # after how many other failures, the last time
        self._failures = 0
        self._fenced_at: int | None = None
        self.fenced = False

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._source.wait_dirty()
            await self._wait_allowed()
            # What failed comes behind what was not tried, and what the bus does not accept as it is
            # comes last: neither holds up the others.
            rows = sorted(
                self._source.dirty(),
                key=lambda row: (
                    self._unsendable.get(row.key) == row.seq,
                    self._failed.get(row.key, 0),
                ),
            )
            results: Sequence[BaseException | None]
            if len(rows) == 1:  # as almost always: no task for it
                results = [await self._try(rows[0])]
            else:
                tried = (self._try(row) for row in rows[:CONCURRENT_MAX])
                results = await asyncio.gather(*tried, return_exceptions=True)
            await self._after([result for result in results if result is not None])

    async def _try(self, row: StateRow) -> BaseException | None:
        try:
            await self._put(row)
        except (BusError, Fenced) as error:
            self._failures += 1
            self._failed[row.key] = self._failures
            return error
        return None

    async def _after(self, failures: Sequence[BaseException]) -> None:
        for failure in failures:
            if not isinstance(failure, BusError | Fenced):
                raise failure
        if fences := [failure for failure in failures if isinstance(failure, Fenced)]:
            self.fenced = True
            self._fenced_at = self._lease.generation
            self._revisions.clear()
            log.error("state.fenced", reason=str(fences[0]), keys=len(fences))
            self._lease.touch()
        elif failures:
            log.debug("state.write_failed", reason=str(failures[0]), keys=len(failures))
            await asyncio.sleep(random.uniform(0.1, 0.5))  # noqa: S311

    async def _wait_allowed(self) -> None:
        if self._fenced_at is not None:
            # The next renewal decides who has the host ID; until then this worker does not write.
            await self._lease.wait_renewed(self._fenced_at)
            self._fenced_at, self.fenced = None, False
            log.info("state.unfenced")
        await self._lease.wait_held()

    async def _put(self, row: StateRow) -> None:
        if row.key == self._lease.key:
            # The lease writes the host's key, with the current facts.
            self._lease.touch()
        elif not await self._done_already(row):
            try:
                await self._set(row, self._revisions[row.key])
            except Unsendable:
                self._unsendable[row.key] = row.seq
                raise
        self._unsendable.pop(row.key, None)
        self._failed.pop(row.key, None)
        self._source.written(row.key, row.seq)

    async def _done_already(self, row: StateRow) -> bool:
        """At the first write of a key by this worker: whether the bucket has that value."""
        if row.key in self._revisions:
            return False
        found = await self._bus.read_state(row.key)
        self._revisions[row.key] = found[1] if found else 0
        return found is None if row.value is None else found is not None and found[0] == row.value

    async def _set(self, row: StateRow, revision: int) -> None:
        try:
            if row.value is None:
                await self._bus.delete_state(row.key, revision=revision)
                self._revisions.pop(row.key, None)
            else:
                self._revisions[row.key] = await self._bus.write_state(
                    row.key, row.value, revision=revision
                )
        except StateConflict as error:
            await self._read_back(row, revision, error)

    async def _read_back(self, row: StateRow, revision: int, conflict: StateConflict) -> None:
        found = await self._bus.read_state(row.key)
        if found is None:
            if row.value is None:
                self._revisions.pop(row.key, None)
                return
            self._revisions[row.key] = 0
            raise BusError(f"{row.key}: deleted meanwhile; written again") from conflict
        value, there = found
        if there <= revision:
            raise BusError(
                f"{row.key}: read back revision {there}, expected one after {revision}"
            ) from conflict
        if value != row.value and not self._is_ours(value, row.seq):
            raise Fenced(f"{row.key}: another writer's value at revision {there}") from conflict
        self._revisions[row.key] = there
        if value != row.value:
            raise BusError(
                f"{row.key}: an older value of this worker was written late"
            ) from conflict

    def _is_ours(self, data: bytes, seq: int) -> bool:
        try:
            value = unpack.unpack_map(data, unpack.ANSWER)
        except DecodeError:
            return False
        theirs = value.get("seq")
        return (
            value.get("journal_id") == self._journal_id
            and isinstance(theirs, int)
            and theirs <= seq
        )
