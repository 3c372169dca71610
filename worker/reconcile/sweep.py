"""Removes orphans: late, few at a time, each with a row before it and an event after it.

One is due after two sightings, SIGHTINGS_S apart, and a grace period. At most `[sweep] per_hour`
are removed in any hour; beyond that the sweep stops and alerts. An operator's `sweep` waits for the
two sightings, not for the rest. Nothing is removed that a record, a row of the step log, an
unfinished command or a process may need; what the kernel says is checked again at the removal.

Order against commands. A removal runs in the lane of the instance if that is known, and for
interfaces and rules under the locks of network commands; there the journal is asked again. What a
command makes is in the journal before it is on the host. The jail and the cgroup of a launch have
its number in their name, and a launch takes one above every trace: none is made twice.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from handlers.claims.orphan import Orphan
from handlers.errors import Conflict, Failure
from handlers.interfaces import Host
from handlers.specs import ArtifactSpec, SnapshotKey
from schemas import naming
from schemas.envelopes import EventKind
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.journal import audit
from worker.journal.journal import Journal
from worker.lanes import Lanes
from worker.logs import facts_of
from worker.metrics import Metrics
from worker.reconcile.claims import run_in_lane
from worker.reconcile.orphans import (
    Inventory,
    Known,
    busy_names,
    counts_of,
    find_orphans,
    instance_of_files,
    net_id_of,
    snapshot_key,
    tenant_of,
)
from worker.tracing.tracing import Tracing

SIGHTINGS_S = 60.0
HOUR_MS = 3_600_000
LANE_PATIENCE_S = 5.0
SWEEP, OPERATOR = "sweep", "operator"

log = structlog.get_logger()


class Removal(Protocol):
    """`handlers/host/orphans.py`."""

    async def remove(self, orphan: Orphan) -> None:
        """Raises Conflict: something uses it, and it is as it was. Failure: it was not removed."""
        ...


@dataclass(slots=True)
class Sighting:
    """When an orphan was seen first and last, in seconds, and what keeps it."""

    first_s: float
    last_s: float
    kept: str


@dataclass(frozen=True, slots=True)
class Swept:
    """One orphan in the report of a sweep. `state`: removed, kept, failed, due or waiting."""

    orphan: Orphan
    state: str
    seen_s: float
    reason: str = ""

    def as_map(self) -> dict[str, object]:
        """For the answer."""
        return {
            "kind": self.orphan.kind,
            "name": self.orphan.name,
            "state": self.state,
            "seen_s": round(self.seen_s),
            "reason": self.reason,
        }


class Sweep:
    """What was seen of orphans, and their removal.

    Args:
        removal: removes one, if nothing uses it.
        take_inventory: lists what carries hostd's mark.
        calls_hang: whether calls that were abandoned may still take effect.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        host: Host,
        journal: Journal,
        lanes: Lanes,
        metrics: Metrics,
        removal: Removal,
        *,
        take_inventory: Callable[[], Awaitable[Inventory]],
        calls_hang: Callable[[], bool],
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._metrics = metrics
        self._removal = removal
        self._take_inventory = take_inventory
        self._calls_hang = calls_hang
        self._tracing = tracing or Tracing("")
        self._clock = clock
        self._settings = host.settings.sweep
        self._seen: dict[Orphan, Sighting] = {}
        self._revisions: frozenset[str] = frozenset()
        self._unreadable: set[str] = set()
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[list[Swept]]] = set()
        self._results: Counter[str] = Counter()  # of the removals of this pass
        self._resumed = False
        self._stopped = False
        self.spent = 0  # of the budget of the hour, as of the last pass

    async def once(self) -> None:
        """A pass of the reconciler: look, and remove what is due, within the budget."""
        async with self._lock, self._noted("sweep"):
            await self._look()
            if not self._resumed:
                hidden = self._journal.quarantine.hides_records  # then nothing counts as seen
                is_there = None if hidden else self._seen.__contains__
                await self._journal.audit.close_cut_off(is_there)
                self._resumed = True
            now_s = self._clock()
            age_s = SIGHTINGS_S + self._settings.grace_s
            due = [each for each, seen in self._confirmed() if now_s - seen.first_s >= age_s]
            if self._settings.mode == "remove":
                await self._remove_within_budget(due)

    def start_now(self, *, dry_run: bool) -> asyncio.Task[list[Swept]]:
        """`now` as a task that its caller may abandon."""
        task = asyncio.create_task(self.now(dry_run=dry_run), name="sweep")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel what was abandoned; the next worker reports a removal that is cut off by it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def now(self, *, dry_run: bool) -> list[Swept]:
        """An operator's sweep: remove what was seen twice, without grace period and budget.

        With `dry_run` nothing is removed, and the report says what would be.
        """
        async with self._lock, self._noted("sweep by an operator"):
            await self._look()
            confirmed = dict(self._confirmed())
            report: list[Swept] = []
            for orphan, seen in list(self._seen.items()):
                seen_s = self._clock() - seen.first_s
                if seen.kept:
                    report.append(Swept(orphan, "kept", seen_s, seen.kept))
                elif orphan not in confirmed:
                    reason = f"seen for less than {SIGHTINGS_S:g} s: sweep again"
                    report.append(Swept(orphan, "waiting", seen_s, reason))
                elif dry_run:
                    report.append(Swept(orphan, "due", seen_s))
                else:
                    state, reason = await self._remove(orphan, OPERATOR)
                    report.append(Swept(orphan, state, seen_s, reason))
            return report

    @asynccontextmanager
    async def _noted(self, name: str) -> AsyncGenerator[None]:
        with self._tracing.work(name) as facts:
            self._results.clear()
            try:
                yield
            finally:
                facts["hostd.orphans"] = len(self._seen)
                facts.update({f"hostd.orphans.{key}": n for key, n in self._results.items()})

    # -- looking -------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Take the inventory, then ask the journal; what is gone or owned is forgotten."""
        inventory = await self._take_inventory()
        self._revisions = await self._revisions_without_records(inventory)
        orphans = find_orphans(inventory, self._known())
        if self._journal.quarantine.hides_records:
            orphans.clear()  # what seems to belong to none may belong to one that cannot be read
        now_s = self._clock()
        twice = counts_of(orphan for orphan in orphans if orphan in self._seen)
        self._seen = {
            orphan: Sighting(
                self._seen[orphan].first_s if orphan in self._seen else now_s, now_s, kept
            )
            for orphan, kept in orphans.items()
        }
        self._metrics.orphans(twice)

    def _confirmed(self) -> list[tuple[Orphan, Sighting]]:
        """Seen twice, far enough apart, and kept by nothing; interfaces before their bridges."""
        return [
            (orphan, seen)
            for orphan, seen in self._seen.items()
            if not seen.kept and seen.last_s - seen.first_s >= SIGHTINGS_S
        ]

    def _known(self) -> Known:
        """What the journal says now: nothing is awaited."""
        records, steps = self._journal.records, self._journal.steps
        unfinished = [row.lane for row in self._journal.commands.unfinished()]
        refs = [lane.ref for lane in unfinished if lane.ref is not None]
        pending = self._host.pending_reservations
        tenants = [lane.tenant_id for lane in unfinished if lane.tenant_id is not None]
        return Known(
            instances=[*records.instances(), *pending.values()],
            networks=records.networks(),
            rows=steps.all_rows(),
            busy=busy_names([*refs, *pending], tenants),
            unrecorded=self._host.unrecorded.vmms,
            revisions=self._revisions,
            data=self._host.settings.paths.data,
            state=self._host.settings.paths.state,
        )

    async def _revisions_without_records(self, inventory: Inventory) -> frozenset[str]:
        """Revisions that a sleeping instance, or a VMM, without a record needs."""
        records, found = self._journal.records, set[str]()
        if all(records.refers(key) for key in inventory.artifacts):
            return frozenset()
        for name in inventory.snapshots:
            if (key := snapshot_key(name)) is not None:
                pool = f"{key.ref.tenant_id}/{key.ref.pool_id}/"
                found |= await self._needed(name, self._of_snapshot(key), inventory, pool)
        for jail_id in inventory.jails:
            found |= await self._needed(jail_id, self._of_jail(jail_id), inventory, "")
        return frozenset(found)

    async def _needed(
        self, name: str, needed: Awaitable[str | None], inventory: Inventory, prefix: str
    ) -> set[str]:
        """What one needs; if it cannot be read, each revision whose key begins with `prefix`."""
        try:
            key = await needed
        except Exception as error:  # noqa: BLE001 - logged; the rest goes on
            if name not in self._unreadable:
                log.warning("sweep.unreadable", name=name, **facts_of(error))
            self._unreadable.add(name)
            return {each for each in inventory.artifacts if each.startswith(prefix)}
        return set() if key is None else {key}

    async def _of_snapshot(self, key: SnapshotKey) -> str | None:
        info = await self._host.snapshots.read(key.ref)
        if info is None:
            return None
        return ArtifactSpec(key.ref.tenant_id, key.ref.pool_id, info.revision).key

    async def _of_jail(self, jail_id: str) -> str | None:
        metadata = await self._host.jails.metadata(jail_id)
        record = None if metadata is None else metadata.record
        return None if record is None else ArtifactSpec.key_of(record)

    # -- removing ------------------------------------------------------------------------------

    async def _remove_within_budget(self, due: list[Orphan]) -> None:
        self.spent = await self._journal.audit.spent_within(HOUR_MS)
        left = self._settings.per_hour - self.spent
        for orphan in await self._shared_out(due):
            if left <= 0:
                break
            state, _ = await self._remove(orphan, SWEEP)
            left -= state != audit.KEPT
            self.spent = self._settings.per_hour - left
        remaining = [
            orphan for orphan in due if orphan in self._seen and not self._seen[orphan].kept
        ]
        await self._report_budget(remaining if left <= 0 else [])

    async def _shared_out(self, due: list[Orphan]) -> list[Orphan]:
        """In turn, one of hostd's own and one of each tenant in whose directory agentd makes names:
        whose had the least of this hour first, then hostd's own, then whose turn is longest ago.

        Else names that agentd makes would use up the budget of all others, hour by hour.
        """
        shares = await self._journal.audit.shares(HOUR_MS)
        spent = {tenant_id: share[0] for tenant_id, share in shares.items()}
        turns: list[tuple[int, bool, int, int, Orphan]] = []
        for place, orphan in enumerate(due):
            tenant_id = tenant_of(orphan, self._host.settings.paths.data)
            had, (_, last) = spent.get(tenant_id, 0), shares.get(tenant_id, (0, 0))
            turns.append((had, tenant_id is not None, last, place, orphan))
            spent[tenant_id] = had + 1
        return [orphan for *_, orphan in sorted(turns)]

    async def _report_budget(self, remaining: list[Orphan]) -> None:
        """Alert once when the budget is used up and orphans are left."""
        stopped = bool(remaining)
        self._metrics.sweep_stopped(stopped=stopped)
        if stopped and not self._stopped:
            counts = counts_of(remaining)
            log.warning("sweep.stopped", per_hour=self._settings.per_hour, left=counts)
            await self._journal.records.event(
                EventKind.ORPHANS,
                reason="the sweep stopped: its budget of this hour is used up",
                detail={"per_hour": self._settings.per_hour, "left": counts},
            )
        self._stopped = stopped

    async def _remove(self, orphan: Orphan, by: str) -> tuple[str, str]:
        """Remove one; returns the result and why. A row precedes the effect."""
        tenant_id = tenant_of(orphan, self._host.settings.paths.data)
        try:
            number = await self._journal.audit.begin(orphan, by, tenant_id)
        except Failure:
            self._resumed = False  # its commit failed, and the row may be there
            raise
        try:
            async with asyncio.timeout(LANE_PATIENCE_S) as patience:

                async def remove() -> None:
                    patience.reschedule(None)  # what has begun is not cut short
                    async with self._locked(orphan):
                        self._refuse_needed(orphan)
                        await self._removal.remove(orphan)

                ref = await self._instance_of(orphan)
                if ref is None:
                    await remove()
                else:
                    await run_in_lane(self._lanes, Lane.instance(ref), "sweep", remove)
            result, reason = audit.REMOVED, "an orphan: it belongs to nothing in the journal"
        except TimeoutError:
            result, reason = audit.KEPT, "the lane of its instance is busy"
        except Conflict as failure:
            result, reason = audit.KEPT, failure.message
        except Exception as error:  # noqa: BLE001 - logged; the rest goes on
            result, reason = audit.FAILED, str(error) or repr(error)
            log.warning(
                "orphan.remove_failed", kind=orphan.kind, name=orphan.name, **facts_of(error)
            )
        try:
            await self._journal.audit.end(number, orphan, by, result, reason)
        except Failure:
            self._resumed = False  # the next pass ends the row with what it finds
            raise
        self._metrics.orphan_swept(orphan.kind, result)
        self._results[result] += 1
        if result == audit.REMOVED:
            log.warning("orphan.removed", kind=orphan.kind, name=orphan.name, by=by)
            self._seen.pop(orphan, None)
        elif orphan in self._seen:
            # It may be seen again: as if for the first time.
            self._seen[orphan] = Sighting(self._clock(), self._clock(), reason)
        return result, reason

    def _refuse_needed(self, orphan: Orphan) -> None:
        """Ask the journal again, at the last moment: nothing is awaited before the effect.

        Raises:
            Conflict: it is no orphan any more, or something may need it.
        """
        if self._journal.quarantine.hides_records:
            raise Conflict("it may belong to a record that this version cannot read")
        if self._calls_hang():
            raise Conflict("a call that hangs in the kernel may still take effect")
        now = find_orphans(_only(orphan), self._known())
        if kept := now.get(orphan, "it belongs to an instance or network by now"):
            raise Conflict(kept)

    @asynccontextmanager
    async def _locked(self, orphan: Orphan) -> AsyncGenerator[None]:
        """No command makes or removes the interface, or the rules of it, meanwhile."""
        async with AsyncExitStack() as stack:
            if (net_id := net_id_of(orphan)) is not None:
                locks, record = self._host.locks, self._journal.records.network_with_id(net_id)
                if record is not None:
                    await stack.enter_async_context(locks.exclusive(record.tenant_id))
                await stack.enter_async_context(locks.subnets())
            yield

    async def _instance_of(self, orphan: Orphan) -> InstanceRef | None:
        """Whose it is, by the jail's metadata, the TAP's alias or the path."""
        if orphan.kind in {"jails", "cgroups"}:
            jail_id = orphan.name.rpartition("/")[2]
            if naming.JAIL_ID_PATTERN.fullmatch(jail_id) is None:
                return None
            metadata = await self._host.jails.metadata(jail_id)
            return None if metadata is None else metadata.ref
        if orphan.kind == "taps":
            owner = (await self._host.taps.owners()).get(orphan.name)
            ids = [] if owner is None else owner.instance.split("/")
            valid = len(ids) == 3 and all(map(naming.ID_PATTERN.fullmatch, ids))
            return InstanceRef(*ids) if valid else None
        return instance_of_files(orphan, self._known())


@dataclass(frozen=True, slots=True)
class OneOrphan:
    """An inventory that has one name."""

    jails: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    bridges: tuple[str, ...] = ()
    nft: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    temp: tuple[str, ...] = ()


def _only(orphan: Orphan) -> OneOrphan:
    fields: dict[str, Any] = {orphan.kind: (orphan.name,)}
    return OneOrphan(**fields)
