"""Which trace a command is part of, and its spans, if there is a collector for them.

The IDs of a command's span are computed from the command's, so the journal need not keep them: the
worker that continues a command after a kill gives it the same span, below the same parent.
"""

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from handlers.errors import Failure
from handlers.steps import Steps
from schemas.envelopes import Command, Reply
from schemas.subjects import Lane
from schemas.trace_context import TraceContext, parse
from worker.journal.memory import CommandRow
from worker.journal.transaction import OutRow
from worker.tracing.spans import Answered, Span, command_span, inner_span, lane_attributes

STEPS_MAX: Final = 200  # of a command, the last ones
ATTEMPTS_MAX: Final = 50
LAST_MAX: Final = 4096  # lanes of which the last command is known

T = TypeVar("T")
Put = Callable[[Sequence[Span]], None]


class Facts(dict[str, str | int | bool]):
    """What a span of the worker's own work says; `drop` if there was nothing to do: no span."""

    dropped = False

    def drop(self) -> None:
        self.dropped = True


class _Sent(msgspec.Struct):
    """The part of a reply or an event that names its trace."""

    traceparent: str | None = None
    tracestate: str | None = None


_SENT: Final = msgspec.msgpack.Decoder(_Sent)


class Tracing:
    """The trace contexts of this host.

    Without `put` there are no spans: a command's context is passed on as it came, and a command
    without one has none. With it, every command is part of a trace.

    Args:
        ratio: of the traces that begin here, how many are sampled; of others the sender decides.
        put: takes spans that ended; must not block or raise.
    """

    def __init__(self, host_id: str, *, ratio: float = 1.0, put: Put | None = None) -> None:
        self._host_id = host_id
        self._bound = round(ratio * 2**64)
        self._put = put
        self._last: OrderedDict[Lane, tuple[str, TraceContext]] = OrderedDict()

    def of_command(self, command: Command) -> TraceContext | None:
        """The context of a journalled command's span, the same in every worker."""
        return self.of(command.id, parse(command.traceparent, command.tracestate))

    def of(self, key: str, parent: TraceContext | None) -> TraceContext | None:
        """The context of what `key` names on this host, below `parent` or in a trace of its own."""
        if self._put is None:
            return parent
        if parent is None:
            parent = self._root(_digits(32, "trace", self._host_id, key))
        return parent._replace(span_id=_digits(16, parent.trace_id, self._host_id, key))

    def begin(self, row: CommandRow) -> "CommandTrace | None":
        """What is noted of a command that is to be run or answered; None if nobody will see it."""
        if self._put is None:
            return None
        context = self.of_command(row.command)
        if context is None or not context.sampled:
            return None
        return CommandTrace(row, context, self._put)

    def began(self, row: CommandRow) -> None:
        """The command was not refused: from now on it is the last one of its lane."""
        self._last.pop(row.lane, None)
        if row.trace is None:
            return  # no span that a link could lead to
        self._last[row.lane] = row.id, row.trace.context
        if len(self._last) > LAST_MAX:
            self._last.popitem(last=False)

    @contextmanager
    def work(self, name: str, lane: Lane | None = None) -> Generator[Facts]:
        """Note the worker's own work, which no command asked for, as the root of a trace.

        What is put into the facts meanwhile becomes attributes. With a lane, the span is linked to
        that of the last command that this worker began there, if it was sampled. There is none of
        work that was dropped, unless it failed.
        """
        facts = Facts()
        context = None if self._put is None else self._root(secrets.token_hex(16))
        if self._put is None or context is None or not context.sampled:
            yield facts
            return
        context = context._replace(span_id=secrets.token_hex(8))
        last_id, last = (None, None) if lane is None else self._last.get(lane, (None, None))
        error, began_ns, began_s = None, time.time_ns(), time.perf_counter()
        try:
            yield facts
        except BaseException as failure:
            error = _named(failure)
            raise
        finally:
            names = {} if lane is None else lane_attributes(lane)
            found = {**names, "hostd.command.id": last_id, **facts}
            attributes = {key: value for key, value in found.items() if value is not None}
            end_ns = began_ns + int((time.perf_counter() - began_s) * 1e9)
            links = () if last is None else (last,)
            if error is not None or not facts.dropped:
                span = (context, None, name, "internal", began_ns, end_ns, attributes, error, links)
                self._put([Span(*span)])

    def _root(self, trace_id: str) -> TraceContext:
        """The beginning of a trace, before it has a span; sampled by the ratio."""
        return TraceContext(trace_id, "", int(trace_id[16:], 16) < self._bound)

    def answered(
        self, key: str, parent: TraceContext | None, kind: str, lane: Lane, reply: Reply
    ) -> None:
        """A message that was answered without being run."""
        context = self.of(key, parent)
        if self._put is not None and context is not None and context.sampled:
            answered = Answered(context, parent, kind, lane, reply)
            self._put([command_span(answered, time.time_ns())])

    def sent(self, row: OutRow, seconds: float) -> None:
        """A reply or event was published: it took so long until the stream confirmed it."""
        if self._put is None or row.kind not in ("reply", "event"):
            return
        try:
            found = _SENT.decode(row.payload)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return  # a damaged row, which the bus took all the same
        parent = parse(found.traceparent, found.tracestate)
        if parent is None or not parent.sampled:
            return
        end_ns = time.time_ns()
        span = inner_span(
            parent,
            f"publish {row.kind}",
            end_ns - int(seconds * 1e9),
            end_ns,
            {
                "messaging.system": "nats",
                "messaging.operation.type": "send",
                "messaging.destination.name": row.subject,
                "messaging.message.id": row.msg_id,
            },
        )
        self._put([span._replace(kind="producer")])


@dataclass(slots=True)
class _Attempt:
    """Times are of `time.perf_counter`."""

    number: int
    began_s: float
    ended_s: float = 0.0
    error: str | None = None


class CommandTrace:
    """What one worker notes of a command that it runs, until `end` makes spans of it."""

    def __init__(self, row: CommandRow, context: TraceContext, put: Put) -> None:
        self._row = row
        self.context = context
        self._put = put
        self._recovered = row.attempts > 0
        self._began_s = time.perf_counter()
        self._attempts: list[_Attempt] = []
        self.steps: Steps | None = None

    async def attempt(self, number: int, work: Awaitable[T]) -> T:
        """Await one attempt, and note when it was and why it failed."""
        noted = _Attempt(number, time.perf_counter())
        if len(self._attempts) < ATTEMPTS_MAX:
            self._attempts.append(noted)
        try:
            return await work
        except BaseException as error:
            noted.error = _named(error)
            raise
        finally:
            noted.ended_s = time.perf_counter()

    def end(self, reply: Reply) -> None:
        """The outcome is committed: make the spans."""
        row, request = self._row, self._row.command.request
        now_ns, now_s = time.time_ns(), time.perf_counter()

        def at_ns(seconds: float) -> int:
            return now_ns - int((now_s - seconds) * 1e9)

        parent = parse(row.command.traceparent, row.command.tracestate)
        workspace_id: Any = getattr(request, "workspace_id", None)
        answered = Answered(self.context, parent, request.kind, row.lane, reply, workspace_id)
        spans = [command_span(answered, now_ns, recovered=self._recovered)]
        waited = self.context, "lane wait", row.received_at_ms * 1_000_000, at_ns(self._began_s)
        spans.append(inner_span(*waited, {"hostd.lane": str(row.lane)}))
        attempts = [
            inner_span(
                self.context,
                "attempt",
                at_ns(each.began_s),
                at_ns(each.ended_s),
                {"hostd.attempt": each.number},
                each.error,
            )
            for each in self._attempts
        ]
        self._put([*spans, *attempts, *self._steps(attempts, at_ns)])

    def _steps(self, attempts: Sequence[Span], at_ns: Callable[[float], int]) -> list[Span]:
        """Each step below the attempt in which it ended; the undo comes after the last one."""
        if self.steps is None:
            return []
        found: list[Span] = []
        noted = zip(self.steps.taken[-STEPS_MAX:], self.steps.ended_s[-STEPS_MAX:], strict=True)
        for step, ended_s in noted:
            end_ns = at_ns(ended_s)
            above = next((a.context for a in attempts if a.start_ns <= end_ns <= a.end_ns), None)
            found.append(
                inner_span(
                    above or self.context,
                    f"undo {step.name}" if step.outcome == "undone" else step.name,
                    end_ns - step.took_us * 1000,
                    end_ns,
                    {"hostd.step.outcome": step.outcome},
                    "failed" if step.outcome == "failed" else None,
                )
            )
        return found


def _named(error: BaseException) -> str:
    return error.code.value if isinstance(error, Failure) else type(error).__name__


def _digits(count: int, *parts: str) -> str:
    """Hex digits that are these names' alone, and as evenly spread as random ones."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:count]
