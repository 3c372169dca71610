"""The worker of one host: its parts, the order they start in, and the order they stop in.

Start: lock, journal, host, bus; Ping is answered from then on. Then recovery, and only then the
lanes. Stop (SIGTERM): no more messages, then the lanes to their next safe point, then what the
outbox still has, then the lease, the bus, the journal. VMs run on throughout.
"""

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any

import structlog

from handlers.errors import Failure, of_os_error
from handlers.host.facts import HostFacts
from handlers.host.lock import HostLock
from handlers.host.vmm.versions import check_versions
from handlers.registry import HANDLERS, mechanisms
from schemas.codes import EXIT_CODES, Code
from schemas.settings import Settings
from schemas.subjects import Subjects
from worker.bus.nats import NatsBus
from worker.dispatch import Dispatch
from worker.failpoints import tracer
from worker.health import HealthServer
from worker.host_factory import RealHost, open_real_host, prepare_dirs
from worker.intake import Intake
from worker.journal.journal import Journal
from worker.lanes import Lanes, Work
from worker.lease import Holder, Lease, LeaseHeld
from worker.metrics import Metrics, sample_loop_lag
from worker.outbox import Outbox
from worker.queries.answers import Answers
from worker.queries.service import ask_service
from worker.reconcile.reconciler import Reconciler
from worker.reconcile.recovery import Recovery
from worker.reconcile.vmm_watch import VmmWatch
from worker.settings import machine_id
from worker.state_writer import StateWriter

OUTBOX_S = 5.0
LEASE_PATIENCE_S = 2.0
PRUNE_EVERY_S = 600.0

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code: 0, or that of why it could not go on."""
    try:
        asyncio.run(_until_stopped(settings))
    except Failure as failure:
        return _refused(failure.code, failure.message)
    except LeaseHeld as error:
        return _refused(Code.CONFLICT, str(error))
    except OSError as error:
        known = of_os_error(error)
        return _refused(known.code, known.message)
    return 0


def _refused(code: Code, reason: str) -> int:
    log.error("worker.refused", reason=reason, code=code.value)
    return EXIT_CODES[code]


async def _until_stopped(settings: Settings) -> None:
    prepare_dirs(settings)
    async with AsyncExitStack() as stack:
        stack.enter_context(HostLock(settings.paths.run))
        await check_versions(settings)
        metrics = Metrics(version("hostd"))
        subjects = Subjects(settings.root, settings.host.id, settings.host.cell)
        journal = await Journal.open(
            f"{settings.paths.state}/journal.db",
            subjects=subjects,
            boot_id=HostFacts().boot_id(),
            lane_depth=settings.limits.lane_depth,
            host_depth=settings.limits.host_depth,
            observe_commit=metrics.commit,
        )
        stack.push_async_callback(journal.close)
        background = Background()
        real = open_real_host(settings, journal, background.start)
        stack.callback(real.close)
        bus = NatsBus(settings.nats, subjects)
        stack.push_async_callback(bus.close)
        worker = Worker(settings, subjects, metrics, journal, real, bus, background)
        stack.push_async_callback(worker.supervisor.close)
        if settings.metrics.listen:
            await stack.enter_async_context(
                HealthServer(settings.metrics.listen, metrics, worker.checks)
            )
        await worker.run()


class Background:
    """Work that a handler starts for later; its trouble is logged and stops nothing."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        async def guarded() -> None:
            try:
                await work()
            except (Failure, OSError) as error:
                log.warning("background.failed", work=name, error=repr(error))

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await _end(list(self._tasks))


class NotifyingRunner:
    """A lane's runner that tells the supervisor when a command may have started or ended a VMM."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self.after: Callable[[], None] = lambda: None

    async def run(self, work: Work) -> None:
        try:
            await self._dispatch.run(work)
        finally:
            self.after()

    async def answer_superseded(self, work: Work) -> None:
        await self._dispatch.answer_superseded(work)


class Worker:
    """Holds the parts together; none of them knows it."""

    def __init__(
        self,
        settings: Settings,
        subjects: Subjects,
        metrics: Metrics,
        journal: Journal,
        real: RealHost,
        bus: NatsBus,
        background: Background,
    ) -> None:
        host = real.host
        known = mechanisms(host)
        self.settings, self.metrics, self.journal, self.bus = settings, metrics, journal, bus
        self._phase = "recovering"
        self._real = real
        self._background = background
        trace = tracer(os.environ)
        runner = NotifyingRunner(
            Dispatch(journal, HANDLERS, host, known, meters=metrics, trace=trace)
        )
        self.lanes = Lanes(runner)
        self.supervisor = VmmWatch(host, journal, self.lanes, metrics)
        runner.after = self.supervisor.sync
        self.intake = Intake(
            bus,
            journal,
            self.lanes,
            inbox_prefixes=settings.nats.inbox_prefixes,
            version=version("hostd"),
            facts=self.facts,
            meters=metrics,
        )
        self.outbox = Outbox(bus, journal)
        self.lease = Lease(
            bus,
            subjects.host_key,
            Holder(machine_id(), real.facts.boot_id(), journal.journal_id),
            lambda: {**self.facts(), "seq": journal.seq},
        )
        self.state = StateWriter(bus, journal, journal.journal_id, self.lease)
        self.service = ask_service(
            bus.link,
            subjects,
            Answers(journal, real.facts.boot_id(), lambda: self.host_state),
            version=version("hostd"),
            inbox_prefixes=settings.nats.inbox_prefixes,
        )
        self.caretaker = Reconciler(real, journal, self.lanes, known, metrics)
        self.recovery = Recovery(host, journal, self.supervisor)
        metrics.on_collect(self._collect)
        bus.on_connection(self._connection_changed)
        self._reconnects = 0

    # -- what others may know ------------------------------------------------------------------

    @property
    def host_state(self) -> str:
        """`recovering`, `ready`, `draining`; `degraded`: ready, but the journal cannot commit."""
        if self._phase == "ready" and not self.journal.writable:
            return "degraded"
        return self._phase

    def facts(self) -> dict[str, Any]:
        """For Pong and the lease."""
        live = [record for record in self.journal.instances() if record.holds_host]
        limits = self.settings.limits
        total_mib = self._real.facts.memory_mib() - limits.mem_reserve_mib
        used_mib = sum(record.mem_mib + limits.vmm_overhead_mib for record in live)
        return {
            "boot_id": self._real.facts.boot_id(),
            "host_state": self.host_state,
            "limits_enforced": limits.enforce,
            "capacity": {
                "instances": len(live),
                "vcpus_used": sum(record.vcpus for record in live),
                "mem_mib": total_mib,
                "mem_free_mib": max(0, total_mib - used_mib),
            },
        }

    def checks(self) -> Mapping[str, bool]:
        """What `/readyz` wants true."""
        return {
            "recovered": self.host_state != "recovering",
            "connected": self.bus.connected,
            "can_commit": self.journal.writable,
            "provisioned": not self.bus.trouble,
        }

    def _connection_changed(self) -> None:
        self.outbox.wake()
        while self._reconnects < self.bus.reconnects:
            self._reconnects += 1
            self.metrics.reconnected()

    def _collect(self) -> None:
        self.metrics.lanes(**self.lanes.counts())
        self.metrics.unfinished(len(self.journal.unfinished()))
        self.metrics.outbox_rows(self.journal.depth)
        self.metrics.bus_connected(self.bus.connected)
        self.metrics.limits_enforced(self.settings.limits.enforce)
        self.metrics.instances(Counter(record.status for record in self.journal.instances()))

    # -- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, or until a part fails for good."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        # Queued before the bus brings new ones; nothing runs before recovery is through.
        for row in self.journal.unfinished():
            self.lanes.put(row)
        await self.bus.start()
        await self.service.start()
        log.info("worker.started", host=self.settings.host.id, pid=os.getpid())
        sending = asyncio.create_task(self.outbox.run())
        working = [
            asyncio.create_task(work)
            for work in (
                self._receive(),
                self._recover(),
                sample_loop_lag(self.metrics),
                prune(self.journal),
            )
        ]
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait(
                [*working, sending, stopping], return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                await task
        finally:
            await _end([stopping])
            await self._shut_down(working, sending)

    async def _receive(self) -> None:
        """Commands in, state out, once the cell is provisioned and the host id is ours."""
        await self.bus.wait_provisioned()
        await self.lease.acquire()
        with contextlib.suppress(Failure):  # it cannot commit now; then what changes is written
            # The bucket may have been made anew while no worker ran; what it has is left.
            await self.journal.rewrite_state()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.bus.consume(self.intake.receive))
            group.create_task(self.lease.run())
            group.create_task(self.state.run())

    async def _recover(self) -> None:
        await self._real.host.networks.prepare()
        await self.recovery.run()
        with contextlib.suppress(TimeoutError):
            # Another machine with this host id must not run what is left in its journal. Without
            # a bus there is nobody to ask, and what was begun is ended all the same.
            async with asyncio.timeout(LEASE_PATIENCE_S):
                await self.lease.wait_held()
        self.lanes.start()
        self._phase = "ready"
        self.lease.touch()
        log.info("worker.ready", host=self.settings.host.id)
        await self.caretaker.run()

    async def _shut_down(
        self, working: list[asyncio.Task[None]], sending: asyncio.Task[None]
    ) -> None:
        """In order, each within its part of the budget; what is not done waits in the journal."""
        self._phase = "draining"
        self.bus.pause()
        await _end(working)
        await self.lanes.stop(self.settings.limits.shutdown_s)
        await self._background.close()
        patience_s = OUTBOX_S if self.bus.connected else 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.outbox.drained()
        await _end([sending])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.lease.release()
                await self.service.close()
        log.info("worker.stopped", host=self.settings.host.id)


async def prune(journal: Journal) -> None:
    """Forget finished commands past their retention, a bounded number at a time."""
    while True:
        with contextlib.suppress(Failure):
            if await journal.prune():
                continue
        await asyncio.sleep(PRUNE_EVERY_S)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
