"""One run of one command: handler, attempts, undo, outcome. Only here an error becomes a reply."""

import time
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Final, Protocol

import structlog
import tenacity
from structlog.contextvars import bind_contextvars

from handlers.clock import now_ms
from handlers.control import Control, Halted
from handlers.errors import (
    Conflict,
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
from handlers.steps import Done, Failpoint, Steps, no_failpoint
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Reply, StepTaken
from schemas.requests import (
    Error,
    Ok,
    Ping,
    Request,
    SetupNetwork,
    StartInstance,
    TeardownNetwork,
    WakeInstance,
)
from schemas.subjects import Lane
from schemas.trace_context import fields_of, log_fields
from worker.journal.journal import Journal
from worker.journal.memory import CommandRow
from worker.journal.writer import JournalFault
from worker.lanes import Work
from worker.tracing.tracing import Tracing

BACKOFF_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
STEPS_SHOWN: Final = 100
SLOW_LAUNCH_S: Final = 5.0  # from receipt to outcome

log = structlog.get_logger()


class CommandMeters(Protocol):
    """What dispatch counts (`worker/metrics.py`)."""

    def command_done(self, kind: str, code: Code, seconds: float) -> None: ...

    def step(self, name: str, seconds: float) -> None: ...

    def retry(self, kind: str, code: Code) -> None: ...

    def snapshot(self, seconds: float, size_bytes: int) -> None: ...


class LaunchGate(Protocol):
    """Whether this host launches anything (`worker/reconcile/launch_quarantine.py`)."""

    def refusal(self, row: CommandRow) -> Failure | None:
        """Why a command is not begun."""
        ...

    def would_refuse(self, request: Request) -> Failure | None:
        """As `refusal` of a command that would come now. No effect."""
        ...

    async def finished(self, row: CommandRow, reply: Reply) -> None:
        """A command that ran has its outcome."""
        ...


class OpenGate:
    """Nothing is refused."""

    def refusal(self, row: CommandRow) -> Failure | None:  # noqa: ARG002
        return None

    def would_refuse(self, request: Request) -> Failure | None:  # noqa: ARG002
        return None

    async def finished(self, row: CommandRow, reply: Reply) -> None:
        pass


class Dispatch:
    """Runs commands with their handlers; the lanes decide which and when.

    Args:
        mechanisms: by name, all that a step row may name; undo removes with them.
        refuse: why a command that has not begun is not run, e.g. because the host drains.
        tracing: makes the spans of what runs.
        gate: asked before a command is begun, and told each outcome.
        clock_ms, monotonic_s: the clocks; tests pass their own.
    """

    def __init__(
        self,
        journal: Journal,
        handlers: Mapping[type, Handler],
        host: Host,
        mechanisms: Mapping[str, Removable],
        *,
        meters: CommandMeters,
        refuse: Callable[[Request], Failure | None] = lambda request: None,
        gate: LaunchGate = OpenGate(),  # noqa: B008 (without state)
        tracing: Tracing | None = None,
        failpoint: Failpoint = no_failpoint,
        clock_ms: Callable[[], int] = now_ms,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._handlers = handlers
        self._host = host
        self._mechanisms = mechanisms
        self._meters = meters
        self._refuse = refuse
        self._gate = gate
        self._tracing = tracing or Tracing("")
        self._failpoint = failpoint
        self._clock_ms = clock_ms
        self._monotonic_s = monotonic_s
        self._budget_s = host.settings.limits.retry_budget_s

    async def run(self, work: Work) -> None:
        """Run to the outcome and journal it. A shutdown leaves the command unfinished instead."""
        row = work.row
        if row.withdrawn or not self._journal.commands.is_unfinished(row.id):
            return
        # no unbinding: each task of a lane, and of an answer, has its own context
        self._bind(row)
        row.trace = self._tracing.begin(row)
        refusal = self._refusal(work)
        if refusal is not None:
            made = (each for each in self._journal.steps.rows(row.id) if not each.existed)
            left = tuple(f"{each.mechanism} {each.key}" for each in made)
            await self._finish(row, self._failed(row, refusal, (), left))
            return
        steps = Steps(
            row.id,
            self._journal.steps,
            self._mechanisms,
            control=Control(row.command.deadline_ms, self._clock_ms),
            stored=row.stored,
            failpoint=self._failpoint,
            observe=self._meters.step,
        )
        work.began(steps)
        self._tracing.began(row)
        if row.trace is not None:
            row.trace.steps = steps
        try:
            reply, done = await self._outcome(row, steps)
            try:
                await self._finish(row, reply, done)
            except Conflict as conflict:  # with a record that nobody asked for before
                if done is None:
                    raise
                await self._finish(row, await self._undone(row, steps, conflict))
        except Halted:
            log.info("command.halted", attempts=row.attempts)
        finally:
            work.steps = None

    async def answer_superseded(self, work: Work) -> None:
        """The final answer of a command that never ran."""
        self._bind(work.row)
        work.row.trace = self._tracing.begin(work.row)
        await self._finish(work.row, self._failed(work.row, _superseded(work), ()))

    def would_refuse(self, request: Request, lane: Lane) -> Failure | None:
        """Why such a command, if it came now, would not be begun. No effect."""
        return (
            self._journal.quarantine.refusal(lane)
            or self._refuse(request)
            or self._gate.would_refuse(request)
        )

    def _bind(self, row: CommandRow) -> None:
        """Name the command in each line of the log that is written while it runs."""
        span = log_fields(self._journal.store.trace_of(row.command))
        bind_contextvars(command_id=row.id, lane=str(row.lane), attempt=row.attempts, **span)

    # -- one run -------------------------------------------------------------------------------

    def _refusal(self, work: Work) -> Failure | None:
        """Why a command is not begun; one that an earlier worker began is always continued."""
        row = work.row
        if (unread := self._journal.quarantine.refusal(row.lane)) is not None:
            return unread
        if row.attempts:
            return None
        if work.superseded_by is not None:
            return _superseded(work)
        deadline_ms = row.command.deadline_ms
        if deadline_ms is not None and deadline_ms <= self._clock_ms():
            return Expired("the deadline passed before the command was started")
        return self._refuse(row.command.request) or self._gate.refusal(row)

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
        """Run the handler until it succeeds, no retry can help, or deadline or budget are spent."""
        started_s = self._monotonic_s()
        try:
            return await self._attempt(row, steps)
        except (Failure, OSError) as error:
            if not _may_retry(error, steps):
                raise
            failures: list[Failure | OSError] = [error]
        if steps.control.final:  # only completion is left: the first attempt does not count
            started_s = self._monotonic_s()
        started_s -= row.spent_s  # by earlier workers

        async def attempt() -> Done:
            # The first failure happened above, so that a command that needs no second attempt
            # does not pay for tenacity (26 us, a twentieth of a command that changes nothing).
            if failures:
                raise failures.pop()
            return await self._attempt(row, steps)

        def is_spent(state: tenacity.RetryCallState) -> bool:
            spent_s = self._monotonic_s() - started_s + state.upcoming_sleep
            left_s = steps.control.left_s()
            return spent_s >= self._budget_s or (
                left_s is not None and state.upcoming_sleep >= left_s
            )

        return await tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: _may_retry(error, steps)),
            wait=tenacity.wait_random_exponential(BACKOFF_S, BACKOFF_MAX_S),
            stop=is_spent,
            sleep=lambda seconds: self._pause(steps, seconds),
            before_sleep=lambda state: self._note_retry(
                row, state, self._monotonic_s() - started_s
            ),
            reraise=True,
        )(attempt)

    async def _attempt(self, row: CommandRow, steps: Steps) -> Done:
        if row.withdrawn:
            raise Halted  # its message is still in the stream and is redelivered
        attempt = self._journal.commands.begin_attempt(row.id)
        bind_contextvars(attempt=attempt)
        request = row.command.request
        work = self._handlers[type(request)](request, steps, self._host)
        return await (work if row.trace is None else row.trace.attempt(attempt, work))

    def _note_retry(self, row: CommandRow, state: tenacity.RetryCallState, spent_s: float) -> None:
        self._journal.commands.spend(row.id, spent_s)
        error = state.outcome and state.outcome.exception()
        failure = of_os_error(error) if isinstance(error, OSError) else error
        if isinstance(failure, Failure):
            self._meters.retry(row.command.request.kind, failure.code)
            log.info("command.retried", code=failure.code.value, reason=failure.message)

    async def _pause(self, steps: Steps, seconds: float) -> None:
        """Wait before the next attempt, and until the journal can commit; what ends the command
        ends both waits at once."""
        if not self._journal.store.writable:
            if steps.control.final:
                await self._journal.store.until_writable()
            else:
                await steps.control.interruptible(
                    "wait_journal", self._journal.store.until_writable
                )
        await steps.control.pause(seconds)

    async def _undone(self, row: CommandRow, steps: Steps, failure: Failure | None) -> Reply:
        """Undo what the command made, unless it is past its point of no return; the reply."""
        left: tuple[str, ...] = failure.left_behind if failure is not None else ()
        if not steps.control.final:
            left += await self._undo(steps)
        return self._failed(row, failure, steps.taken, left)

    async def _undo(self, steps: Steps) -> tuple[str, ...]:
        while True:
            try:
                return await steps.undo()
            except JournalFault:
                await self._journal.store.until_writable()
            except Exception:
                log.exception("command.crashed", doing="undo")
                rows = self._journal.steps.rows(steps.command_id)
                return tuple(f"{row.mechanism} {row.key}" for row in rows if not row.existed)

    # -- the outcome ---------------------------------------------------------------------------

    async def _finish(
        self,
        row: CommandRow,
        reply: Reply,
        done: Done | None = None,
    ) -> None:
        record = done.record if done is not None else None
        tombstone = done.tombstone if done is not None else None
        network = done.network if done is not None else None
        reply, data = self._encode(row, reply)
        await self._failpoint("before:outcome")
        while True:
            try:
                await self._journal.commands.finish(
                    reply, data, record=record, tombstone=tombstone, network=network
                )
                break
            except JournalFault:
                if row.withdrawn:
                    return
                await self._journal.store.until_writable()
        if row.withdrawn:
            return
        if row.trace is not None:
            row.trace.end(reply)
        await self._gate.finished(row, reply)
        seconds = (reply.finished_at_ms - reply.received_at_ms) / 1000
        kind = row.command.request.kind
        self._meters.command_done(kind, reply.code, seconds)
        if done is not None and done.snapshot is not None:
            self._meters.snapshot(done.snapshot.seconds, done.snapshot.size_bytes)
        for name, work in done.afterwards if done is not None else ():
            self._host.later(name, work)
        slowest = slowest_steps(reply)
        launches = isinstance(row.command.request, StartInstance | WakeInstance)
        if launches and seconds >= SLOW_LAUNCH_S:
            log.warning("launch.slow", type=kind, took_s=seconds, steps_ms=slowest)
        log.info(
            "command.done",
            type=kind,
            code=reply.code.value,
            changed=reply.changed,
            attempts=reply.attempts,
            took_ms=reply.finished_at_ms - reply.received_at_ms,
            slowest_step=next(iter(slowest), None),
            left_behind=list(reply.left_behind),
        )

    def _encode(self, row: CommandRow, reply: Reply) -> tuple[Reply, bytes]:
        """The reply with its bytes; a `detail` that has no msgpack is a bug of the handler."""
        try:
            return reply, codec.encode_reply(reply, row.command.form)
        except (TypeError, ValueError, OverflowError):
            log.exception("command.crashed", type=row.command.request.kind)
            reply = self._failed(row, None, ())
            return reply, codec.encode_reply(reply, row.command.form)

    def _failed(
        self,
        row: CommandRow,
        failure: Failure | None,
        taken: list[StepTaken] | tuple[()],
        left: tuple[str, ...] = (),
    ) -> Reply:
        """The reply to a failure; None is a bug, whose facts are in the log only."""
        if failure is None:
            return self._reply(
                row,
                taken,
                response=Error("internal error; see the log of this host"),
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
            detail=detail,
        )

    def _reply(self, row: CommandRow, taken: list[StepTaken] | tuple[()], **facts: Any) -> Reply:
        return Reply(
            id=row.id,
            host_id=self._journal.store.subjects.host_id,
            attempts=row.attempts,
            received_at_ms=row.received_at_ms,
            finished_at_ms=self._clock_ms(),
            steps=tuple(taken[-STEPS_SHOWN:]),
            request_digest=codec.digest_of(row.request),
            **fields_of(self._journal.store.trace_of(row.command)),
            **facts,
        )

    def _status(self, row: CommandRow) -> str | None:
        """The current status of the command's instance, if it has one that is on record."""
        request = row.command.request
        if isinstance(request, Ping | SetupNetwork | TeardownNetwork):
            return None
        instance = self._journal.records.instance(request.ref)
        return None if instance is None else instance.status.value


def slowest_steps(reply: Reply) -> Mapping[str, int]:
    """The three steps that took longest, in milliseconds; the slowest first."""
    steps = sorted(reply.steps, key=attrgetter("took_us"), reverse=True)
    return {step.name: step.took_us // 1000 for step in steps[:3]}


def _may_retry(error: BaseException, steps: Steps) -> bool:
    failure = of_os_error(error) if isinstance(error, OSError) else error
    if not isinstance(failure, Failure) or failure.final:
        return False
    if isinstance(failure, Unavailable | JournalFault):
        return True
    # past a point of no return there is only completion
    return steps.control.final and isinstance(failure, HostFault | Exhausted)


def _superseded(work: Work) -> Superseded:
    by = work.superseded_by or ""
    return Superseded(f"superseded by {by}", detail={"by": by})
