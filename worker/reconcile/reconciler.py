"""The bounded check that repairs what changed behind hostd's back: networks, and leftovers of ours.

Runs every 30 s, and for the networks concerned on each change that the kernel tells of. What a
finished command could not undo is ours by record and removed here, unless a live instance uses it
by now.
"""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from itertools import chain

import structlog

from handlers.errors import Failure
from handlers.host.inventory import collect
from handlers.host.net.drift_watch import Change
from handlers.instance.stop import finish_stop
from handlers.mechanism import Removable
from handlers.network import restore_network
from handlers.network_names import names_of
from handlers.steps import Steps
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.host_factory import RealHost
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask
from worker.metrics import Metrics
from worker.reconcile.orphans import Found, counted, unowned

PASS_EVERY_S = 30.0

log = structlog.get_logger()


class Reconciler:
    """One pass at a time, each bounded by what the journal knows."""

    def __init__(
        self,
        real: RealHost,
        journal: Journal,
        lanes: Lanes,
        known: Mapping[str, Removable],
        metrics: Metrics,
    ) -> None:
        self._host = real.host
        self._journal = journal
        self._lanes = lanes
        self._mechanisms = known
        self._metrics = metrics
        self._watch = real.network.watch
        self._bound_logs = real.jails.bound_logs
        self._unowned: Found = set()
        self._counted_at = 0.0

    async def run(self) -> None:
        """Until cancelled: on each hint of the kernel's, and every 30 s."""
        while True:
            try:
                await self._follow()
            except (Failure, OSError) as error:
                # Deaf for one interval; the next pass sees what was missed.
                log.warning("caretaker.deaf", error=repr(error))
                await asyncio.sleep(PASS_EVERY_S)

    async def _follow(self) -> None:
        hints = self._watch.changes()
        hint = asyncio.ensure_future(anext(hints))
        pass_at = 0.0
        try:
            while True:
                await asyncio.wait({hint}, timeout=max(0.0, pass_at - time.monotonic()))
                if hint.done():
                    change = hint.result()
                    hint = asyncio.ensure_future(anext(hints))
                    await self.look(change)
                else:
                    await self.once()
                    pass_at = time.monotonic() + PASS_EVERY_S
        finally:
            hint.cancel()
            await asyncio.gather(hint, return_exceptions=True)
            await hints.aclose()

    async def look(self, change: Change) -> None:
        """Repair what a hint is about: one tenant's network, or all of them."""
        await self.repair_networks(change.tenant_net_id)

    async def once(self) -> None:
        """One pass; a trouble is logged and left to the next."""
        try:
            await self.repair_networks()
            await self.sweep_leftovers()
            self._finish_stops()
            await self._bound_logs()
            await self._count_orphans()
        except (Failure, OSError) as error:
            log.warning("caretaker.trouble", error=repr(error))

    async def repair_networks(self, net_id: int | None = None) -> None:
        """Put each standing network, or one, in force again; a `drift` event says what was off."""
        for record in self._journal.networks():
            if net_id is not None and record.net.tenant_net_id != net_id:
                continue
            try:
                restored = await restore_network(record, self._host)
            except (Failure, OSError) as error:
                log.warning("network.not_repaired", tenant=record.tenant_id, error=repr(error))
                continue
            if restored.repaired or restored.lost:
                await self._journal.event(
                    "drift",
                    tenant_id=record.tenant_id,
                    reason="changed behind hostd's back",
                    detail={"repaired": list(restored.repaired), "lost": list(restored.lost)},
                )

    async def sweep_leftovers(self) -> None:
        """Remove what finished commands left behind; what stays is tried again."""
        for command_id, rows in self._journal.leftovers().items():
            for row in rows:
                if not row.existed and not self._in_use(row.mechanism, row.key):
                    try:
                        await self._mechanisms[row.mechanism].remove(row.key)
                    except (Failure, OSError) as error:
                        log.warning("leftover.stays", step=row.mechanism, error=repr(error))
                        continue
                    await self._journal.event(
                        "removed",
                        reason="left behind by a command",
                        detail={"mechanism": row.mechanism, "key": row.key},
                        command_id=command_id,
                    )
                await self._journal.forget(command_id, row.mechanism, row.key)

    def _finish_stops(self) -> None:
        """A Stop that was answered half-way is completed in its instance's lane."""
        for record in self._journal.instances():
            if record.status is not Status.STOPPING or self._has_command(record):
                continue
            chore = MaintenanceTask("finish_stop", partial(self._finish_stop, record.ref))
            self._lanes.put_chore(Lane.instance(record.ref), chore)

    async def _finish_stop(self, ref: InstanceRef) -> None:
        record = self._journal.instance(ref)
        if record is None or record.status is not Status.STOPPING or self._has_command(record):
            return
        steps = Steps(f"finish-{record.jail_id}", self._journal, {})
        try:
            done = await finish_stop(record, steps, self._host)
        except (Failure, OSError) as error:
            log.warning("stop.unfinished", instance=str(ref), error=repr(error))
            return
        if done.record is not None:
            await self._journal.put_instance(done.record, reason="completed later", durable=True)

    def _has_command(self, record: InstanceRecord) -> bool:
        command_id = record.command_id
        return command_id is not None and self._journal.is_unfinished(command_id)

    async def _count_orphans(self) -> None:
        """At most once per pass interval: a look at the whole host is not for every hint."""
        now = time.monotonic()
        if now - self._counted_at < PASS_EVERY_S:
            return
        self._counted_at = now
        inventory = await asyncio.to_thread(collect, self._host.settings)
        found = unowned(inventory, self._journal.instances(), self._journal.networks())
        self._metrics.orphans(counted(self._unowned, found))
        self._unowned = found

    def _in_use(self, mechanism: str, key: str) -> bool:
        """Whether a live or sleeping instance has the resource by now."""
        used = chain.from_iterable(
            (
                record.jail_id,
                record.cgroup_key,
                str(record.ref),
                *((names.tap, names.pin.key) if (names := names_of(record)) else ()),
            )
            for record in self._journal.instances()
            if record.holds_offset
        )
        networks = (record.net.bridge_name for record in self._journal.networks())
        return key in {*used, *networks} or mechanism == "tenant_rules"
