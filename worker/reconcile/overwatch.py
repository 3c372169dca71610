"""Overwatch: asks each running VMM now and then whether it answers, and announces one that hangs.

A probe is one `GET /` on the VMM's API. Firecracker serves one request at a time, so a probe is
made only while nothing of hostd's own runs or waits in the instance's lane, and work that arrives
there ends it at once: it delays no command, and never waits behind a long one. What counts as a
miss is only that no answer came in time; an exit is the VMM watch's to see, a missing socket the
periodic check's. By policy a VMM that hangs is killed; its exit is then handled like any other.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

import structlog
from msgspec.structs import replace

from handlers.errors import Unavailable
from handlers.instance.running_check import is_running
from handlers.interfaces import Host
from schemas.envelopes import EventKind
from schemas.records import Hung, InstanceRecord
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask
from worker.logs import facts_of

DEADLINE_S: Final = 5.0
LATE_S: Final = 1.0
MISSES: Final = 3
AT_ONCE: Final = 16
WAKEUPS: Final = 30

log = structlog.get_logger()


class ProbeMeters(Protocol):
    """What is counted (`worker/meters/vmms.py`)."""

    def probed(self, result: str) -> None:
        """`answered`, `missed`, `failed` (no verdict), `yielded` to a command, `busy`: not made."""
        ...


class Overwatch:
    """Call `yield_to` when work arrives in a lane.

    Args:
        clock, sleep: seconds; tests pass their own.
    """

    def __init__(
        self,
        host: Host,
        journal: Journal,
        lanes: Lanes,
        meters: ProbeMeters,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._meters = meters
        self._clock = clock
        self._sleep = sleep
        self._interval_s = host.settings.vmm.probe_interval_s
        self._deadline_s = min(DEADLINE_S, self._interval_s)
        self._kills = host.settings.vmm.on_hang == "kill"
        self._places = asyncio.Semaphore(AT_ONCE)
        self._probing: dict[Lane, asyncio.Task[None]] = {}
        self._misses: dict[str, int] = {}
        self._hung: set[str] = set()

    @property
    def hung(self) -> int:
        """How many VMMs are known to hang; one that ended counts until the next round."""
        return len(self._hung)

    def yield_to(self, lane: Lane) -> None:
        """Work has arrived in a lane: its probe ends now, without a verdict."""
        if (probe := self._probing.pop(lane, None)) is not None:
            self._meters.probed("yielded")
            probe.cancel()

    async def run(self) -> None:
        """Until cancelled; returns at once if `[vmm] probe_interval_s` is 0."""
        while self._interval_s:
            await self.once()

    async def once(self) -> None:
        """One probe of each VMM that runs now, spread over the interval."""
        began = self._clock()
        records = [each for each in self._journal.records.instances() if is_running(each)]
        jails = {record.jail_id for record in records}
        self._misses = {jail: count for jail, count in self._misses.items() if jail in jails}
        self._hung = {record.jail_id for record in records if record.hung is not None}
        together = min(AT_ONCE, -(-len(records) // WAKEUPS))
        async with asyncio.TaskGroup() as probes:
            for number, record in enumerate(records):
                if number % together == 0:  # a wakeup costs as much as several probes
                    due = began + self._interval_s * number / len(records)
                    await self._sleep(max(0.0, due - self._clock()))
                await self._places.acquire()
                lane = Lane.instance(record.ref)
                if not self._lanes.is_idle(lane):
                    self._meters.probed("busy")
                    self._places.release()
                    continue
                self._probing[lane] = task = probes.create_task(self._probe(record, lane))
                task.add_done_callback(lambda _: self._places.release())
            await self._sleep(max(0.0, began + self._interval_s - self._clock()))

    # -- one probe -----------------------------------------------------------------------------

    async def _probe(self, record: InstanceRecord, lane: Lane) -> None:
        if self._current(record) is None:
            result, why = "failed", "it does not run any more"
        else:
            result, why = await self._ask(record.jail_id)
        self._probing.pop(lane, None)  # what follows is work in the lane
        self._meters.probed(result)
        self._judge(record, result, why)

    async def _ask(self, jail_id: str) -> tuple[str, str]:
        """The result, and why it is no answer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        vmm = self._host.vmms.api(jail_id)
        try:
            async with asyncio.timeout(self._deadline_s):
                await vmm.state()
            return "answered", ""
        except TimeoutError:
            if loop.time() - began > self._deadline_s + LATE_S:
                return "failed", "the worker itself was late"
            return "missed", f"no answer within {self._deadline_s:g} s"
        except Unavailable as failure:
            if isinstance(failure.__cause__, FileNotFoundError):
                return "failed", failure.message
            return "missed", failure.message
        except Exception as error:  # noqa: BLE001 - logged; the rest goes on
            log.warning("vmm.probe_failed", jail=jail_id, **facts_of(error))
            return "failed", str(error)
        finally:
            await vmm.close()

    def _judge(self, record: InstanceRecord, result: str, why: str) -> None:
        """Only consecutive misses count; what gave no verdict changes nothing."""
        jail_id, now = record.jail_id, self._current(record)
        if now is None or result == "failed":
            return
        if result == "answered":
            self._misses.pop(jail_id, None)
            if now.hung is not None:
                self._in_lane(record, "vmm_answers", partial(self._answers, record))
            return
        misses = self._misses[jail_id] = self._misses.get(jail_id, 0) + 1
        if misses >= MISSES and (now.hung is None or self._kills):
            self._in_lane(record, "vmm_hung", partial(self._hangs, record, misses, why))

    def _current(self, record: InstanceRecord) -> InstanceRecord | None:
        """The record as it is now, if that launch still is the one that runs."""
        now = self._journal.records.instance(record.ref)
        return now if now is not None and now.launch == record.launch and is_running(now) else None

    # -- what follows, in the instance's lane ---------------------------------------------------

    def _in_lane(
        self, record: InstanceRecord, name: str, run: Callable[[], Awaitable[None]]
    ) -> None:
        async def guarded() -> None:
            try:
                await run()
            except Exception as error:  # noqa: BLE001 - logged; the next probe tries again
                log.warning("vmm.overwatch_failed", instance=str(record.ref), **facts_of(error))

        self._lanes.put_maintenance(Lane.instance(record.ref), MaintenanceTask(name, guarded))

    async def _answers(self, record: InstanceRecord) -> None:
        now = self._current(record)
        if now is None or now.hung is None:
            return
        await self._put(replace(now, hung=None), "answers its API again", hung=False)
        self._hung.discard(now.jail_id)
        log.info("vmm.answers", instance=str(now.ref), launch=now.launch)

    async def _hangs(self, record: InstanceRecord, misses: int, why: str) -> None:
        now = self._current(record)
        if now is None or self._misses.get(record.jail_id, 0) < MISSES:
            return
        if now.hung is None:
            now = replace(now, hung=Hung(since_ms=self._host.facts.now_ms()))
            await self._put(now, why, hung=True, misses=misses)
            self._hung.add(now.jail_id)
            log.warning("vmm.hung", instance=str(now.ref), launch=now.launch, reason=why)
        if self._kills and now.hung is not None:
            # Before the kill: whoever sees the exit, also the next worker, knows why.
            killed = replace(now, hung=replace(now.hung, killed=True))
            await self._journal.records.put_instance(killed, durable=True)
            log.warning("vmm.hung_killed", instance=str(now.ref), launch=now.launch)
            await self._host.vmms.remove(now.jail_id)

    async def _put(
        self, record: InstanceRecord, reason: str, *, hung: bool, **detail: object
    ) -> None:
        """The record and the event of it, in one commit."""
        await self._journal.records.put_with_event(
            record,
            EventKind.VMM_HUNG,
            actor=None,
            reason=reason,
            detail={
                "hung": hung,
                "launch": record.launch,
                "pid": record.vmm.pid if record.vmm is not None else None,
                **detail,
            },
        )
