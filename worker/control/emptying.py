"""Puts every running instance of a draining host to sleep, or stops it, at a bounded rate.

By commands of hostd's own through the ordinary lanes: journal, events, superseding and recovery are
those of every command. Their IDs are made of the drain's ID and the instance, so each instance gets
one command per drain, however often the worker is restarted.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import structlog

from schemas import codec
from schemas.envelopes import Command, EventKind
from schemas.records import InstanceRecord, Status
from schemas.requests import (
    DestroyInstance,
    Error,
    InstanceRef,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from schemas.subjects import Lane
from worker.control.draining import Drain, DrainSwitch
from worker.journal.admission import Verdict
from worker.journal.journal import Journal
from worker.journal.writer import JournalFault
from worker.lanes import Lanes, Work

PARALLEL: Final = 8  # commands of a drain at once; slots bound the heavy part of each further
EVENT_EVERY_S: Final = 10.0
FULL_AGAIN_S: Final = 1.0
ISSUER: Final = "hostd-drain"
SLEPT: Final = (Status.RUNNING,)
STOPPED: Final = (Status.RUNNING, Status.STARTING, Status.WAKING, Status.DRAINING)

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Failed:
    """A command of the drain that did not do its work; the instance runs on."""

    command_id: str
    code: str
    message: str


@dataclass(slots=True)
class Progress:
    """Of the drain in effect: what it sent, and what failed."""

    sent: dict[InstanceRef, str] = field(default_factory=dict[InstanceRef, str])
    done: int = 0
    failed: dict[InstanceRef, Failed] = field(default_factory=dict[InstanceRef, Failed])


class Emptying:
    """Runs as long as the worker; idle unless the drain in effect has a mode that needs it."""

    def __init__(self, switch: DrainSwitch, journal: Journal, lanes: Lanes) -> None:
        self._switch, self._journal, self._lanes = switch, journal, lanes
        self._drain: Drain | None = None
        self._progress = Progress()
        self._news = asyncio.Event()
        self._looked = asyncio.Condition()
        self._looks = 0
        self._full = False
        switch.watch(self._news.set)
        journal.store.on_commit(lambda _: self._committed())

    async def run(self) -> None:
        """Until cancelled; begin when the lanes run."""
        loop = asyncio.get_running_loop()
        reported_at, reported = loop.time(), ""
        while True:
            self._news.clear()
            try:
                await self._look()
                counts = self.counts()
                text = str(counts)
                due = self.ended or loop.time() - reported_at >= EVENT_EVERY_S
                if self._drain is not None and text != reported and due:
                    reported_at, reported = loop.time(), text
                    await self._report(self._drain, counts)
            except JournalFault:
                await self._journal.store.until_writable()
                continue
            except Exception:
                log.exception("drain.crashed")
            async with self._looked:
                self._looks += 1
                self._looked.notify_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FULL_AGAIN_S if self._full else EVENT_EVERY_S):
                    await self._news.wait()

    def _committed(self) -> None:
        """Costs nothing without a drain: this is part of every command."""
        if self._switch.active is not None:
            self._news.set()

    # -- what is shown -------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Nothing is left that the drain in effect could still do anything about."""
        if self._drain is None or self._drain != self._switch.active:
            return False  # the first look at this drain is still to come
        counts = self.counts()
        return counts["in_use"] <= counts["failed"] + counts["unknown"]

    def counts(self) -> dict[str, int]:
        """`in_use`: instances that have, may have, or are about to have a VMM; of them the drain's,
        by outcome. `unknown`: those that did not fail.
        """
        statuses, failed = self._journal.records.statuses(), self._progress.failed
        in_use = sum(count for status, count in statuses.items() if status.holds_tap)
        return {
            "in_use": in_use + len(self._about_to_start()),
            "in_progress": len(self._progress.sent),
            "done": self._progress.done,
            "failed": len(failed),
            "unknown": statuses.get(Status.UNKNOWN, 0) - self._count(failed, (Status.UNKNOWN,)),
        }

    def _count(self, refs: Iterable[InstanceRef], statuses: Container[Status]) -> int:
        """How many of the instances have one of the statuses now."""
        records = map(self._journal.records.instance, refs)
        return sum(record is not None and record.status in statuses for record in records)

    def _about_to_start(self) -> dict[InstanceRef, Status]:
        """Instances whose Start or Wake has begun, and is completed, but has no reservation yet."""
        return {
            row.lane.ref: Status.STARTING if isinstance(request, StartInstance) else Status.WAKING
            for row in self._journal.commands.unfinished()
            if row.attempts
            and isinstance(request := row.command.request, StartInstance | WakeInstance)
            and row.lane.ref is not None
            and not self._in_use(row.lane.ref)
        }

    def left(self, limit: int) -> list[dict[str, object]]:
        """The instances that are still in use, with why, as far as the drain knows."""
        found: list[dict[str, object]] = []
        in_use = {
            record.ref: record.status
            for record in self._journal.records.instances()
            if record.status.holds_tap
        }
        for ref, status in islice((in_use | self._about_to_start()).items(), limit):
            facts: dict[str, object] = {
                "tenant_id": ref.tenant_id,
                "pool_id": ref.pool_id,
                "instance_id": ref.instance_id,
                "status": str(status),
            }
            if failed := self._progress.failed.get(ref):
                facts |= {
                    "command_id": failed.command_id,
                    "code": failed.code,
                    "message": failed.message,
                }
            found.append(facts)
        return found

    @property
    def looks(self) -> int:
        """How often this has looked at the host."""
        return self._looks

    async def wait_look(self, seen: int, timeout_s: float) -> None:
        """Return when `looks` is not `seen` any more, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._looked:
                await self._looked.wait_for(lambda: self._looks != seen)

    # -- what is done --------------------------------------------------------------------------

    async def _look(self) -> None:
        drain = self._switch.active
        if drain != self._drain:
            self._drain, self._progress = drain, Progress()
        self._full = False
        if drain is None or drain.mode == "wait":
            return
        await self._settle()
        wanted = STOPPED if drain.mode == "stop" else SLEPT
        statuses = self._journal.records.statuses()
        known = self._count([*self._progress.sent, *self._progress.failed], wanted)
        if sum(statuses.get(status, 0) for status in wanted) <= known:
            return
        for record in self._journal.records.instances():
            if len(self._progress.sent) >= PARALLEL or self._full:
                return
            if record.status in wanted and self._may_send(record, drain):
                await self._send(record.ref, drain)

    async def _settle(self) -> None:
        """Take the outcome of each command that ended."""
        for ref, command_id in tuple(self._progress.sent.items()):
            if self._journal.commands.is_unfinished(command_id):
                continue
            del self._progress.sent[ref]
            await self._take_outcome(ref, command_id)
        for ref in [ref for ref in self._progress.failed if not self._in_use(ref)]:
            del self._progress.failed[ref]
            self._progress.done += 1

    def _in_use(self, ref: InstanceRef) -> bool:
        record = self._journal.records.instance(ref)
        return record is not None and record.status.holds_tap

    async def _take_outcome(self, ref: InstanceRef, command_id: str) -> None:
        found = await self._journal.commands.result(command_id)
        if not self._in_use(ref):
            self._progress.done += 1
            return
        if found is None or found.reply is None:
            return  # its admission failed: it is sent again
        reply = codec.decode_reply(found.reply)
        response = reply.response
        message = response.message if isinstance(response, Error) else "runs again"
        self._progress.failed[ref] = Failed(command_id, reply.code.value, message)
        log.warning("drain.instance_failed", command_id=command_id, code=reply.code.value)

    def _may_send(self, record: InstanceRecord, drain: Drain) -> bool:
        """Not twice, and not where another command ends the VM, or changes it anyway."""
        ref = record.ref
        if ref in self._progress.sent or ref in self._progress.failed:
            return False
        running, waiting = self._lanes.work().get(Lane.instance(ref), (None, ()))
        requests = [
            work.row.command.request for work in (running, *waiting) if isinstance(work, Work)
        ]
        if drain.mode == "sleep":
            return not requests
        return not any(isinstance(each, StopInstance | DestroyInstance) for each in requests)

    async def _send(self, ref: InstanceRef, drain: Drain) -> None:
        lane = Lane.instance(ref)
        names = (ref.tenant_id, ref.pool_id, ref.instance_id)
        request = (
            StopInstance(*names) if drain.mode == "stop" else SleepInstance(*names, force=False)
        )
        now_ms = self._journal.store.now_ms()
        command = Command(
            id=command_id_of(drain, ref), request=request, issued_at_ms=now_ms, issuer=ISSUER
        )
        decision = await self._journal.commands.take_in(
            command,
            lane=lane,
            subject=self._journal.store.subjects.command(lane),
            stream_seq=0,
            received_at_ms=now_ms,
        )
        match decision.verdict:
            case Verdict.LANE_FULL | Verdict.TENANT_FULL | Verdict.HOST_FULL:
                self._full = True
            case Verdict.REPLAY:  # it ended, in an earlier worker
                await self._take_outcome(ref, command.id)
            case _:
                self._progress.sent[ref] = command.id
                if decision.row is not None:
                    self._lanes.put(decision.row)
                    await decision.row.stored()

    async def _report(self, drain: Drain, counts: dict[str, int]) -> None:
        ended = self.ended
        if ended:
            log.info("drain.finished", drain=drain.id, **counts)
        await self._journal.records.event(
            EventKind.DRAIN,
            reason="the drain has done what it can" if ended else "the drain goes on",
            detail={"active": True, "mode": drain.mode, "drain": drain.id, **counts},
        )


def command_id_of(drain: Drain, ref: InstanceRef) -> str:
    """The ID of the drain's command for an instance."""
    return f"drain-{drain.id}-{hashlib.sha256(str(ref).encode()).hexdigest()[:24]}"
