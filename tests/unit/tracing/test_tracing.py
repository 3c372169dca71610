"""The trace of a command: in its log, replies, events and dead letters, and over a kill."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgpack
import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from handlers.errors import Conflict, Unavailable
from handlers.steps import Done, Steps
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.requests import Ping, Pong, Request, StopInstance
from schemas.subjects import Lane
from schemas.trace_context import TraceContext, parse
from tests.fakes.bus import FakeBus
from tests.fakes.shell_worker import (
    SUBJECTS,
    FakeHandlers,
    Thing,
    command,
    shell_worker,
    start,
    stop,
)
from tests.plain import unpacked
from worker.journal.transaction import OutRow
from worker.tracing.spans import MESSAGE_MAX, Answered, Span, command_span, inner_span
from worker.tracing.tracing import Tracing

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
OTHER = f"00-{'ab' * 16}-{'cd' * 8}-01"


class Spans(list[Span]):
    """What was exported."""

    def put(self, spans: Sequence[Span]) -> None:
        self.extend(spans)

    def tracing(self, ratio: float = 1.0) -> Tracing:
        return Tracing(SUBJECTS.host_id, ratio=ratio, put=self.put)

    def of(self, *names: str) -> list[Span]:
        return [each for each in self if each.name in names]


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x81\xa1\xff\x01", b"\x91" * 100_000],
    ids=["empty", "reserved", "no UTF-8", "deep"],
)
def test_a_damaged_row_that_was_sent_has_no_span(payload: bytes) -> None:
    spans = Spans()

    spans.tracing().sent(OutRow(1, "event", "s.evt", "id", b"", payload), 0.1)

    assert spans == []


def test_the_span_of_a_command_is_the_same_in_every_worker() -> None:
    first, second = Spans().tracing(), Spans().tracing()
    given = command(start(), traceparent=PARENT, tracestate="a=1")

    context = first.of_command(given)

    assert context == second.of_command(given)
    assert context is not None
    assert (context.trace_id, context.sampled, context.state) == (TRACE, True, "a=1")
    assert context.span_id != SPAN
    assert context != Tracing("h2", put=Spans().put).of_command(given)


def test_no_span_ends_before_it_began_though_the_clock_was_set_back() -> None:
    trace = TraceContext(TRACE, SPAN, sampled=True)
    reply = Reply(
        id="c1", host_id="h1", response=Pong(), code=Code.OK, received_at_ms=9, finished_at_ms=5
    )
    answered = Answered(trace, None, "Ping", Lane.host(), reply)

    of_command = command_span(answered, end_ns=5)
    inner = inner_span(trace, "attempt", 9, 5, {})

    assert (of_command.start_ns, of_command.end_ns) == (inner.start_ns, inner.end_ns) == (5, 5)


def test_a_command_without_a_context_begins_a_trace() -> None:
    context = Spans().tracing().of_command(command(start()))

    assert context is not None
    assert parse(context.traceparent) == context


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_ratio_is_that_of_traces_that_begin_here(ratio: float) -> None:
    tracing = Spans().tracing(ratio)

    contexts = [tracing.of(f"c{n}", None) for n in range(2000)]

    sampled = sum(context is not None and context.sampled for context in contexts)
    assert abs(sampled - 2000 * ratio) <= 100
    for flags, is_sampled in (("00", False), ("01", True)):
        parent = parse(f"00-{TRACE}-{SPAN}-{flags}")
        assert parent is not None
        context = tracing.of("c1", parent)
        assert context is not None
        assert context.sampled is is_sampled


@pytest.mark.parametrize(
    ("envelope", "header", "ignored"),
    [
        ((None, None), (None, None), []),
        ((None, "a=1"), (None, None), []),
        ((PARENT, " , "), ("odd", None), []),  # the header counts only without the envelope's
        (("00-odd", None), (PARENT, None), [("envelope", "traceparent")]),
        (("x" * 9000, "a=1"), ("", None), [("envelope", "traceparent"), ("header", "traceparent")]),
        ((PARENT, "a=1,a=2"), (None, None), [("envelope", "tracestate")]),
        ((None, None), (PARENT, "A=1"), [("header", "tracestate")]),
    ],
    ids=["none", "state", "valid", "parent", "both", "twice", "header"],
)
async def test_a_context_that_is_ignored_is_counted_and_the_command_runs(
    tmp_path: Path,
    envelope: tuple[str | None, str | None],
    header: tuple[str | None, str | None],
    ignored: list[tuple[str, str]],
) -> None:
    data = codec.encode_command(
        command(start(), traceparent=envelope[0], tracestate=envelope[1], reply_to="_INBOX.1")
    )
    with capture_logs() as logs:
        async with shell_worker(tmp_path / "j") as worker:
            worker.bus.command(
                SUBJECTS.command(Lane.of_request(start())),
                data,
                traceparent=header[0],
                tracestate=header[1],
            )
            reply = await worker.reply()

    assert reply.code == "ok"
    assert worker.meters.ignored_traces == ignored
    found = [each for each in logs if each["event"] == "trace.context_ignored"]
    assert [(each["place"], each["field"]) for each in found] == ignored
    assert {(each["command_id"], each["log_level"]) for each in found} <= {("c1", "debug")}


@pytest.mark.parametrize("on", [True, False])
async def test_the_trace_is_in_log_reply_event_and_reply_stream(tmp_path: Path, on: bool) -> None:
    spans = Spans()
    tracing = spans.tracing() if on else Tracing(SUBJECTS.host_id)
    with capture_logs(processors=[merge_contextvars]) as logs:
        async with shell_worker(tmp_path / "j", tracing=tracing) as worker:
            worker.send(start(), traceparent=PARENT, tracestate="a=1", reply_to="_INBOX.1")
            reply = await worker.reply()
            await worker.bus.until(events=1, sent=1)
            context = parse(reply.traceparent, reply.tracestate)
            sent = codec.decode_reply(worker.bus.sent_to("_INBOX.1")[0])
            (event,) = worker.events()

    assert context is not None
    assert (context.trace_id, context.state) == (TRACE, "a=1")
    assert (context.span_id == SPAN) is not on
    assert sent == reply
    assert (event.traceparent, event.tracestate) == (context.traceparent, "a=1")
    (done,) = [line for line in logs if line["event"] == "command.done"]
    assert (done["trace_id"], done["span_id"]) == (TRACE, context.span_id)
    assert bool(spans) is on


async def test_without_a_trace_nothing_names_one(tmp_path: Path) -> None:
    with capture_logs(processors=[merge_contextvars]) as logs:
        async with shell_worker(tmp_path / "j") as worker:
            worker.send(start(), traceparent="00-a-b-01", tracestate="a=1")
            reply = await worker.reply()
            await worker.bus.until(events=1)
            raw = unpacked(worker.bus.replies()[0].payload)

    assert reply.code == "ok"
    assert not {"traceparent", "tracestate"} & raw.keys()
    assert not any("trace_id" in line for line in logs)


@pytest.mark.parametrize(
    ("in_envelope", "in_header", "found"),
    [
        (PARENT, None, TRACE),
        (None, PARENT, TRACE),
        (PARENT, OTHER, TRACE),
        ("nonsense", PARENT, TRACE),
        (None, "nonsense", None),
    ],
)
async def test_the_envelope_is_before_the_header(
    tmp_path: Path, in_envelope: str | None, in_header: str | None, found: str | None
) -> None:
    bus = FakeBus()
    async with shell_worker(tmp_path / "j", bus) as worker:
        data = codec.encode_command(command(start(), traceparent=in_envelope))
        bus.command(SUBJECTS.command(Lane.of_request(start())), data, traceparent=in_header)
        reply = await worker.reply()

    context = parse(reply.traceparent)
    assert (context and context.trace_id) == found


async def test_a_dead_letter_has_it_in_its_headers_and_its_line_of_the_log(tmp_path: Path) -> None:
    spans = Spans()
    with capture_logs() as logs:
        async with shell_worker(tmp_path / "j", tracing=spans.tracing()) as worker:
            envelope = {"v": 1, "id": "c1", "request": "Grow", "traceparent": PARENT}
            worker.bus.command(f"{SUBJECTS.root}.h1.cmd.host", msgpack.packb(envelope))
            await worker.bus.until(replies=1, dead=1)
            (letter,) = worker.bus.dead()
            (reply,) = worker.replies()

    (refused,) = [line for line in logs if line["event"] == "command.refused"]
    assert f"00-{refused['trace_id']}-{refused['span_id']}-01" == reply.traceparent
    assert reply.code == "unsupported"
    assert letter.headers["traceparent"] == reply.traceparent
    assert (reply.traceparent or "").startswith(f"00-{TRACE}-")
    (span,) = spans.of("unknown")
    assert span.parent == TraceContext(TRACE, SPAN, sampled=True)
    assert (span.error or "").startswith("unsupported: ")


async def test_an_answer_in_a_trace_that_is_not_sampled_has_no_span(tmp_path: Path) -> None:
    spans = Spans()
    async with shell_worker(tmp_path / "j", tracing=spans.tracing()) as worker:
        worker.send(Ping(), traceparent=f"00-{TRACE}-{SPAN}-00")
        reply = await worker.reply()

    assert (reply.traceparent or "").startswith(f"00-{TRACE}-")
    assert spans == []


async def test_a_ping_has_a_span(tmp_path: Path) -> None:
    spans = Spans()
    async with shell_worker(tmp_path / "j", tracing=spans.tracing()) as worker:
        worker.send(Ping(), traceparent=PARENT)
        reply = await worker.reply()

    (span,) = spans.of("Ping")
    assert span.context.traceparent == reply.traceparent


async def test_a_command_has_a_span_for_each_attempt_and_step(tmp_path: Path) -> None:
    spans, tries = Spans(), 0

    def fail_once(request: Request, steps: Steps) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Unavailable("busy")

    machine = FakeHandlers(behave=fail_once)
    async with shell_worker(tmp_path / "j", machine=machine, tracing=spans.tracing()) as worker:
        worker.send(start(), traceparent=PARENT, reply_to="_INBOX.1")
        await worker.reply()
        await worker.bus.until(events=1, sent=1)
        await worker.outbox.drained()

    (root,) = spans.of("StartInstance")
    assert root.parent == TraceContext(TRACE, SPAN, sampled=True)
    assert root.error is None
    assert root.attributes == {
        "hostd.command.id": "c1",
        "hostd.command.type": "StartInstance",
        "hostd.lane": "instance.acme.web.a1",
        "hostd.tenant.id": "acme",
        "hostd.pool.id": "web",
        "hostd.instance.id": "a1",
        "hostd.code": "ok",
        "hostd.changed": True,
        "hostd.attempts": 2,
        "messaging.system": "nats",
        "messaging.operation.type": "process",
        "messaging.message.id": "c1",
    }
    wait, *attempts = spans.of("lane wait", "attempt")
    assert [each.parent for each in (wait, *attempts)] == [root.context] * 3
    assert [each.attributes["hostd.attempt"] for each in attempts] == [1, 2]
    assert [each.error for each in attempts] == ["unavailable", None]
    (step,) = spans.of("thing")
    assert step.parent == attempts[1].context
    assert step.attributes == {"hostd.step.outcome": "done"}
    published = spans.of("publish reply", "publish event")
    assert [each.parent for each in published] == [root.context] * 2
    assert all(each.context.trace_id == TRACE for each in spans)
    assert len({each.context.span_id for each in spans}) == len(spans) == 7
    for each in spans:
        assert root.start_ns <= each.start_ns <= each.end_ns
    assert attempts[0].end_ns < attempts[1].start_ns < step.end_ns <= root.end_ns


async def test_a_command_has_a_bounded_number_of_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.dispatch.BACKOFF_S", 0.0)
    monkeypatch.setattr("worker.tracing.tracing.ATTEMPTS_MAX", 2)
    monkeypatch.setattr("worker.tracing.tracing.STEPS_MAX", 3)
    spans, tries = Spans(), 0

    async def fail_often(request: Request, steps: Steps) -> None:
        nonlocal tries
        tries += 1
        await steps.ensure(machine.things, Thing(f"x{tries}"))
        if tries < 5:
            raise Unavailable("busy")

    machine = FakeHandlers(behave=fail_often)
    async with shell_worker(tmp_path / "j", machine=machine, tracing=spans.tracing()) as worker:
        worker.send(start())
        await worker.reply()

    assert tries == 5
    assert [each.attributes["hostd.attempt"] for each in spans.of("attempt")] == [1, 2]
    assert len(spans.of("thing")) == 3


async def test_the_error_of_a_span_has_a_bounded_length(tmp_path: Path) -> None:
    spans = Spans()

    def fail(request: Request, steps: Steps) -> None:
        raise Conflict("x" * 2 * MESSAGE_MAX)

    machine = FakeHandlers(behave=fail)
    async with shell_worker(tmp_path / "j", machine=machine, tracing=spans.tracing()) as worker:
        worker.send(start())
        await worker.reply()

    (root,) = spans.of("StartInstance")
    assert len(root.error or "") == MESSAGE_MAX


async def test_a_failure_is_the_status_and_the_undo_has_spans(tmp_path: Path) -> None:
    spans = Spans()

    async def fail(request: Request, steps: Steps) -> Done:
        await steps.ensure(machine.things, Thing("x"))
        raise OSError(5, "Input/output error")

    machine = FakeHandlers(behave=fail)
    async with shell_worker(tmp_path / "j", machine=machine, tracing=spans.tracing()) as worker:
        worker.send(start())
        await worker.reply()

    (root,) = spans.of("StartInstance")
    assert root.parent is None
    assert root.attributes["hostd.code"] == "host_fault"
    assert root.attributes["hostd.act"] == "operator"
    assert (root.error or "").startswith("host_fault: ")
    (undo,) = spans.of("undo thing")
    assert undo.parent == root.context


async def test_a_command_that_a_kill_interrupted_goes_on_in_its_trace(tmp_path: Path) -> None:
    bus, spans = FakeBus(), Spans()
    stuck = FakeHandlers(gate=asyncio.Event())
    async with shell_worker(tmp_path / "j", bus, stuck, tracing=spans.tracing()) as first:
        first.send(start(), traceparent=PARENT, tracestate="a=1")
        await stuck.at_gate.wait()
        await bus.until_acked()
    assert not spans

    async with shell_worker(tmp_path / "j", bus, tracing=spans.tracing()) as second:
        reply = await second.reply()

    (root,) = spans.of("StartInstance")
    assert root.parent == TraceContext(TRACE, SPAN, sampled=True, state="a=1")
    assert root.attributes["hostd.recovered"] is True
    assert (reply.traceparent, reply.tracestate) == (root.context.traceparent, "a=1")
    (attempt,) = spans.of("attempt")
    assert attempt.attributes["hostd.attempt"] == 2


async def test_what_never_ran_has_its_span(tmp_path: Path) -> None:
    spans, gate = Spans(), asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine, tracing=spans.tracing()) as worker:
        worker.send(start(), "c1", deadline_ms=1, traceparent=PARENT)
        assert (await worker.reply("c1")).code == "expired"
        worker.send(stop(), "c2", traceparent=OTHER)
        await worker.reply("c2")

    (expired,) = spans.of("StartInstance")
    assert (expired.attributes["hostd.code"], expired.attributes["hostd.attempts"]) == (
        "expired",
        0,
    )
    (stopped,) = spans.of(StopInstance.kind)
    assert stopped.context.trace_id == "ab" * 16


async def test_an_unsampled_trace_has_no_spans_and_is_passed_on(tmp_path: Path) -> None:
    spans = Spans()
    async with shell_worker(tmp_path / "j", tracing=spans.tracing()) as worker:
        worker.send(start(), traceparent=f"{PARENT[:-2]}00")
        reply = await worker.reply()
        await worker.outbox.drained()

    assert not spans
    assert (reply.traceparent or "").startswith(f"00-{TRACE}-")
    assert (reply.traceparent or "").endswith("-00")
