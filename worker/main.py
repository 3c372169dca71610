"""The worker of one host: its parts, the order they start in, and the order they stop in.

Start: directories, host lock, journal, host, control socket, bus; Ping is answered from then on.
Then recovery, and only then the lanes. Stop (SIGTERM): `Worker._shut_down`. VMs keep running
throughout. The loop is uvloop's (ADR 0961).
"""

import asyncio
import contextlib
import gc
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from typing import Any

import structlog
import uvloop

from handlers.admission.budgets import capacity
from handlers.errors import Failure, of_os_error
from handlers.host.facts import HostFacts
from handlers.host.jail.layout import launched_versions
from handlers.host.linux.call_threads import (
    abandoned_calls,
    exhausted_kinds,
    hung_calls,
    thread_counts,
)
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.linux.syscalls import give_back_memory
from handlers.host.lock import HostLock
from handlers.host.snapshot.manifest import published_versions
from handlers.host.storage.disk_space import DiskSpace
from handlers.host.vmm.binaries import VmmBinaries
from handlers.registry import HANDLERS, mechanisms
from schemas.codes import EXIT_CODES, Code
from schemas.envelopes import EventKind
from schemas.protocol.facts import HostState
from schemas.requests import InstanceRef
from schemas.settings import Settings
from schemas.subjects import Subjects
from worker import logs
from worker.background import BackgroundTasks
from worker.bus.nats import NatsBus
from worker.control.audit import AuditRoute
from worker.control.claims import ClaimRoutes
from worker.control.connections import Connections
from worker.control.drain_routes import DrainRoutes
from worker.control.draining import DrainSwitch
from worker.control.dump import Dump
from worker.control.emptying import Emptying
from worker.control.explain import ExplainRoute
from worker.control.overview import Overview
from worker.control.routes import Route
from worker.control.server import MAX_CONNECTIONS as CONTROL_CONNECTIONS
from worker.control.server import ControlServer
from worker.descriptors import DescriptorReserve, check_limit
from worker.dispatch import Dispatch
from worker.doctor.worker_checks import WorkerChecks
from worker.failpoints import failpoint
from worker.health import MAX_CONNECTIONS, HealthServer
from worker.host_factory import RealHost, open_real_host
from worker.intake import Intake
from worker.journal.journal import Journal
from worker.lanes import Lanes
from worker.lease import Holder, Lease, LeaseHeld
from worker.meters import reading
from worker.metrics import Metrics, sample_loop_lag
from worker.outbox import Outbox
from worker.preflight import make_dirs, prepare_dirs
from worker.queries.answers import Answers
from worker.queries.explain import Explain
from worker.queries.service import query_service
from worker.queries.usage import usage_of
from worker.reconcile.adoption import Adoption
from worker.reconcile.claims import Claims
from worker.reconcile.launch_quarantine import LaunchQuarantine
from worker.reconcile.overwatch import Overwatch
from worker.reconcile.reconciler import Reconciler
from worker.reconcile.recovery import Recovery
from worker.reconcile.sweep import Sweep
from worker.reconcile.vmm_versions import VmmVersions, in_use
from worker.reconcile.vmm_watch import NotifyingRunner, VmmWatch
from worker.release.build import this_build
from worker.reload import Reload
from worker.settings import machine_id
from worker.signals import WorkerSignals
from worker.state_writer import StateWriter
from worker.supervision.service_manager import ServiceManager
from worker.supervision.state_directory import RETRIED, StateDirectory
from worker.supervision.watchdog import JournalPart, PullPart, Watchdog
from worker.tracing.exporter import SpanExporter
from worker.tracing.setup import exporting, tracing_of

OUTBOX_S = 5.0
LEASE_PATIENCE_S = 2.0
PRUNE_EVERY_S = 10.0
DISK_CHECK_S = 1.0
GIL_SWITCH_S = 0.0005

log = structlog.get_logger()


def run(settings: Settings, read: Callable[[], Settings] | None = None) -> int:
    """Run until SIGTERM or SIGINT.

    Args:
        settings: those in effect.
        read: reads them again, for SIGHUP; may raise SettingsError.

    Returns:
        The exit code: 0, or the one of the failure's code.
    """
    # A thread that has done its system call waits this long for the loop's thread; ADR 0972.
    sys.setswitchinterval(GIL_SWITCH_S)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_stopped(settings, read or (lambda: settings)))
    except Failure as failure:
        return _start_failed(failure.code, failure.message)
    except LeaseHeld as error:
        return _start_failed(Code.CONFLICT, str(error))
    except OSError as error:
        fault = of_os_error(error)
        return _start_failed(fault.code, fault.message)
    return 0


def _start_failed(code: Code, reason: str) -> int:
    log.error("worker.start_failed", reason=reason, code=code.value)
    return EXIT_CODES[code]


async def _until_stopped(settings: Settings, read: Callable[[], Settings]) -> None:
    signals = WorkerSignals()
    signals.install()
    manager = ServiceManager(os.environ)
    try:
        prepare_dirs(settings)
    except OSError as error:
        if error.errno not in RETRIED:
            raise
        make_dirs(settings)  # they exist; what cannot be written now is waited for, once locked
    async with AsyncExitStack() as stack:
        owned = (settings.paths.state, settings.jail_base)
        stack.enter_context(HostLock(settings.paths.run, *owned))
        metrics = Metrics(version("hostd"))
        # Closed after all that it is given spans by.
        exporter = stack.enter_context(exporting(settings, HostFacts().hostname()))
        check_limit(settings, HostFacts().memory_mib())
        reserve = DescriptorReserve(MAX_CONNECTIONS + CONTROL_CONNECTIONS)
        stack.callback(reserve.close)
        binaries = VmmBinaries(settings)
        limits = settings.limits
        disk = DiskSpace(
            state=settings.paths.state,
            reserve_mib=limits.disk_reserve_mib,
            marks=(limits.disk_high_percent, limits.disk_low_percent),
        )
        subjects = Subjects(settings.root, settings.host.id, settings.host.cell)

        async def open_journal() -> Journal:
            prepare_dirs(settings)
            if not settings.vmm.versions_dir:  # else after the journal, which knows what is in use
                (await binaries.read(settings.vmm, ()))()
            # Before the journal, which cannot be opened on a full file system.
            await run_in_thread(disk.check)
            return await Journal.open(
                f"{settings.paths.state}/journal.db",
                subjects=subjects,
                boot_id=HostFacts().boot_id(),
                lane_depth=limits.lane_depth,
                tenant_depth=limits.tenant_depth,
                host_depth=limits.host_depth,
                observe_commit=metrics.commit,
                relieve=disk.relieve,
            )

        directory = StateDirectory(settings, manager, metrics, reserve, signals.stop)
        journal = await directory.until(open_journal)
        if journal is None:
            manager.stopping()
            log.info("worker.stopped", host=settings.host.id)
            return
        stack.push_async_callback(journal.close)
        if settings.vmm.versions_dir:
            unrecorded = partial(versions_without_record, settings)
            (await binaries.read(settings.vmm, await in_use(journal, unrecorded)))()
        background = BackgroundTasks()
        real = open_real_host(settings, journal.records, background.start, disk, binaries)
        stack.callback(real.close)
        bus = NatsBus(settings.nats, subjects)
        stack.push_async_callback(bus.close)
        worker = Worker(
            settings,
            subjects,
            metrics,
            journal,
            real,
            bus,
            background,
            reserve,
            exporter=exporter,
        )
        stack.push_async_callback(worker.vmm_watch.close)
        stack.push_async_callback(real.warm.close)
        if settings.metrics.listen:
            await stack.enter_async_context(
                health := HealthServer(settings.metrics.listen, metrics, worker.checks, reserve)
            )
            worker.connections["metrics"] = health.connections, MAX_CONNECTIONS
        await stack.enter_async_context(
            control := ControlServer(
                settings.paths.run,
                worker.routes(),
                writable=lambda: journal.store.writable,
                reserve=reserve,
            )
        )
        worker.connections["control"] = control.connections, CONTROL_CONNECTIONS
        reload = Reload(settings, read, bus.connection, worker.vmm_versions.reread)
        await worker.run(signals, reload, manager)


class Worker:
    """Connects the parts; none of them knows it."""

    def __init__(
        self,
        settings: Settings,
        subjects: Subjects,
        metrics: Metrics,
        journal: Journal,
        real: RealHost,
        bus: NatsBus,
        background: BackgroundTasks,
        reserve: DescriptorReserve,
        *,
        exporter: SpanExporter | None,
    ) -> None:
        host, removable = real.host, mechanisms(real.host)
        self.settings, self.metrics, self.journal, self.bus = settings, metrics, journal, bus
        self._phase: HostState = "recovering"
        self._real = real
        self._mechanisms = removable
        self._background = background
        self._reserve = reserve
        self.exporter = exporter
        tracing = tracing_of(settings, exporter)
        journal.store.trace_of = tracing.of_command
        self.slots, self.locks, self.networks = host.slots, host.locks, host.networks
        self.connections: dict[str, tuple[Connections, int]] = {}
        self.unrecorded = host.unrecorded
        self.drain = DrainSwitch(journal)
        stop_at = failpoint(os.environ)
        self.quarantine = LaunchQuarantine(
            journal, settings.limits.quarantine_after, changed=self._state_changed
        )
        dispatch = Dispatch(
            journal,
            HANDLERS,
            host,
            removable,
            meters=metrics,
            refuse=self.drain.refusal,
            gate=self.quarantine,
            tracing=tracing,
            failpoint=stop_at,
        )
        runner = NotifyingRunner(dispatch)
        self.lanes = Lanes(runner)
        self.explain = Explain(host, journal, self.lanes, dispatch, self._is_ready)
        self.emptying = Emptying(self.drain, journal, self.lanes)
        self.vmm_watch = VmmWatch(host, journal, self.lanes, metrics, real.exits, tracing=tracing)
        runner.after = self.vmm_watch.sync
        own_version = version("hostd")
        self.intake = Intake(
            bus,
            journal,
            self.lanes,
            inbox_prefixes=settings.nats.inbox_prefixes,
            version=own_version,
            facts=self.facts,
            meters=metrics,
            tracing=tracing,
        )
        self.outbox = Outbox(bus, journal, failpoint=stop_at, sent=tracing.sent)
        self.lease = Lease(
            bus,
            subjects.host_key,
            Holder(
                machine_id(),
                real.facts.boot_id(),
                journal.store.journal_id,
                product_uuid=real.facts.product_uuid(),
                macs=real.facts.macs(),
                hostname=real.facts.hostname(),
            ),
            lambda: {
                **self.facts(),
                "version": own_version,
                "seq": journal.store.seq,
            },
        )
        self.state = StateWriter(bus, journal.outbox, journal.store.journal_id, self.lease)
        self.service = query_service(
            bus.connection,
            subjects,
            Answers(
                journal,
                real.facts.boot_id(),
                host_state=lambda: self.host_state,
                warm_vmms=lambda: self._real.warm.counts()["ready"],
                usage=partial(usage_of, host),
                explain=self.explain.explain,
                vmm_versions=lambda: self.vmm_versions.facts(),  # noqa: PLW0108 (made below)
            ),
            version=own_version,
            inbox_prefixes=settings.nats.inbox_prefixes,
        )
        self.claims = Claims(
            host, journal, self.lanes, ready=self._is_ready, after=self.vmm_watch.sync
        )
        self.sweep = Sweep(
            host,
            journal,
            self.lanes,
            metrics,
            real.orphan_removal,
            take_inventory=real.take_inventory,
            calls_hang=lambda: any(hung_calls().values()),
            tracing=tracing,
        )
        self.reconciler = Reconciler(
            host,
            journal,
            self.lanes,
            removable,
            metrics,
            drift=real.network.watch,
            bound_logs=real.jails.bound_logs,
            sweep=self.sweep,
            calls_hang=lambda: any(hung_calls().values()),
        )
        self.vmm_versions = VmmVersions(
            real.binaries,
            journal,
            self.lease.touch,
            partial(versions_without_record, settings),
        )
        self.overwatch = Overwatch(host, journal, self.lanes, metrics.vmms)
        self.lanes.on_arrival = self.overwatch.yield_to
        adoption = Adoption(host, journal, real.jail_dirs, tracing)
        self.recovery = Recovery(host, journal, self.vmm_watch, adoption, metrics, tracing)
        self.dump = Dump(self)
        self._bounded = reading.Parts(
            host, journal, bus, self.service, self.quarantine, self.sweep, exporter
        )
        metrics.on_collect(self._collect)
        self.drain.watch(self.lease.touch)
        bus.on_connection(self.outbox.wake)

    # -- what queries, the lease and /readyz show ----------------------------------------------

    @property
    def host_state(self) -> HostState:
        """`recovering`, `ready`; `draining`: by the operator, or the worker stops; `degraded`:
        ready, but for one of `trouble`."""
        if self._phase == "ready" and self.drain.active is not None:
            return "draining"
        return "degraded" if self._phase == "ready" and self.trouble() else self._phase

    def _state_changed(self) -> None:
        self.lease.touch()

    def trouble(self) -> list[str]:
        """What keeps a host that is ready from some commands; shown as `degraded_by`."""
        found = {
            "journal": not self.journal.store.writable,
            "disk_full": self._real.disk.low,
            "disk_watermark": self._real.disk.high,
            "hung_calls": bool(exhausted_kinds()),
            "vmm_versions": bool(self.vmm_versions.trouble),
            "launches": self.quarantine.active,
        }
        return [name for name, is_so in found.items() if is_so]

    @property
    def versions(self) -> Mapping[str, str]:
        """Of what this host runs; Firecracker's is that of new Starts."""
        return {
            "hostd": version("hostd"),
            "commit": this_build().commit,
            "python": platform.python_version(),
            "kernel": self._real.facts.kernel_release(),
            "firecracker": self._real.binaries.start,
        }

    def facts(self) -> dict[str, Any]:
        """Shown in a Pong and in the lease: state and capacity of this host."""
        return {
            "commit": this_build().commit,
            "boot_id": self._real.facts.boot_id(),
            "host_state": self.host_state,
            "degraded_by": self.trouble(),
            "limits_enforced": self.settings.limits.enforce,
            "capacity": capacity(self._real.host).facts(),
            "warm_vmms": self._real.warm.counts()["ready"],
            "vmm_versions": self.vmm_versions.facts(),
        }

    def _may_launch_ahead(self) -> bool:
        return self._phase == "ready" and not {"journal", "disk_full"} & {*self.trouble()}

    def checks(self) -> Mapping[str, bool]:
        """The worker is ready when all of these are true; `/readyz` shows them."""
        return {
            "recovered": self.host_state != "recovering",
            "connected": self.bus.connected,
            "can_commit": self.journal.store.writable,
            "has_disk_space": not self._real.disk.low,
            "below_disk_watermark": not self._real.disk.high,
            "launches_succeed": not self.quarantine.active,
            "has_descriptors": self._reserve.has_free(),
            "calls_return": not exhausted_kinds(),
            "has_vmm_versions": not self.vmm_versions.trouble,
            "provisioned": not self.bus.trouble,
            "leased": self.lease.held,
            "acks_move": not self.bus.ack_window.stuck,
            "not_draining": self.drain.active is None,
        }

    def routes(self) -> Sequence[Route]:
        """Those of the control socket: one line each, and one in docs/contract.md."""
        drain = DrainRoutes(self.drain, self.emptying, lift=self.quarantine.lift)
        return (
            Route("GET", "/v1/dump", self.dump.answer),
            Route("GET", "/v1/audit", AuditRoute(self.journal.audit).answer),
            Route("GET", "/v1/top", Overview(self).answer),
            Route("GET", "/v1/doctor", WorkerChecks(self).answer),
            Route("POST", "/v1/explain", ExplainRoute(self.explain.explain).answer),
            Route("GET", "/v1/drain", drain.state),
            Route("POST", "/v1/drain", drain.drain, writes=True),
            Route("POST", "/v1/undrain", drain.undrain, writes=True),
            *ClaimRoutes(self.claims, self.sweep, ready=self._is_ready).routes,
        )

    def _is_ready(self) -> bool:
        """Whether recovery is complete, and the worker does not stop."""
        return self._phase == "ready"

    def _collect(self) -> None:
        self.metrics.lanes(**self.lanes.counts())
        self.metrics.unfinished(self.journal.commands.count())
        outbox = self.journal.outbox
        self.metrics.outbox_rows(outbox.depth, held=outbox.held)
        self.metrics.bus_connected(self.bus.connected)
        self.metrics.bus_totals(
            reconnects=self.bus.reconnects,
            permission_errors=self.bus.permission_errors,
            pulls=self.bus.pulls,
            taken_msg_ids=self.bus.taken_msg_ids,
        )
        self.metrics.queries_dropped(self.service.dropped)
        self.metrics.artifact_copied_bytes(self._real.artifacts.copied_bytes)
        disk = self._real.disk
        self.metrics.disk(disk.free_bytes(), low=disk.low, high=disk.high)
        now = capacity(self._real.host)
        self.metrics.disk_claimed(now.disk_claimed_bytes)
        self.metrics.bounded(reading.of_worker(self._bounded, now))
        self.metrics.bounded(reading.of_threads(thread_counts()))
        self.metrics.bounded(reading.of_connections(self.connections))
        self.metrics.journal_bytes(reading.journal_bytes(self.journal.store.path))
        self.metrics.pending_commands(self.bus.ack_window.pending)
        self.metrics.slots_waiting(self.slots.counts())
        self.metrics.vmm_versions(self.vmm_versions.states())
        self.metrics.warm_vmms(self._real.warm.counts(), self._real.warm.totals)
        self.metrics.spans(self.exporter)
        self.metrics.log_dropped(logs.dropped())
        self.metrics.quarantined(self.journal.quarantine.counts())
        self.metrics.calls(hung_calls(), abandoned_calls())
        self.metrics.ready(self.checks())
        self.metrics.draining(self.drain.active is not None)
        self.metrics.limits_enforced(self.settings.limits.enforce)
        self.metrics.instances(self.journal.records.statuses())
        self.metrics.vmms.hung(self.overwatch.hung)
        self.metrics.vmms.quarantined(self.quarantine.active)

    # -- start and stop ------------------------------------------------------------------------

    async def run(self, signals: WorkerSignals, reload: Reload, manager: ServiceManager) -> None:
        """Run until SIGTERM or SIGINT, or until a part raises."""
        self.journal.quarantine.know(frozenset(self._mechanisms))
        with contextlib.suppress(Failure):  # cannot commit now: the next worker answers
            await self.journal.quarantine.answer(self.settings.nats.inbox_prefixes)
        # Unfinished commands are queued before the bus delivers new ones; the lanes start after
        # recovery (`_recover`).
        self.journal.commands.resume(self.lanes.put)
        await self.bus.start()
        await self.service.start()
        log.info("worker.started", host=self.settings.host.id, pid=os.getpid())
        manager.ready()
        watchdog = Watchdog(
            manager,
            {"journal": JournalPart(self.journal.store), "pull": PullPart(self.bus)},
            lambda: self.host_state,
        )
        sending = asyncio.create_task(self.outbox.run())
        working = [
            asyncio.create_task(work)
            for work in (
                self._receive(),
                self._recover(),
                sample_loop_lag(self.metrics),
                watchdog.run(),
                prune(self.journal),
                reload.run(signals.reload),
                self.dump.on_signal(signals.dump, self.settings.paths.run),
                watch_disk(self._real.disk, self.journal, self.lease.touch),
                self._real.warm.run(self._may_launch_ahead),
                self.vmm_versions.watch(),
            )
        ]
        stopping = asyncio.create_task(signals.stop.wait())
        try:
            done, _ = await asyncio.wait(
                [*working, sending, stopping], return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                await task
        finally:
            manager.stopping()
            await _cancel([stopping])
            await self._shut_down(working, sending)

    async def _receive(self) -> None:
        """Take commands and write state, once the cell is provisioned and the lease is ours."""
        await self.bus.wait_provisioned()
        await self.lease.acquire()
        with contextlib.suppress(Failure):  # cannot commit now: only later changes are written
            # The bucket may have been recreated while no worker ran; keys it has are not changed.
            await self.journal.outbox.rewrite_state()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.bus.consume(self.intake.receive))
            group.create_task(self.bus.watch_acks())
            group.create_task(self.lease.run())
            group.create_task(self.state.run())

    async def _recover(self) -> None:
        await self._real.host.networks.prepare()
        await self._real.warm.clear_leftovers()  # before a command can be given one of their uids
        await self.recovery.run()
        with contextlib.suppress(TimeoutError):
            # Two machines with this host id must not both run what is left in their journals.
            # Without a bus the lease cannot be read, and unfinished commands run all the same.
            async with asyncio.timeout(LEASE_PATIENCE_S):
                await self.lease.wait_held()
        self.lanes.start()
        self._phase = "ready"
        await self.vmm_versions.check()
        gc.collect()
        gc.freeze()  # modules and classes are not looked at again by later collections
        give_back_memory()
        self.lease.touch()
        log.info("worker.ready", host=self.settings.host.id)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.reconciler.run())
            group.create_task(self.emptying.run())
            group.create_task(self.overwatch.run())

    async def _shut_down(
        self, working: list[asyncio.Task[None]], sending: asyncio.Task[None]
    ) -> None:
        """Stop in this order, each part within its budget; what is unfinished is in the journal."""
        self._phase = "draining"
        # 1. No new messages: the stream keeps them.
        self.bus.pause()
        await _cancel(working)
        # 2. Commands, before what they use: each to its end or its next safe point.
        await self.lanes.stop(self.settings.limits.shutdown_s)
        await self._background.close()
        await self.sweep.close()
        # 3. Replies and events of these commands, while the bus is still connected.
        patience_s = OUTBOX_S if self.bus.connected else 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.outbox.drained()
        await _cancel([sending])
        # 4. The lease, so that the host id is free at once; queries until the end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.lease.release()
                await self.service.close()
        # 5. Health server, VMM watch, bus, host and journal: `_until_stopped` closes its stack.
        log.info("worker.stopped", host=self.settings.host.id)


async def versions_without_record(settings: Settings, known: Collection[InstanceRef]) -> set[str]:
    """The versions of Firecracker of what sleeps or runs here without being `known`, as after the
    journal was lost; "" is one that cannot be read."""
    launched = await run_in_thread(launched_versions, settings.jail_base, known)
    return launched | await published_versions(settings.paths.state, known)


async def prune(journal: Journal) -> None:
    """Delete finished commands and tombstones past their retention, a bounded number at a time,
    and read which IDs are left once that is worth it."""
    while True:
        try:
            await journal.commands.read_ids()
            if await journal.commands.prune() + await journal.records.prune_tombstones():
                continue
        except Exception as error:  # noqa: BLE001 - logged; the rest goes on
            log.warning("journal.prune_failed", error=repr(error))
        await asyncio.sleep(PRUNE_EVERY_S)


async def watch_disk(disk: DiskSpace, journal: Journal, changed: Callable[[], None]) -> None:
    """Release and make the ballast as the free space requires, compare with the watermarks;
    publish each change."""
    reported = (False, False)
    while True:
        with contextlib.suppress(Failure):  # file threads hang: `degraded` says so
            await run_in_thread(disk.check)
        now = low, high = disk.low, disk.high
        if now != reported:
            with contextlib.suppress(Failure):  # cannot commit yet: reported later
                await journal.records.event(
                    EventKind.DISK,
                    reason=disk_reason(low=low, high=high),
                    detail={
                        "low": low,
                        "above_watermark": high,
                        "free_bytes": disk.free_bytes(),
                        "used_percent": round(disk.used_percent(), 1),
                    },
                )
                reported = now
                changed()
        await asyncio.sleep(DISK_CHECK_S)


def disk_reason(*, low: bool, high: bool) -> str:
    """What an event `disk` says."""
    if low:
        return "the disk is full"
    return "the disk is above its high watermark" if high else "the disk has space again"


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
