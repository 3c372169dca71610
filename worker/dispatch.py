"""One run of one command: handler, attempts, undo, outcome. Here alone an error becomes a reply."""

import time
from collections.abc import Callable, Container, Mapping
from typing import Any, Final, Protocol

import structlog
import tenacity
from structlog.contextvars import bind_contextvars

from handlers.errors import (
    Draining,
    Exhausted,
    Expired,
    Failure,
    HostFault,
    Superseded,
    Unavailable,
    of_os_error,
)
from handlers.interfaces import Host
from handlers.mechanism import Removable
from handlers.registry import Handler
from handlers.steps import Done, Failpoint, Halted, Steps, no_failpoint
from schemas import serde
from schemas.codes import Code
from schemas.envelopes import Reply, StepTaken
from schemas.requests import (
    Error,
    Ok,
    Ping,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    TeardownNetwork,
    WakeInstance,
)
from worker.journal.journal import Journal
from worker.journal.memory import CommandRow
from worker.journal.store import now_ms
from worker.journal.writer import JournalFault
from worker.lanes import Work

BACKOFF_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
STEPS_SHOWN: Final = 100
SNAPSHOT_STEPS: Final = frozenset({"pause", "snapshot_draft", "publish"})

log = structlog.get_logger()


class CommandMeters(Protocol):
    """What dispatch counts (`worker/metrics.py`)."""

    def command_done(self, kind: str, code: Code, seconds: float) -> None: ...

    def step(self, name: str, seconds: float) -> None: ...

    def retry(self, kind: str, code: Code) -> None: ...

    def snapshot(self, seconds: float, size_bytes: int) -> None: ...


class Dispatch:
    """Runs commands with their handlers; the lanes say which and when.

    Args:
        mechanisms: by name, all that a step row may name: what undo removes with.
        draining: whether the host takes no new VMs.
    """

    def __init__(
        self,
        journal: Journal,
        handlers: Mapping[type, Handler],
        host: Host,
        mechanisms: Mapping[str, Removable],
        *,
        meters: CommandMeters,
        draining: Callable[[], bool] = lambda: False,
        failpoint: Failpoint = no_failpoint,
    ) -> None:
        self._journal = journal
        self._handlers = handlers
        self._host = host
        self._mechanisms = mechanisms
        self._meters = meters
        self._draining = draining
        self._failpoint = failpoint
        self._budget_s = host.settings.limits.retry_budget_s

    async def run(self, work: Work) -> None:
        """Run to the outcome, journal it. A shutdown leaves the command unfinished instead."""
        row = work.row
        if row.withdrawn:
            return
        # no unbinding: each lane's task, and each answer's, has a context of its own
        bind_contextvars(command_id=row.id, lane=str(row.lane), attempt=row.attempts)
        refusal = self._refusal(work)
        if refusal is not None:
            await self._finish(row, self._failed(row, refusal, ()))
            return
        steps = Steps(
            row.id,
            self._journal,
            self._mechanisms,
            deadline_ms=row.command.deadline_ms,
            admission=row.admission,
            failpoint=self._failpoint,
            observe=self._meters.step,
        )
        work.began(steps)
        try:
            reply, done = await self._outcome(row, steps)
            await self._finish(row, reply, done)
        except Halted:
            log.info("command.halted", attempts=row.attempts)
        finally:
            work.steps = None

    async def answer_superseded(self, work: Work) -> None:
        """The final answer of a command that never ran."""
        bind_contextvars(command_id=work.row.id, lane=str(work.row.lane), attempt=0)
        await self._finish(work.row, self._failed(work.row, _superseded(work), ()))

    # -- one run -------------------------------------------------------------------------------

    def _refusal(self, work: Work) -> Failure | None:
        """Why a command is not even begun; one that an earlier worker began always goes on."""
        row = work.row
        if row.attempts:
            return None
        if work.superseded_by is not None:
            return _superseded(work)
        deadline_ms = row.command.deadline_ms
        if deadline_ms is not None and deadline_ms <= now_ms():
            return Expired("the deadline passed before the command was started")
        if isinstance(row.command.request, StartInstance | WakeInstance) and self._draining():
            return Draining("this host is being drained and takes no new VMs")
        return None

    async def _outcome(self, row: CommandRow, steps: Steps) -> tuple[Reply, Done | None]:
        try:
            done = await self._attempts(row, steps)
        except Failure as failure:
            return await self._undone(row, steps, failure), None
        except OSError as error:
            return await self._undone(row, steps, of_os_error(error)), None
        except Halted:
            raise
        except Exception:
            log.exception("command.crashed", type=row.command.request.kind)
            return await self._undone(row, steps, None), None
        reply = self._reply(
            row,
            steps.taken,
            response=Ok(),
            code=Code.OK,
            changed=done.changed,
            status=done.status,
            left_behind=done.left_behind,
            detail=dict(done.detail),
        )
        return reply, done

    async def _attempts(self, row: CommandRow, steps: Steps) -> Done:
        """Try until it succeeds, fails for good, or deadline or budget are used up."""
        began = time.monotonic()
        try:
            return await self._attempt(row, steps)
        except (Failure, OSError) as error:
            if not _may_retry(error, steps):
                raise
            made: list[Failure | OSError] = [error]
        budget_s, left_s = self._budget_s, steps.left_s()
        if not steps.final:
            # The first attempt counts: one that took its whole time to fail is not tried again.
            budget_s -= time.monotonic() - began
        if left_s is not None:
            budget_s = min(budget_s, left_s)
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: _may_retry(error, steps)),
            wait=tenacity.wait_random_exponential(BACKOFF_S, BACKOFF_MAX_S),
            stop=tenacity.stop_before_delay(max(budget_s, 0.0)),
            sleep=lambda seconds: self._pause(steps, seconds),
            before_sleep=lambda state: self._note_retry(row, state),
            reraise=True,
        ):
            with attempt:
                if made:  # the one above counts as the first
                    raise made.pop()
                return await self._attempt(row, steps)
        raise AssertionError("tenacity ends with a result or an error")

    async def _attempt(self, row: CommandRow, steps: Steps) -> Done:
        if row.withdrawn:
            raise Halted  # its message is still in the stream, and comes again
        bind_contextvars(attempt=self._journal.begin_attempt(row.id))
        request = row.command.request
        return await self._handlers[type(request)](request, steps, self._host)

    def _note_retry(self, row: CommandRow, state: tenacity.RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        failure = of_os_error(error) if isinstance(error, OSError) else error
        if isinstance(failure, Failure):
            self._meters.retry(row.command.request.kind, failure.code)
            log.info("command.retried", code=failure.code.value, reason=failure.message)

    async def _pause(self, steps: Steps, seconds: float) -> None:
        """Wait before the next attempt; a superseding command or the shutdown ends it at once."""
        await self._journal.until_writable()
        await steps.pause(seconds)

    async def _undone(self, row: CommandRow, steps: Steps, failure: Failure | None) -> Reply:
        """Take back what the command made, unless there is no way back, and say how it failed."""
        left: tuple[str, ...] = failure.left_behind if failure is not None else ()
        if not steps.final:
            left += await self._undo(steps)
        return self._failed(row, failure, steps.taken, left)

    async def _undo(self, steps: Steps) -> tuple[str, ...]:
        while True:
            try:
                return await steps.undo()
            except JournalFault:
                await self._journal.until_writable()
            except Exception:
                log.exception("command.crashed", doing="undo")
                rows = self._journal.rows(steps.command_id)
                return tuple(f"{row.mechanism} {row.key}" for row in rows if not row.existed)

    # -- the outcome ---------------------------------------------------------------------------

    async def _finish(self, row: CommandRow, reply: Reply, done: Done | None = None) -> None:
        record = done.record if done is not None else None
        tombstone = done.tombstone if done is not None else None
        while True:
            try:
                await self._journal.finish(reply, record=record, tombstone=tombstone)
                break
            except JournalFault:
                if row.withdrawn:
                    return
                await self._journal.until_writable()
            except (TypeError, ValueError, OverflowError):
                if reply.code is Code.INTERNAL:
                    raise
                log.exception("command.crashed", type=row.command.request.kind)  # no msgpack of it
                reply = self._failed(row, None, ())
        if row.withdrawn:
            return
        seconds = (reply.finished_at_ms - reply.received_at_ms) / 1000
        kind = row.command.request.kind
        self._meters.command_done(kind, reply.code, seconds)
        if isinstance(row.command.request, SleepInstance) and reply.changed:
            self._meters.snapshot(_seconds(reply, SNAPSHOT_STEPS), reply.detail["size_bytes"])
        log.info(
            "command.done",
            type=kind,
            code=reply.code.value,
            changed=reply.changed,
            attempts=reply.attempts,
            took_ms=reply.finished_at_ms - reply.received_at_ms,
            left_behind=list(reply.left_behind),
        )

    def _failed(
        self,
        row: CommandRow,
        failure: Failure | None,
        taken: list[StepTaken] | tuple[()],
        left: tuple[str, ...] = (),
    ) -> Reply:
        """The reply of a failure; None stands for a bug, whose facts are in the log only."""
        if failure is None:
            return self._reply(
                row,
                taken,
                response=Error("internal error, see the host's log"),
                code=Code.INTERNAL,
                status=self._status(row),
                left_behind=left,
                detail={"act": "operator"},
            )
        detail = {**failure.detail, "act": failure.act}
        if failure.path is not None:
            detail["path"] = failure.path
        return self._reply(
            row,
            taken,
            response=Error(failure.message),
            code=failure.code,
            retryable=failure.retryable,
            status=self._status(row) or detail.get("status"),
            left_behind=left,
            supported=serde.SUPPORTED if failure.code is Code.UNSUPPORTED else (),
            detail=detail,
        )

    def _reply(self, row: CommandRow, taken: list[StepTaken] | tuple[()], **facts: Any) -> Reply:
        return Reply(
            id=row.id,
            host_id=self._journal.source.subjects.host_id,
            attempts=row.attempts,
            received_at_ms=row.received_at_ms,
            finished_at_ms=now_ms(),
            steps=tuple(taken[-STEPS_SHOWN:]),
            **facts,
        )

    def _status(self, row: CommandRow) -> str | None:
        """The instance's status now, if the command is about one and the journal knows it."""
        request = row.command.request
        if isinstance(request, Ping | SetupNetwork | TeardownNetwork):
            return None
        instance = self._journal.instance(request.ref)
        return None if instance is None else instance.status.value


def _may_retry(error: BaseException, steps: Steps) -> bool:
    failure = of_os_error(error) if isinstance(error, OSError) else error
    if not isinstance(failure, Failure) or failure.final:
        return False
    if isinstance(failure, Unavailable | JournalFault):
        return True
    # past a point of no return there is only completion
    return steps.final and isinstance(failure, HostFault | Exhausted)


def _superseded(work: Work) -> Superseded:
    by = work.superseded_by or ""
    return Superseded(f"superseded by {by}", detail={"by": by})


def _seconds(reply: Reply, names: Container[str]) -> float:
    """How long the steps of these names took."""
    return sum(step.took_us for step in reply.steps if step.name in names) / 1e6
