"""The reconciler: restores networks that were changed out of band, and removes leftovers.

Runs every 30 s, and for the affected networks on each change that the kernel reports. What a
finished command could not undo is recorded as hostd's and removed here, unless a live instance
uses it by now.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from itertools import chain
from typing import Protocol

import structlog

from handlers.claims.look import look_for_unrecorded
from handlers.errors import Failure
from handlers.instance.stop import finish_stop
from handlers.interfaces import Host
from handlers.mechanism import Removable, StepRow
from handlers.network import restore_network
from handlers.network_names import names_of
from handlers.network_survey import damaged_tenants
from handlers.specs import SnapshotKey, TenantRulesKey
from handlers.steps import Steps
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, NetworkRecord, Status
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask
from worker.logs import facts_of
from worker.metrics import Metrics
from worker.reconcile.drift import BASE_RULES, report_drift
from worker.reconcile.running_check import RunningCheck
from worker.reconcile.sweep import Sweep

PASS_EVERY_S = 30.0
SCAN_SHARE, SCAN_EVERY_MAX_S = 0.001, 300.0  # of what goes through all of the host

log = structlog.get_logger()


class Change(Protocol):
    """A change that the kernel reported; without a net id it may concern every network. Of kind
    `rules` it concerns no bridge and no TAP."""

    @property
    def kind(self) -> str: ...

    @property
    def tenant_net_id(self) -> int | None: ...


class DriftWatch(Protocol):
    """Changes of interfaces and rules on this host, whoever made them."""

    def changes(self) -> AsyncGenerator[Change]:
        """Raises Failure or OSError when the kernel cannot be listened to."""
        ...


class Reconciler:
    """One pass at a time, each bounded by what the journal knows.

    Args:
        mechanisms: by name, to remove leftovers.
        drift: reports out-of-band changes of networks.
        bound_logs: cuts the logs of VMMs to their limit.
        sweep: removes what belongs to nothing.
        calls_hang: whether calls that were abandoned may still take effect: what is removed
            meanwhile is looked at again.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        host: Host,
        journal: Journal,
        lanes: Lanes,
        mechanisms: Mapping[str, Removable],
        metrics: Metrics,
        *,
        drift: DriftWatch,
        bound_logs: Callable[[], Awaitable[object]],
        sweep: Sweep,
        calls_hang: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._mechanisms = mechanisms
        self._metrics = metrics
        self._drift = drift
        self._bound_logs = bound_logs
        self._sweep_orphans = sweep
        self._calls_hang = calls_hang
        self._clock = clock
        self._running = RunningCheck(host, journal, lanes, metrics)
        self._lost: dict[str, tuple[str, ...]] = {}
        self._unrecorded: set[tuple[int, int]] = set()
        self._warnings: set[str] = set()
        self._scans_due: dict[str, float] = {}
        self._unknown: set[tuple[str, str, str]] = set()

    async def run(self) -> None:
        """Until cancelled: on each change that the kernel reports, and every 30 s."""
        while True:
            try:
                await self._follow()
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                # No reports for one interval; the next pass finds what was missed.
                log.warning("drift_watch.failed", **facts_of(error))
                await asyncio.sleep(PASS_EVERY_S)

    async def _follow(self) -> None:
        changes = self._drift.changes()
        change = asyncio.ensure_future(anext(changes))
        pass_at = 0.0
        try:
            while True:
                await asyncio.wait({change}, timeout=max(0.0, pass_at - self._clock()))
                # First, so that a stream of changes does not hold it up.
                if self._clock() >= pass_at:
                    await self.once()
                    pass_at = self._clock() + PASS_EVERY_S
                if change.done():
                    found = change.result()
                    change = asyncio.ensure_future(anext(changes))
                    if found.tenant_net_id is not None:
                        await self.repair_network(found.tenant_net_id)
                    else:
                        await self.repair_networks(rules_only=found.kind == "rules")
        finally:
            change.cancel()
            await asyncio.gather(change, return_exceptions=True)
            await changes.aclose()

    async def once(self) -> None:
        """One pass; what fails is logged, the rest is done, and the next pass tries again."""
        parts: dict[str, Callable[[], Awaitable[object]]] = {
            "networks": self.repair_networks,
            "running": self._running.run,
            "warnings": self._report_warnings,
            "leftovers": self.sweep_leftovers,
            "stops": self._finish_stops,
            "logs": self._bound_logs,
            "unrecorded": self._look_for_unrecorded,
            "orphans": self._find_orphans,
        }
        for name, part in parts.items():
            try:
                await part()
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                log.warning("reconciler.pass_failed", part=name, **facts_of(error))
        self._metrics.vmms.lost(sum(map(len, self._lost.values())) + self._running.lost)

    async def repair_network(self, net_id: int) -> None:
        """Restore the network with this id to its desired state."""
        if (record := self._journal.records.network_with_id(net_id)) is not None:
            await self._restore(record)

    async def repair_networks(self, *, rules_only: bool = False) -> None:
        """Restore the networks that are not in their desired state: all of them are looked at.

        With `rules_only` not at bridges and TAPs.
        """
        try:
            base, damaged = await damaged_tenants(self._host, rules_only=rules_only)
        except Exception as error:  # noqa: BLE001 - logged; each network is tried by itself
            log.warning("network.survey_failed", **facts_of(error))
            base, damaged = False, [each.tenant_id for each in self._journal.records.networks()]
        if not rules_only:  # what a network that is whole had lost is there again
            self._lost = {each: lost for each, lost in self._lost.items() if each in set(damaged)}
        if base:
            await report_drift(self._journal, self._metrics, BASE_RULES, "changed out of band")
        for tenant_id in damaged:
            if (record := self._journal.records.network(tenant_id)) is not None:
                await self._restore(record)

    async def _restore(self, record: NetworkRecord) -> None:
        """Restore one network; a `drift` event names what had changed, once what is lost."""
        try:
            restored = await restore_network(record, self._host)
        except Exception as error:  # noqa: BLE001 - logged; the rest goes on
            log.warning("network.repair_failed", tenant=record.tenant_id, **facts_of(error))
            return
        known = self._lost.get(record.tenant_id, ())
        is_news = bool(restored.lost) and known != restored.lost
        if restored.lost:
            self._lost[record.tenant_id] = restored.lost
        else:
            self._lost.pop(record.tenant_id, None)
        if restored.repaired or is_news:
            await report_drift(
                self._journal,
                self._metrics,
                restored,
                "changed out of band",
                tenant_id=record.tenant_id,
                known=known,
            )

    async def _report_warnings(self) -> None:
        """Count what keeps guests from the network; an event has what is new since last time."""
        warnings = set(await self._host.networks.warnings(self._journal.records.network_count()))
        self._metrics.network_warnings(len(warnings))
        if new := sorted(warnings - self._warnings):
            await self._journal.records.event(
                EventKind.NETWORK,
                reason="guests may not work",
                detail={"warnings": new},
            )
        self._warnings = warnings

    async def sweep_leftovers(self) -> None:
        """Remove what finished commands left behind; what stays is tried again."""
        for command_id, rows in self._journal.steps.leftovers().items():
            if self._journal.quarantine.covers(command_id):
                continue  # a record that cannot be read may use them
            for row in reversed(rows):
                if row.mechanism not in self._mechanisms:
                    self._note_unknown(command_id, row)
                    continue
                try:
                    removed = await self._sweep(row)
                except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                    log.warning("leftover.remove_failed", step=row.mechanism, **facts_of(error))
                    continue
                if self._calls_hang():
                    continue  # one of them may make it again
                if removed:
                    await self._journal.records.event(
                        EventKind.REMOVED,
                        reason="left behind by a command",
                        detail={"mechanism": row.mechanism, "key": row.key},
                        command_id=command_id,
                    )
                await self._journal.steps.forget(command_id, row.mechanism, row.key)

    def _note_unknown(self, command_id: str, row: StepRow) -> None:
        """A newer hostd wrote it, which can still remove it: kept, and logged once."""
        if (command_id, row.mechanism, row.key) not in self._unknown:
            self._unknown.add((command_id, row.mechanism, row.key))
            log.warning("leftover.unknown", command_id=command_id, step=row.mechanism, key=row.key)

    async def _sweep(self, row: StepRow) -> bool:
        """Remove the resource of one row, unless it existed before or an instance or network of
        the journal uses it by now; true if it was removed."""
        mechanism = self._mechanisms[row.mechanism]
        if row.existed or not mechanism.swept:
            return False
        # No network command is between making a bridge or rules and recording the network.
        async with self._host.locks.subnets():
            if self._in_use(row.mechanism, row.key):
                return False
            await mechanism.remove(row.key)
        return True

    async def _finish_stops(self) -> None:
        """Complete each Stop that failed partway, in the lane of its instance."""
        for record in self._journal.records.instances():
            if record.status is not Status.STOPPING or self._has_command(record):
                continue
            task = MaintenanceTask("finish_stop", partial(self._finish_stop, record.ref))
            self._lanes.put_maintenance(Lane.instance(record.ref), task)

    async def _finish_stop(self, ref: InstanceRef) -> None:
        record = self._journal.records.instance(ref)
        if record is None or record.status is not Status.STOPPING or self._has_command(record):
            return
        steps = Steps(f"finish-{record.jail_id}", self._journal.steps, {})
        try:
            done = await finish_stop(record, steps, self._host)
        except (Failure, OSError) as error:
            log.warning("stop.finish_failed", instance=str(ref), error=repr(error))
            return
        if done.record is not None:
            await self._journal.records.put_instance(
                done.record, reason="completed by the reconciler", durable=True
            )

    def _has_command(self, record: InstanceRecord) -> bool:
        command_id = record.command_id
        return command_id is not None and self._journal.commands.is_unfinished(command_id)

    async def _scan(self, name: str, scan: Callable[[], Awaitable[object]], every_s: float) -> None:
        """Scan the whole host at most every `every_s`, and less often where that takes long: for a
        thousandth of the time, but at least every 5 minutes."""
        began = self._clock()
        if began < self._scans_due.get(name, began):
            return
        try:
            await scan()
        finally:
            pause_s = min((self._clock() - began) / SCAN_SHARE, SCAN_EVERY_MAX_S)
            self._scans_due[name] = began + max(pause_s, every_s)

    async def _look_for_unrecorded(self) -> None:
        """Book and count the VMMs that no record explains; each is logged once."""
        await self._scan("unrecorded", self._scan_for_unrecorded, 0.0)

    async def _scan_for_unrecorded(self) -> None:
        found = await look_for_unrecorded(self._host)
        self._metrics.unrecorded_vmms(len(found))
        seen = {(each.process.pid, each.process.start_ticks) for each in found}
        for each in found:
            if (each.process.pid, each.process.start_ticks) not in self._unrecorded:
                log.warning("vmm.unrecorded", **each.as_map())
        self._unrecorded = seen

    async def _find_orphans(self) -> None:
        await self._scan("orphans", self._sweep_orphans.once, PASS_EVERY_S)

    def _in_use(self, mechanism: str, key: str) -> bool:
        """Whether a live or sleeping instance uses the resource by now.

        One that sleeps has nothing of a launch: what a failed Wake left is in nobody's use.
        """
        records = self._journal.records.instances()
        used = chain.from_iterable(
            (
                record.jail_id,
                record.cgroup_key,
                *((names.tap, names.pin.key) if (names := names_of(record)) else ()),
            )
            for record in records
            if record.holds_host
        )
        kept = chain.from_iterable(
            (str(record.ref), str(SnapshotKey(record.ref, record.snapshot or 0)))
            for record in records
            if record.holds_offset
        )
        # A data disk that the journal knows is kept while its instance is stopped.
        disks = (str(record.ref) for record in records if record.disk is not None)
        nets = [record.net for record in self._journal.records.networks()]
        if mechanism == self._host.tenant_rules.name:
            return any(TenantRulesKey.parse(key).overlaps(net) for net in nets)
        return key in {*used, *kept, *disks, *(net.bridge_name for net in nets)}
